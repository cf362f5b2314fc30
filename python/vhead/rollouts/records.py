"""Rollouts out of records: mappings from field names to what a file, a data set or a program has there."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vhead.errors import FieldError
from vhead.rollouts.arrays import token_ids
from vhead.rollouts.fields import (
    CANDIDATES,
    IDS,
    MASK,
    MESSAGES,
    PAIRS,
    SIDES,
    SIDES_OF_IDS,
    TEXT,
    TOOLS,
    Fields,
    checked_fields,
    listed,
    present_fields,
)
from vhead.rollouts.messages import checked_messages
from vhead.rollouts.rollout import Rollout
from vhead.rollouts.wording import named, shown

_EXPECTED_FIELDS = (
    "`prompt` and `completion`, or `prompt_ids` and `completion_ids`, or `messages`, or `chosen` and `rejected`"
)


def from_records(records: Iterable[Mapping[str, Any]], *, fields: Fields | None = None) -> Iterator[Rollout]:
    """The rollouts of any records: a Hugging Face data set, a list of dicts, `frame.to_dict("records")`.

    Args:
        records: Mappings with the fields that files have: `prompt` and `completion` (text or messages), `prompt_ids`
            and `completion_ids` (with `completion_mask` and `candidates`), or `messages`; `tools` and `id` beside them.
            A preference pair, `chosen` and `rejected`, gives both its rollouts, the chosen one first.
        fields: Columns that hold fields under other names, such as `{"prompt": "question"}`.

    Raises:
        ValueError: `fields` names a field that there is not.
        FieldError: A record does not hold a rollout; raised when its turn comes.
    """
    checked = {} if fields is None else checked_fields(fields)
    return (rollout for at, record in enumerate(records) for rollout in rollouts_of(record, f"record {at}", checked))


def rollouts_of(record: Mapping[str, Any], where: str, fields: Fields | None = None) -> tuple[Rollout, ...]:
    """The rollout in a record's fields, or the two of a preference pair; token ids where they are there.

    Raises:
        FieldError: A field is missing or holds something else; the error names `where`, the record's id and the column.
    """
    fields = fields or {}
    if not isinstance(record, Mapping):
        raise FieldError(where, "record", expected="a mapping from names to values", got=shown(record))
    id = _id(record.get(fields.get("id", "id")))
    try:
        return _rollouts(record, present_fields(record, fields), id)
    except FieldError as error:
        column = fields.get(error.field or "", error.field or "")
        raise FieldError(named(where, id), column, expected=error.expected, got=error.got) from None


def _id(value: object) -> str | float | None:
    """The record's id where it can name the record; any other is carried like every field that scoring ignores."""
    return value if isinstance(value, str | int | float) else None


def _rollouts(record: Mapping[str, Any], present: Mapping[str, Any], id: str | float | None) -> tuple[Rollout, ...]:
    if present.keys() >= set(IDS):
        return (_of_ids(present, id, IDS),)
    if not present.keys().isdisjoint(SIDES_OF_IDS):
        return _pair_of_ids(present, id)
    if present.keys() >= set(TEXT):
        return (_of_text(present, id, TEXT),)
    # Beside messages, a field that is called like one side may be anything.
    if present.keys() >= set(SIDES) or (MESSAGES not in present and not present.keys().isdisjoint(SIDES)):
        return _pair_of_text(present, id)
    if MESSAGES in present:
        return (Rollout.from_messages(_as_list(present[MESSAGES]), tools=_tools(present.get(TOOLS)), id=id),)
    for pair in PAIRS:
        if not present.keys().isdisjoint(pair):
            _check_both(present, pair)
    raise FieldError(None, "prompt", expected=_EXPECTED_FIELDS, got=f"the fields {listed(record)}")


def _check_both(present: Mapping[str, Any], pair: tuple[str, str]) -> None:
    """Checks that neither of two fields is there without the other."""
    for here, missing in (pair, pair[::-1]):
        if missing not in present:
            raise FieldError(None, missing, expected=f"the field that goes with `{here}`", got="nothing")


def _pair_of_ids(present: Mapping[str, Any], id: str | float | None) -> tuple[Rollout, ...]:
    _check_both(present, SIDES_OF_IDS)
    prompt = IDS[0]
    _check_both(present, (SIDES_OF_IDS[0], prompt))
    for name in (MASK, CANDIDATES):
        if name in present:
            expected = "none beside `chosen_ids` and `rejected_ids`, because it would be about one of them"
            raise FieldError(None, name, expected=expected, got="one")
    return tuple(_of_ids(present, id, (prompt, side)) for side in SIDES_OF_IDS)


