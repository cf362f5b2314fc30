"""Reads rollouts from JSON Lines."""

import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, BinaryIO

from vhead.errors import FieldError, VheadError, naming
from vhead.rollouts.fields import Fields
from vhead.rollouts.files.rows import Row, chained, check_reserved
from vhead.rollouts.records import rollouts_of
from vhead.rollouts.rollout import Rollout
from vhead.rollouts.wording import shown

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# A line is held in memory as a whole; no rollout is as long as this.
LONGEST_LINE = 256 * 2**20
# No float has more decimal digits than these, before zeros follow.
_DIGITS_OF_FLOATS = 767
_ZERO = re.compile(r"-?[0.]+([eE].*)?")


@dataclass(frozen=True, slots=True)
class JsonRow:
    """One line; it is parsed when its rollout is asked for, so that a broken line harms no other.

    Attributes:
        line: Its bytes, or its beginning where it is longer than a line may be.
        number: Its place among all lines.
        count: Its place among those that are not blank.
        position: Bytes of the file up to the line's end; of a compressed one, those that were read.
        chain: The digest of all records up to this one.
        reserved: Names of columns that it may not have.
        replaces: Whether it loses these columns instead.
        fields: Columns that hold fields under other names.
        replaced: Takes the names of columns that it lost.
    """

    line: bytes
    number: int
    count: int
    position: int
    chain: bytes
    reserved: tuple[str, ...] = ()
    replaces: bool = False
    fields: Fields | None = None
    replaced: set[str] = field(default_factory=set)

    @property
    def where(self) -> str:
        return f"line {self.number}"

    @property
    def digest(self) -> str:
        """A short text that stands for all records up to this one."""
        return self.chain.hex()

    def rollouts(self) -> tuple[Rollout, ...]:
        """What is to be scored; `RecordError` when the line is not a JSON object that holds a rollout or a pair."""
        record = self._parsed()
        if self.replaces:
            self.replaced.update(record.keys() & set(self.reserved))
        else:
            check_reserved(record, self.reserved, self.where)
        return rollouts_of(record, self.where, self.fields)

    def json_object(self) -> str:
        """The line as it came: numbers, key order and unknown fields survive to the byte."""
        # Between two members it is white space, and to many readers the end of a line.
        text = self.line.decode().strip().replace("\r", " ")
        if not self.replaces or self._parsed().keys().isdisjoint(self.reserved):
            return text
        try:
            return _without(text, self.reserved)
        except RecursionError:
            raise self._too_deep() from None

    def columns(self) -> dict[str, Any]:
        """The members of the line's JSON object.

        Raises:
            FieldError: The line is not UTF-8 or not a JSON object, or has a number that no float holds.
        """
        record = self._parsed(exact=True)
        return {name: record[name] for name in record if not self.replaces or name not in self.reserved}

    def members(self, names: Iterable[str]) -> dict[str, Any]:
        """Those of these members that the line's JSON object has.

        Raises:
            FieldError: The line is not UTF-8 or not a JSON object.
        """
        record = self._parsed()
        return {name: record[name] for name in names if name in record}

    def _parsed(self, *, exact: bool = False) -> dict[str, Any]:
        if len(self.line) >= LONGEST_LINE:
            expected = f"a line of less than {LONGEST_LINE:,} bytes"
            raise FieldError(self.where, "text", expected=expected, got="a longer one")
        try:
            record = json.loads(
                self.line.decode(),
                parse_float=_held if exact else None,
                object_pairs_hook=_unique if exact else None,
            )
        except UnicodeDecodeError as error:
            raise FieldError(
                self.where, "text", expected="UTF-8", got=f"{error.reason} at byte {error.start}"
            ) from None
        except _UnheldNumberError as error:
            raise self._unheld(error) from None
        except _DoubledNameError as error:
            expected = "each name once, as Parquet has one value for it"
            raise FieldError(self.where, "text", expected=expected, got=f"{error.args[0]!r} twice") from None
        except ValueError as error:
            raise FieldError(self.where, "text", expected="a JSON object", got=self._broken(error)) from None
        except RecursionError:
            raise self._too_deep() from None
        if not isinstance(record, dict):
            raise FieldError(self.where, "text", expected="a JSON object", got=shown(record))
        return record

    def _unheld(self, error: "_UnheldNumberError") -> FieldError:
        """Names the field, which a parser of numbers isn't told."""
        marked = json.loads(self.line.decode(), parse_float=_Digits)
        members = marked.items() if isinstance(marked, dict) else ()
        name = next((name for name, value in members if _holds(value, error.digits)), "text")
        return FieldError(self.where, name, expected=error.expected, got=shown(error.digits))

    def _too_deep(self) -> FieldError:
        return FieldError(self.where, "text", expected="a JSON object", got="one nested too deeply")

    def _broken(self, error: ValueError) -> str:
        if not isinstance(error, json.JSONDecodeError):
            # Python reads no longer ones, as the time for that grows with the square of their length.
            return f"one with a whole number of more than {sys.get_int_max_str_digits():,} digits"
        if not self.line.endswith(b"\n"):
            return "only half of one, because the file ends in the middle of this line"
        # The line's end is white space to JSON, so that a line that stops short is faulted on the next one.
        column = min(error.pos, len(error.doc.rstrip())) + 1
        return f"broken JSON at column {column} ({error.msg})"


