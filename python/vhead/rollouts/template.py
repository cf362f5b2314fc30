"""A tokenizer's chat template, asked about the chat of one record."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from vhead.errors import FieldError
from vhead.rollouts.messages import Message, Tool, argument_texts, with_parsed_arguments

# What a message can hold beside its content that templates know how to show.
SHOWN_BESIDE = ("reasoning_content", "reasoning", "thinking", "tool_calls")
_MARK = "vhead-marks-the-content"
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

Ranges = list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Template:
    """What a chat template makes of messages.

    Attributes:
        tokenizer: Any tokenizer of transformers.
        name: What errors call the record; None: it is named by its field alone.
        tools: The functions that the model may call.
    """

    tokenizer: Any
    name: str | None
    tools: Sequence[Tool] | None = None

    def check(self) -> None:
        """Raises `FieldError` where the tokenizer has no template."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise self.error("a tokenizer with a chat template", "one without")

    def check_tools(self, messages: Sequence[Message]) -> None:
        """Raises `FieldError` where the record has tools and the template shows nothing of them."""
        if self.tools and self.rendered(messages) == replace(self, tools=None).rendered(messages):
            got = "one that leaves them out; use a template that shows them, or leave the field out"
            raise FieldError(self.name, "tools", expected="a chat template that shows the tools", got=got)

    def taken(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages with the arguments of calls as the template wants them.

        OpenAI's interface gives arguments as JSON text. Most templates encode arguments themselves, which makes a text
        in a text of it, or look into them; these get the object. A template that shows text as it is gets the text.
        """
        texts = argument_texts(messages)
        if not texts:
            return messages
        try:
            shown = self.rendered(messages)
        except FieldError:
            return with_parsed_arguments(messages)
        twice = any(json.dumps(text, ensure_ascii=False) in shown for text in texts)
        return with_parsed_arguments(messages) if twice else messages

    def rendered(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The messages as text; `FieldError` where the template refuses them."""
        return cast("str", self._applied(messages, tokenize=False, add_generation_prompt=add_generation_prompt))

    def generated(self, messages: Sequence[Message]) -> Ranges | None:
        """The characters in the template's generation blocks; None where it has none, or nobody states offsets."""
        template = self._text()
        if template is None or not _GENERATION.search(template) or not getattr(self.tokenizer, "is_fast", False):
            return None
        encoding = self._applied(
            messages,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        ranges: Ranges = []
        within = False
        for (start, stop), is_generated in zip(encoding["offset_mapping"], encoding["assistant_masks"], strict=True):
            if is_generated and within:
                ranges[-1] = ranges[-1][0], stop
            elif is_generated:
                ranges.append((start, stop))
            within = bool(is_generated)
        return ranges

    def around(self, prompt: Sequence[Message], answer: Message) -> tuple[str, str]:
        """What the template puts before and behind the content of the message that follows a prompt."""
        before, mark, ending = self.rendered([*prompt, {**answer, "content": _MARK}]).partition(_MARK)
        if not mark:
            raise self.error("a chat template that shows the message's `content`", "one that leaves it out")
        return before, ending

    def check_nothing_is_left_out(
        self, prompt: Sequence[Message], answer: Message, whole: str, behind: Sequence[Message] = ()
    ) -> None:
        """Raises `FieldError` where the template does not show what a message holds beside its content.

        Args:
            prompt: What stands before it.
            answer: The message.
            whole: All of them as text.
            behind: What stands behind it.
        """
        for key in SHOWN_BESIDE:
            if answer.get(key):
                without = {name: value for name, value in answer.items() if name != key}
                if self.rendered([*prompt, without, *behind]) == whole:
                    raise self.error(f"a chat template that shows the message's `{key}`", "one that leaves it out")

    def error(self, expected: str, got: str) -> FieldError:
        """An error about the record's messages."""
        return FieldError(self.name, "messages", expected=expected, got=got)

    def _text(self) -> str | None:
        """The template's source; a tokenizer may have several of them by name."""
        template = self.tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("tool_use" if self.tools else "default", template.get("default"))
        return template if isinstance(template, str) else None

    def _applied(self, messages: Sequence[Message], **options: Any) -> Any:
        tools = None if self.tools is None else [dict(tool) for tool in self.tools]
        try:
            return self.tokenizer.apply_chat_template([dict(message) for message in messages], tools=tools, **options)
        except Exception as error:  # A template is a program of its own and raises what it likes.
            raise self.error("a chat that the template takes", str(error) or type(error).__name__) from error


def end_of_turn(ending: str) -> str:
    """What stands behind the content, as far as the model wrote it: to the last marker, or all where there is none.

    The white space behind a marker is the template's. ChatML has a line break there, after which no model was asked.
    """
    return ending.rstrip() or ending
