"""Records of a file: what each of them can be asked, and what the input had up to it."""

import hashlib
from collections.abc import Iterable
from typing import Any, Protocol

from vhead.errors import FieldError
from vhead.rollouts.rollout import Rollout


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

    def rollouts(self) -> tuple[Rollout, ...]:
        """What is to be scored: one rollout, or the chosen and the rejected one of a preference pair.

        Raises:
            RecordError: The record holds neither.
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

    def members(self, names: Iterable[str]) -> dict[str, Any]:
        """Those of these fields that the record has, read fast: numbers as they come, or arrays of them.

        Raises:
            FieldError: The record or a field cannot be read.
        """


def chained(before: bytes, record: bytes) -> bytes:
    """The digest of all records up to one, from the digest of those before it."""
    return hashlib.sha256(before + record).digest()


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