class JsonlReader:
    """The records of a JSON Lines stream, one at a time; blank lines are no records.

    Args:
        stream: Opened for reading bytes, with a name; closed by `close`.
        size: Bytes in all, where that is known.
        reserved: Names of columns that the scores will take, so that no record may have them.
        replaces: Whether records lose such columns instead.
        fields: Columns that hold fields under other names.
        position: Tells how much of the file has been read, where that is not the length of the lines.

    Attributes:
        schema: None: what columns there are is known when the last record is read.
        replaced: Names of columns that records lost so far.
    """

    schema = None

    def __init__(
        self,
        stream: BinaryIO,
        size: int | None = None,
        reserved: tuple[str, ...] = (),
        *,
        replaces: bool = False,
        fields: Fields | None = None,
        position: Callable[[], int] | None = None,
    ) -> None:
        self._stream = stream
        self.size = size
        self._reserved = reserved
        self._replaces = replaces
        self._fields = fields
        self._position = position
        self.replaced: set[str] = set()

    def __iter__(self) -> Iterator[Row]:
        position = count = 0
        chain = b""
        for number, (line, length) in enumerate(self._lines(), start=1):
            position = position + length if self._position is None else self._position()
            text = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
            content = text.strip()
            # Of a line that is too long, only the beginning is known to be blank.
            if content or length >= LONGEST_LINE:
                count, chain = count + 1, chained(chain, content)
                options = self._reserved, self._replaces, self._fields, self.replaced
                yield JsonRow(text, number, count, position, chain, *options)

    def _lines(self) -> Iterator[tuple[bytes, int]]:
        """Each line and its length; of one that is too long, the beginning."""
        while line := self._piece():
            length, end = len(line), line
            while len(end) == LONGEST_LINE and not end.endswith(b"\n"):
                end = self._piece()
                length += len(end)
            yield line, length

    def _piece(self) -> bytes:
        with naming(getattr(self._stream, "name", "input")):
            return self._stream.readline(LONGEST_LINE)

    def close(self) -> None:
        self._stream.close()


class _DoubledNameError(VheadError, ValueError):
    """A name that an object has twice."""


class _UnheldNumberError(VheadError, ValueError):
    """A number that no 64-bit float holds: they call it infinite or zero, or round digits away."""

    def __init__(self, expected: str, digits: str) -> None:
        super().__init__(expected, digits)
        self.expected, self.digits = expected, digits


class _Digits(str):
    """A number as it was written."""

    __slots__ = ()


def _unique(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """Parquet has one value for a name, and no way to keep the others."""
    found = dict(members)
    if len(found) < len(members):
        names = [name for name, _ in members]
        raise _DoubledNameError(next(name for name in names if names.count(name) > 1))
    return found


def _held(digits: str) -> float:
    """The float of which `digits` are the first ones, rounded: then nothing that was written is lost."""
    number = float(digits)
    if repr(number) == digits or _ZERO.fullmatch(digits):
        return number
    if number in (0.0, math.inf, -math.inf):
        raise _UnheldNumberError("numbers within the range of 64-bit floats, because Parquet has no others", digits)
    written = len(re.split("[eE]", digits)[0].replace(".", "").lstrip("-0"))
    if Decimal(f"{number:.{min(written, _DIGITS_OF_FLOATS) - 1}e}") != Decimal(digits):
        expected = "a number whose digits a 64-bit float holds, because Parquet has no others (JSON Lines keeps any)"
        raise _UnheldNumberError(expected, digits)
    return number


def _holds(value: Any, digits: str) -> bool:
    if isinstance(value, dict | list):
        return any(_holds(item, digits) for item in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, _Digits) and value == digits


def _without(text: str, names: tuple[str, ...]) -> str:
    """A JSON object without some of its members, the others as they came."""
    decoder, kept = json.JSONDecoder(), []
    start = _next(text, 1)
    while text[start] != "}":
        name, end = decoder.raw_decode(text, start)
        _, end = decoder.raw_decode(text, _next(text, _next(text, end) + 1))
        if name not in names:
            kept.append(text[start:end])
        start = _next(text, end)
        start = _next(text, start + 1) if text[start] == "," else start
    return f"{{{', '.join(kept)}}}"


def _next(text: str, start: int) -> int:
    """The first place from `start` on that is not white space."""
    while text[start] in " \t\r\n":
        start += 1
    return start
