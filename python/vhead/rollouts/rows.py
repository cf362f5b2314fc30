"""Records of a file: which of their fields make a rollout, and what the input had up to each of them."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from vhead.errors import FieldError
from vhead.rollouts.arrays import token_ids
from vhead.rollouts.rollout import Rollout
from vhead.rollouts.wording import named, shown

PAIRS = (("prompt_ids", "completion_ids"), ("prompt", "completion"))
MESSAGES = "messages"
INPUT_FIELDS = ("id", MESSAGES, *(name for pair in PAIRS for name in pair))

_EXPECTED_FIELDS = "`prompt` and `completion`, or `prompt_ids` and `completion_ids`, or `messages`"


class Row(Protocol):
    """One record of an input file."""

    @property
    def where(self) -> str:
        """The record's place in the file, such as `line 12`."""

    @property
    def count(self) -> int:
        """How many records the file has up to this one, broken ones included."""

    @property
    def position(self) -> int:
        """How much of the file is read with this record, in the units of the reader's `size`."""

    @property
    def digest(self) -> str:
        """A short text that stands for all records up to this one: another record, or another order, gives another."""

    def rollout(self) -> Rollout:
        """What is to be scored.

        Raises:
            RecordError: The record does not hold a rollout.
        """

    def json_object(self) -> str:
        """The whole record as one JSON object without a line break.

        Raises:
            FieldError: A field holds what JSON cannot.
        """

    def columns(self) -> dict[str, Any]:
        """The whole record as Python objects.

        Raises:
            FieldError: A field holds what Python cannot.
        """

    def fields(self, names: Iterable[str]) -> dict[str, Any]:
        """Those of these fields that the record has, read fast: numbers as they come, or arrays of them.

        Raises:
            FieldError: The record or a field cannot be read.
        """


def chained(before: bytes, record: bytes) -> bytes:
    """The digest of all records up to one, from the digest of those before it."""
    return hashlib.sha256(before + record).digest()


def rollout_of(record: Mapping[str, Any], where: str) -> Rollout:
    """The rollout in a record's fields: token ids where both are there, else text, else messages.

    Raises:
        FieldError: A field is missing or holds something else; the error names `where` and the record's id.
    """
    try:
        return _rollout(record)
    except FieldError as error:
        raise error.of(named(where, _id(record))) from None


def check_reserved(names: Iterable[str], reserved: Iterable[str], where: str | None) -> None:
    """Scores never overwrite a column that came with the input unless they are asked to.

    Raises:
        FieldError: A column of the input has one of the reserved names.
    """
    for name in sorted(set(names) & set(reserved)):
        raise FieldError(
            where,
            name,
            expected="no such column in the input, because the scores go there",
            got="one; give the new columns other names with --suffix, or replace the input's with --overwrite",
        )


def _id(record: Mapping[str, Any]) -> str | float | None:
    """The record's id where it can name the record; any other is carried like every field that scoring ignores."""
    value = record.get("id")
    return value if isinstance(value, str | int | float) else None


def _rollout(record: Mapping[str, Any]) -> Rollout:
    present = {name for name in INPUT_FIELDS if record.get(name) is not None}
    for first, second in PAIRS:
        if {first, second} <= present:
            return _pair(record, first, second)
    if MESSAGES in present:
        return Rollout.from_messages(record[MESSAGES], id=_id(record))
    for first, second in PAIRS:
        for here, missing in ((first, second), (second, first)):
            if here in present:
                raise FieldError(None, missing, expected=f"the field that goes with `{here}`", got="nothing")
    raise FieldError(None, "prompt", expected=_EXPECTED_FIELDS, got=f"the fields {_listed(record)}")


def _pair(record: Mapping[str, Any], first: str, second: str) -> Rollout:
    for name in (first, second):
        if name.endswith("_ids"):
            token_ids(record[name], name)
        elif not isinstance(record[name], str):
            raise FieldError(None, name, expected=f"text (token ids go in `{name}_ids`)", got=shown(record[name]))
        elif not record[name]:
            raise FieldError(None, name, expected="text", got="an empty text")
    return Rollout(record[first], record[second], _id(record))


def _listed(names: Iterable[str]) -> str:
    """The first few names, each cut where it is long."""
    first, *others = sorted(names) or ["none"]
    listed = ", ".join(name[:40] for name in (first, *others[:9]))
    return listed if len(others) < 10 else f"{listed} and {len(others) - 9:,} more"
