"""Chats to text, by the tokenizer's chat template: what the model read, and what it wrote."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from vhead.errors import FieldError
from vhead.rollouts.messages import Message
from vhead.rollouts.text import Passage

# What a message can hold beside its content that templates know how to show.
_SHOWN_BESIDE = ("reasoning_content", "reasoning", "thinking", "tool_calls")
# A tag that a generation prompt opens for the model, such as `<think>`; turns' markers look different.
_OPENED = re.compile(r"<(\w+)>(\s*)$")
_MARK = "vhead-marks-the-content"


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A tokenizer's chat template, asked about one record.

    Attributes:
        tokenizer: Any tokenizer of transformers.
        name: What errors call the record.
    """

    tokenizer: Any
    name: str

    def passage(self, prompt: Sequence[Message], completion: Sequence[Message]) -> Passage:
        """The chat as text: the prompt up to where the model began to write, and the assistant's turn to its end.

        The template's own rendering is taken where it begins with the prompt's and holds the whole content. Where it
        does not, since it cuts the reasoning out of the content or since its generation prompt opens the reasoning, the
        text is the prompt's, the content as it came, and what the template ends a turn with.

        Raises:
            FieldError: The tokenizer has no template, the completion is not one message of the assistant's, or the
                template refuses the chat, changes the prompt, or leaves out what the message holds.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise self._error("a tokenizer with a chat template", "one without")
        if len(completion) != 1 or completion[0]["role"] != "assistant":
            roles = ", ".join(repr(message["role"]) for message in completion)
            raise self._error("one message of the assistant's as the completion", f"the roles {roles}")
        answer, content = completion[0], completion[0]["content"]
        head = self._rendered(prompt, add_generation_prompt=True)
        whole = self._rendered([*prompt, answer])
        self._check_nothing_is_left_out(prompt, answer, whole)
        written = content.strip()
        if not written and whole.startswith(head):
            return Passage(whole.rstrip(), len(head), len(head), 0)
        before, ending = self._around(prompt, answer)
        if not (whole.startswith(head) and whole.endswith(written + ending)):
            return self._continued(head, before, ending, answer)
        text, length = whole.removesuffix(ending), content.index(written) + len(written)
        return Passage(text + _end_of_turn(ending), len(head), len(text) - length, length)

    def _around(self, prompt: Sequence[Message], answer: Message) -> tuple[str, str]:
        """What the template puts before and behind the content."""
        before, mark, ending = self._rendered([*prompt, {**answer, "content": _MARK}]).partition(_MARK)
        if not mark:
            raise self._error("a chat template that shows the message's `content`", "one that leaves it out")
        return before, ending

    def _continued(self, head: str, before: str, ending: str, answer: Message) -> Passage:
        """The content as it came, behind the generation prompt."""
        opened = _OPENED.search(head)
        if not before.startswith(head if opened is None else head[: opened.start()]):
            expected = "a chat template that leaves the prompt as it is when the completion follows"
            raise self._error(expected, "one that changes it; score text or token ids instead")
        for key in _SHOWN_BESIDE:
            if answer.get(key):
                expected = (
                    "everything that the model wrote to be in `content`, because the chat template would change it"
                )
                raise self._error(expected, f"`{key}` beside it; score text or token ids instead")
        content = answer["content"]
        written = content if opened is None else self._after_opening(opened, content)
        start = len(head) + len(written) - len(content)
        return Passage(head + written + _end_of_turn(ending), len(head), start, len(content))

    def _after_opening(self, opened: re.Match[str], content: str) -> str:
        """What the model wrote where the generation prompt ends in a tag, which the content may repeat."""
        tag, space = f"<{opened[1]}>", opened[2]
        stripped = content.lstrip()
        if stripped.startswith(tag):
            return stripped.removeprefix(tag).removeprefix(space)
        if f"</{opened[1]}>" not in content:
            expected = f"content with the reasoning that the chat template's generation prompt opens by {tag}"
            raise self._error(expected, f"one without </{opened[1]}>; score text or token ids instead")
        return content

    def _check_nothing_is_left_out(self, prompt: Sequence[Message], answer: Message, whole: str) -> None:
        for key in _SHOWN_BESIDE:
            if answer.get(key):
                without = {name: value for name, value in answer.items() if name != key}
                if self._rendered([*prompt, without]) == whole:
                    raise self._error(f"a chat template that shows the message's `{key}`", "one that leaves it out")

    def _rendered(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        try:
            rendered = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # A template is a program of its own and raises what it likes.
            raise self._error("a chat that the template takes", str(error) or type(error).__name__) from error
        return cast("str", rendered)

    def _error(self, expected: str, got: str) -> FieldError:
        return FieldError(self.name, "messages", expected=expected, got=got)


def _end_of_turn(ending: str) -> str:
    """What stands behind the content, as far as the model wrote it: to the last marker, or all where there is none.

    The white space behind a marker is the template's. ChatML has a line break there, after which no model was asked.
    """
    return ending.rstrip() or ending
