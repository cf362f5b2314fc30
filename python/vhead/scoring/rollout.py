"""What is scored: a prompt and one completion of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vhead.errors import FieldError

Message = Mapping[str, Any]
# Text, messages or token ids; `Any` stands for torch's tensors, as this module works without torch.
Part = str | Sequence[int] | Sequence[Message] | NDArray[np.integer[Any]] | Any
Kind = Literal["text", "token ids", "messages"]

_SHOWN = 40


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """A prompt and one completion of it, both as text, both as token ids, or both as chat messages.

    Token ids come as a list, a numpy array or a torch tensor of integers `[P]` and `[C]`, and are kept as read-only
    int64 arrays. Text is tokenised when it is scored: the prompt with the special tokens that the tokenizer puts in
    front of a text, the completion with none, so that the border between the two is a border between tokens.

    Raises:
        FieldError: A part is empty, of the wrong type or shape, or the parts are of different kinds.
    """

    prompt: Part
    completion: Part
    id: str | int | None = None

    def __post_init__(self) -> None:
        if self.id is not None and (isinstance(self.id, bool) or not isinstance(self.id, str | int)):
            raise FieldError(None, "id", expected="text, an integer or None", got=shown(self.id))
        record = None if self.id is None else f"record {self.id!r}"
        kinds = [_normalise(self, name, record) for name in ("prompt", "completion")]
        if kinds[0] != kinds[1]:
            raise FieldError(record, "completion", expected=f"{kinds[0]}, as the prompt is", got=kinds[1])

    @classmethod
    def from_messages(cls, messages: Sequence[Message], id: str | int | None = None) -> "Rollout":  # noqa: A002
        """A chat whose last message, the assistant's, is the completion; the model's chat template renders it.

        Args:
            messages: At least two of `{"role": ..., "content": ...}`.
            id: The record's name.

        Raises:
            FieldError: There are fewer than two messages, one is malformed, or the last is not the assistant's.
        """
        record = None if id is None else f"record {id!r}"
        if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence) or len(messages) < 2:
            raise FieldError(record, "messages", expected="a list of two messages or more", got=shown(messages))
        checked = _messages(messages, "messages", record)
        if checked[-1]["role"] != "assistant":
            raise FieldError(
                record, "messages", expected="the assistant's as the last message", got=f"role {checked[-1]['role']!r}"
            )
        return cls(checked[:-1], checked[-1:], id)

    @property
    def kind(self) -> Kind:
        """How both parts are given."""
        return _kind(self.prompt)


def shown(value: object) -> str:
    """A value in an error message: short, with its type where the text does not show it."""
    if value is None:
        return "nothing"
    if isinstance(value, str | bytes | list | tuple | dict) and not value:
        return f"an empty {type(value).__name__}"
    text = repr(value)
    text = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    return f"{text} ({type(value).__name__})"


def token_ids(value: object, field: str, record: str | int | None = None) -> NDArray[np.int64]:
    """Token ids as a read-only int64 array `[N]`, N >= 1, none negative.

    Raises:
        FieldError: `value` is anything else.
    """
    array = _integer_array(value)
    if array is None:
        raise FieldError(record, field, expected="text or a flat list of integer token ids", got=shown(value))
    if array.ndim != 1:
        raise FieldError(record, field, expected="token ids of shape [N]", got=f"shape {list(array.shape)}")
    if array.size == 0:
        raise FieldError(record, field, expected="at least one token", got="none")
    if array.min() < 0:
        at = int(array.argmin())
        raise FieldError(record, field, expected="token ids >= 0", got=f"{array[at]} at position {at}")
    array.flags.writeable = False
    return array


def _integer_array(value: object) -> NDArray[np.int64] | None:
    if type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    if not isinstance(value, list | tuple | range | np.ndarray):
        return None
    try:
        array = np.asarray(value) if len(value) else np.empty(0, np.int64)
    except (ValueError, TypeError, OverflowError):
        return None
    return np.array(array, dtype=np.int64) if array.dtype.kind in "iu" else None


def _normalise(rollout: Rollout, name: str, record: str | None) -> Kind:
    value = getattr(rollout, name)
    kind = _kind(value)
    if kind == "messages":
        value = _messages(value, name, record)
    elif kind == "token ids":
        value = token_ids(value, name, record)
    elif not value:
        raise FieldError(record, name, expected="text", got="an empty text")
    object.__setattr__(rollout, name, value)
    return kind


def _kind(value: object) -> Kind:
    if isinstance(value, str):
        return "text"
    is_messages = isinstance(value, list | tuple) and len(value) > 0 and isinstance(value[0], Mapping)
    return "messages" if is_messages else "token ids"


def _messages(value: Sequence[Message], field: str, record: str | None) -> tuple[Message, ...]:
    for position, message in enumerate(value):
        well_formed = isinstance(message, Mapping) and isinstance(message.get("role"), str)
        if not well_formed or not isinstance(message.get("content"), str):
            raise FieldError(
                record,
                field,
                expected="messages with a text `role` and a text `content`",
                got=f"{shown(message)} at position {position}",
            )
    return tuple(value)