def _pair_of_text(present: Mapping[str, Any], id: str | float | None) -> tuple[Rollout, ...]:
    _check_both(present, SIDES)
    sides = [_as_list(present[side]) for side in SIDES]
    if all(map(_is_chat, sides)):
        present = {**present, **_parted(_as_list(present.get("prompt")), sides)}
    elif "prompt" not in present:
        expected = "the text before `chosen` and `rejected`, because they do not tell where it ends"
        raise FieldError(None, "prompt", expected=expected, got="nothing")
    return tuple(_of_text(present, id, ("prompt", side)) for side in SIDES)


def _parted(prompt: Any, sides: Sequence[Any]) -> dict[str, Any]:
    """The prompt and both answers out of two chats, which are whole conversations or what follows a prompt."""
    chosen, rejected = (checked_messages(side, name, None) for side, name in zip(sides, SIDES, strict=True))
    # Each side keeps at least one message.
    most = min(len(chosen), len(rejected)) - 1
    common = next((at for at in range(most) if chosen[at] != rejected[at]), most)
    if prompt is None and not common:
        expected = "the messages before `chosen` and `rejected`, because these begin differently"
        raise FieldError(None, "prompt", expected=expected, got="nothing")
    if _is_chat(prompt):
        before = checked_messages(prompt, "prompt", None)
        common = len(before) if chosen[:common][: len(before)] == before else 0
    elif prompt is not None and prompt not in [message.get("content") for message in chosen[:common]]:
        expected = "messages, as `chosen` and `rejected` are, or the text of one with which both begin"
        raise FieldError(None, "prompt", expected=expected, got=shown(prompt))
    before = chosen[:common] if common else prompt
    return {"prompt": before, SIDES[0]: chosen[common:], SIDES[1]: rejected[common:]}


def _of_ids(present: Mapping[str, Any], id: str | float | None, names: tuple[str, str]) -> Rollout:
    prompt, completion = (token_ids(present[name], name) for name in names)
    try:
        return Rollout(prompt, completion, id, _mask(present.get(MASK)), present.get(CANDIDATES))
    except FieldError as error:
        field = MASK if error.field == "mask" else error.field
        raise FieldError(None, field or "", expected=error.expected, got=error.got) from None


def _of_text(present: Mapping[str, Any], id: str | float | None, names: tuple[str, str]) -> Rollout:
    parts = [_as_list(present[name]) for name in names]
    for name, part in zip(names, parts, strict=True):
        if not isinstance(part, str) and not _is_chat(part):
            expected = f"text or a list of messages (token ids go in `{name}_ids`)"
            raise FieldError(None, name, expected=expected, got=shown(part))
        if not part:
            raise FieldError(None, name, expected="text", got="an empty text")
    if isinstance(parts[0], str) and MASK in present:
        expected = "none beside text, because it goes with `prompt_ids` and `completion_ids`"
        raise FieldError(None, MASK, expected=expected, got="one")
    tools = _tools(present.get(TOOLS)) if _is_chat(parts[0]) else None
    try:
        return Rollout(parts[0], parts[1], id, tools=tools)
    except FieldError as error:
        field = names[1] if error.field == "completion" else error.field
        raise FieldError(None, field or "", expected=error.expected, got=error.got) from None


def _is_chat(part: object) -> bool:
    return isinstance(part, list | tuple) and bool(part) and isinstance(part[0], Mapping)


def _as_list(value: object) -> Any:
    """Data frames hold lists as arrays of objects."""
    return value.tolist() if isinstance(value, np.ndarray) and value.dtype == object else value


def _mask(value: object) -> object:
    """A mask as booleans: files hold 1 and 0 as well as true and false."""
    # A torch tensor, too, known by its methods so that torch need not be imported.
    items: Any = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(items, list | tuple) or all(type(item) is bool for item in items):
        return value
    for at, item in enumerate(items):
        if type(item) not in (bool, int) or item not in (0, 1):
            raise FieldError(None, MASK, expected="true and false, or 1 and 0", got=f"{shown(item)} at position {at}")
    return [bool(item) for item in items]


def _tools(value: object) -> Any:
    """Tools as a list; data sets often hold them as a JSON text, since their schemas differ from record to record."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError):
            raise FieldError(
                None, TOOLS, expected="a list of function schemas, or one as JSON", got=shown(value)
            ) from None
    value = _as_list(value)
    # A list without any is what a data set has where a record has none.
    return value if value or not isinstance(value, list) else None
