"""What is scored: a prompt and one completion of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vhead.errors import FieldError
from vhead.rollouts.arrays import candidate_ids, token_ids, token_mask
from vhead.rollouts.chat import chat_passage
from vhead.rollouts.messages import Message, Tool, check_unicode, checked_messages, checked_tools
from vhead.rollouts.template import Template
from vhead.rollouts.text import TextTokenizer
from vhead.rollouts.wording import Id, record_of, shown

# Text, messages or token ids; `Any` stands for torch's tensors, as this module works without torch.
Part = str | Sequence[int] | Sequence[Message] | NDArray[np.integer[Any]] | Any
Kind = Literal["text", "token ids", "messages"]


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """A prompt and one completion of it, both as text, both as token ids, or both as chat messages.

    Token ids come as a list, a numpy array or a torch tensor of integers `[P]` and `[C]`, and are kept as read-only
    int64 arrays. Text is tokenised when it is scored, both parts as one text: a token across the border between them is
    the completion's.

    Attributes:
        prompt: What the model read before it began to write.
        completion: What it wrote.
        id: The record's name.
        mask: With token ids only: True where the model wrote the token, False where it read an observation, such as a
            tool's answer; read-only bool `[C]`. None: it wrote all of them.
        candidates: With token ids only: ids whose log-probabilities are wanted at each token of the completion,
            read-only int64 `[C, M]`.
        tools: With messages only: the functions that the model may call, as the schemas that chat templates take.

    Raises:
        FieldError: A part is empty, of the wrong type or shape, or the parts are of different kinds. The mask or the
            candidates do not fit the completion, the mask has no True, or one of them or the tools came with another
            kind of parts.
    """

    prompt: Part
    completion: Part
    id: Id = None
    mask: Any = None
    candidates: Any = None
    tools: Sequence[Tool] | None = None

    def __post_init__(self) -> None:
        if self.id is not None and not isinstance(self.id, str | int | float):
            raise FieldError(None, "id", expected="text, a number, a boolean or None", got=shown(self.id))
        record = record_of(self.id)
        kinds = [_normalise(self, name, record) for name in ("prompt", "completion")]
        if kinds[0] != kinds[1]:
            raise FieldError(record, "completion", expected=f"{kinds[0]}, as the prompt is", got=kinds[1])
        self._check_company(kinds[0], record)

    def _check_company(self, kind: Kind, record: str | None) -> None:
        """Checks what comes beside the parts."""
        needs = {"mask": "token ids", "candidates": "token ids", "tools": "messages"}
        for name, needed in needs.items():
            if getattr(self, name) is not None and kind != needed:
                raise FieldError(record, name, expected=f"none, as it goes with {needed}", got=f"one beside {kind}")
        if self.mask is not None:
            object.__setattr__(self, "mask", token_mask(self.mask, len(self.completion), "mask", record))
        if self.candidates is not None:
            checked = candidate_ids(self.candidates, len(self.completion), "candidates", record)
            object.__setattr__(self, "candidates", checked)
        if self.tools is not None:
            object.__setattr__(self, "tools", checked_tools(self.tools, record))

    @classmethod
    def from_messages(
        cls,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        tokenizer: Any = None,
        id: Id = None,
    ) -> "Rollout":
        """A chat in which every turn of the assistant's is the model's; what comes before the first one is the prompt.

        Args:
            messages: At least two of `{"role": ..., "content": ...}`.
            tools: The functions that the model may call, as the schemas that chat templates take.
            tokenizer: Renders and tokenises the chat right away, into token ids and their mask. None: the scorer's
                tokenizer does it later.
            id: The record's name.

        Raises:
            FieldError: There are fewer than two messages, one is malformed, the assistant's first message has nothing
                before it, or there is none. With a tokenizer: its chat template cannot render the chat.
        """
        record = record_of(id)
        if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence) or len(messages) < 2:
            expected = "a list of two messages or more, one of them the assistant's"
            raise FieldError(record, "messages", expected=expected, got=shown(messages))
        checked = checked_messages(messages, "messages", record)
        roles = [message["role"] for message in checked]
        if "assistant" not in roles:
            got = f"the roles {', '.join(map(repr, sorted(set(roles))))}"
            raise FieldError(record, "messages", expected="a message of the assistant's", got=got)
        if not (first := roles.index("assistant")):
            expected = "a message for the assistant to answer before its first one"
            raise FieldError(record, "messages", expected=expected, got="none")
        prompt, completion = checked[:first], checked[first:]
        rollout = cls(prompt, completion, id, tools=tools)
        if tokenizer is None:
            return rollout
        passage = chat_passage(Template(tokenizer, record or "chat", rollout.tools), prompt, completion)
        tokens = TextTokenizer(tokenizer).rendered(passage)
        count = tokens.prompt_length
        return cls(tokens.ids[:count], tokens.ids[count:], id, mask=tokens.mask)

    @property
    def kind(self) -> Kind:
        """How both parts are given."""
        return _kind(self.prompt)


def _normalise(rollout: Rollout, name: str, record: str | None) -> Kind:
    value = getattr(rollout, name)
    kind = _kind(value)
    if kind == "messages":
        value = checked_messages(value, name, record)
    elif kind == "token ids":
        value = token_ids(value, name, record)
    elif not value:
        raise FieldError(record, name, expected="text", got="an empty text")
    else:
        check_unicode(value, record, name)
    object.__setattr__(rollout, name, value)
    return kind


def _kind(value: object) -> Kind:
    if isinstance(value, str):
        return "text"
    is_messages = isinstance(value, list | tuple) and len(value) > 0 and isinstance(value[0], Mapping)
    return "messages" if is_messages else "token ids"
