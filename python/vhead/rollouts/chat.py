"""Chats to text, by the tokenizer's chat template: what the model read, and what it wrote."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vhead.rollouts.messages import Message
from vhead.rollouts.template import SHOWN_BESIDE, Template, end_of_turn
from vhead.rollouts.text import Passage
from vhead.rollouts.turns import turns_passage

# A tag that a generation prompt opens for the model, such as `<think>`; turns' markers look different.
_OPENED = re.compile(r"<(\w+)>(\s*)$")


def chat_passage(template: Template, prompt: Sequence[Message], completion: Sequence[Message]) -> Passage:
    """The chat as text: the prompt up to where the model began to write, and the completion behind it.

    Raises:
        FieldError: The tokenizer has no template, the completion does not begin with a message of the assistant's, or
            the template refuses the chat, changes what came before, or leaves out what a message holds.
    """
    template.check()
    if completion[0]["role"] != "assistant":
        got = f"the role {completion[0]['role']!r}"
        raise template.error("a completion that begins with a message of the assistant's", got)
    template.check_tools([*prompt, *completion])
    messages = template.taken([*prompt, *completion])
    prompt, completion = messages[: len(prompt)], messages[len(prompt) :]
    if len(completion) == 1:
        return _OneTurn(template).passage(prompt, completion[0])
    return turns_passage(template, prompt, completion)


@dataclass(frozen=True, slots=True)
class _OneTurn:
    """A chat that ends in what the model wrote.

    The template's own rendering is taken where it begins with the prompt's and holds the whole content. Where it does
    not, since it cuts the reasoning out of the content or since its generation prompt opens the reasoning, the text is
    the prompt's, the content as it came, and what the template ends a turn with.
    """

    template: Template

    def passage(self, prompt: Sequence[Message], answer: Message) -> Passage:
        content = answer["content"]
        head = self.template.rendered(prompt, add_generation_prompt=True)
        whole = self.template.rendered([*prompt, answer])
        self.template.check_nothing_is_left_out(prompt, answer, whole)
        written = content.strip()
        if not written and whole.startswith(head):
            return Passage(whole.rstrip(), len(head), len(head), 0)
        before, ending = self.template.around(prompt, answer)
        if not (whole.startswith(head) and whole.endswith(written + ending)):
            return self._continued(head, before, ending, answer)
        text, length = whole.removesuffix(ending), content.index(written) + len(written)
        return Passage(text + end_of_turn(ending), len(head), len(text) - length, length)

    def _continued(self, head: str, before: str, ending: str, answer: Message) -> Passage:
        """The content as it came, behind the generation prompt."""
        opened = _OPENED.search(head)
        if not before.startswith(head if opened is None else head[: opened.start()]):
            expected = "a chat template that leaves the prompt as it is when the completion follows"
            raise self.template.error(expected, "one that changes it; score text or token ids instead")
        for key in SHOWN_BESIDE:
            if answer.get(key):
                expected = (
                    "everything that the model wrote to be in `content`, because the chat template would change it"
                )
                raise self.template.error(expected, f"`{key}` beside it; score text or token ids instead")
        content = answer["content"]
        written = content if opened is None else self._after_opening(opened, content)
        start = len(head) + len(written) - len(content)
        return Passage(head + written + end_of_turn(ending), len(head), start, len(content))

    def _after_opening(self, opened: re.Match[str], content: str) -> str:
        """What the model wrote where the generation prompt ends in a tag, which the content may repeat."""
        tag, space = f"<{opened[1]}>", opened[2]
        stripped = content.lstrip()
        if stripped.startswith(tag):
            return stripped.removeprefix(tag).removeprefix(space)
        if f"</{opened[1]}>" not in content:
            expected = f"content with the reasoning that the chat template's generation prompt opens by {tag}"
            raise self.template.error(expected, f"one without </{opened[1]}>; score text or token ids instead")
        return content
