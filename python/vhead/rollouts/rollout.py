"""What is scored: a prompt and one completion of it."""

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vhead.errors import FieldError

Message = Mapping[str, Any]
# Text, messages or token ids; `Any` stands for torch's tensors, as this module works without torch.
Part = str | Sequence[int] | Sequence[Message] | NDArray[np.integer[Any]] | Any
Kind = Literal["text", "token ids", "messages"]

Id = str | int | float | None

_SHOWN = 40


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """A prompt and one completion of it, both as text, both as token ids, or both as chat messages.

    Token ids come as a list, a numpy array or a torch tensor of integers `[P]` and `[C]`, and are kept as read-only
    int64 arrays. Text is tokenised when it is scored, both parts as one text: a token across the border between them is
    the completion's.

    Raises:
        FieldError: A part is empty, of the wrong type or shape, or the parts are of different kinds.
    """

    prompt: Part
    completion: Part
    id: Id = None

    def __post_init__(self) -> None:
        if self.id is not None and not isinstance(self.id, str | int | float):
            raise FieldError(None, "id", expected="text, a number, a boolean or None", got=shown(self.id))
        record = _record(self.id)
        kinds = [_normalise(self, name, record) for name in ("prompt", "completion")]
        if kinds[0] != kinds[1]:
            raise FieldError(record, "completion", expected=f"{kinds[0]}, as the prompt is", got=kinds[1])

    @classmethod
    def from_messages(cls, messages: Sequence[Message], id: Id = None) -> "Rollout":
        """A chat whose last message, the assistant's, is the completion; the model's chat template renders it.

        Args:
            messages: At least two of `{"role": ..., "content": ...}`.
            id: The record's name.

        Raises:
            FieldError: There are fewer than two messages, one is malformed, or the last is not the assistant's.
        """
        record = _record(id)
        if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence) or len(messages) < 2:
            raise FieldError(record, "messages", expected="a list of two messages or more", got=shown(messages))
        checked = _messages(messages, "messages", record)
        if checked[-1]["role"] != "assistant":
            raise FieldError(
                record,
                "messages",
                expected="the last message to be the assistant's",
                got=f"role {checked[-1]['role']!r}",
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
    return f"{_short(value, _SHOWN)} ({type(value).__name__})"


def named(where: str, id: Id) -> str:
    """What errors call a record: its place in the input, and its id where it has one."""
    return where if id is None else f"{where} (id {_short(id, 2 * _SHOWN)})"


def _record(id: Id) -> str | None:
    return None if id is None else f"record {_short(id, 2 * _SHOWN)}"


def _short(value: object, length: int) -> str:
    """The beginning of a value's `repr`, of which no more is made than is shown, however large or deep it is."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother, short.maxlong = 4, 2 * length, 2 * length, 2 * length
    text = short.repr(value)
    return text if len(text) <= length else f"{text[:length]}..."


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


def _check_unicode(text: str, record: str | None, field: str) -> None:
    """Half of a surrogate pair is no text, and tokenizers raise what they like at one; JSON can write it."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        got = f"half of a surrogate pair at character {error.start}"
        raise FieldError(record, field, expected="text that Unicode can hold", got=got) from None


def _is_bool(item: object) -> bool:
    """Also as an array or a tensor of its own."""
    return isinstance(item, bool | np.bool_) or str(getattr(item, "dtype", "")) in ("bool", "torch.bool")


def _integer_array(value: object) -> NDArray[np.int64] | None:
    try:
        if type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "detach"):
            value = value.detach().cpu().numpy()
        # What a mask hides would be there again.
        if not isinstance(value, list | tuple | range | np.ndarray) or isinstance(value, np.ma.MaskedArray):
            return None
        # Among integers, numpy takes True as 1.
        if isinstance(value, list | tuple) and any(_is_bool(item) for item in value if type(item) is not int):
            return None
        array = np.asarray(value) if len(value) else np.empty(0, np.int64)
    except (ValueError, TypeError, OverflowError, RuntimeError):
        return None
    if array.dtype.kind not in "iu" or (array.size and array.max() > np.iinfo(np.int64).max):
        return None
    return np.array(array, dtype=np.int64)


def _normalise(rollout: Rollout, name: str, record: str | None) -> Kind:
    value = getattr(rollout, name)
    kind = _kind(value)
    if kind == "messages":
        value = _messages(value, name, record)
    elif kind == "token ids":
        value = token_ids(value, name, record)
    elif not value:
        raise FieldError(record, name, expected="text", got="an empty text")
    else:
        _check_unicode(value, record, name)
    object.__setattr__(rollout, name, value)
    return kind


def _kind(value: object) -> Kind:
    if isinstance(value, str):
        return "text"
    is_messages = isinstance(value, list | tuple) and len(value) > 0 and isinstance(value[0], Mapping)
    return "messages" if is_messages else "token ids"


def _messages(value: Sequence[Message], field: str, record: str | None) -> tuple[Message, ...]:
    checked = []
    for position, message in enumerate(value):
        # Parquet gives every message every key, null where it has none; a template would take that for a value.
        present = _present(message)
        if present.get("tool_calls"):
            # A call needs no words, and templates want text.
            present.setdefault("content", "")
        if not isinstance(present.get("role"), str) or not isinstance(present.get("content"), str):
            raise FieldError(
                record,
                field,
                expected="messages with a text `role` and a text `content`, or with `tool_calls`",
                got=f"{shown(message)} at position {position}",
            )
        for text in _texts(message):
            _check_unicode(text, record, field)
        checked.append(present)
    return tuple(checked)


def _present(message: object) -> dict[str, Any]:
    return {key: value for key, value in message.items() if value is not None} if isinstance(message, Mapping) else {}


def _texts(value: object) -> Iterator[str]:
    """Every text in a value, however deep: a chat template may use any of them."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, Mapping):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            waiting += item
