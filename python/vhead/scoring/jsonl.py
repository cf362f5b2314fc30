"""JSON Lines in and out."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vhead.errors import FieldError
from vhead.scoring.rollout import Rollout, shown
from vhead.scoring.rows import Row, check_reserved, digest_of, rollout_of
from vhead.scoring.scores import PER_TOKEN, Score, Scores

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class JsonRow:
    """One line; it is parsed when its rollout is asked for, so that a broken line harms no other."""

    line: bytes
    number: int
    position: int
    reserved: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The record's place in the file."""
        return f"line {self.number}"

    def rollout(self) -> Rollout:
        """What is to be scored; `RecordError` when the line is not a JSON object that holds a rollout."""
        record = self.columns()
        check_reserved(record, self.reserved, self.where)
        return rollout_of(record, self.where)

    def json_object(self) -> str:
        """The line as it came: numbers, key order and unknown fields survive to the byte."""
        return self.line.decode().strip()

    def columns(self) -> dict[str, Any]:
        """The parsed line.

        Raises:
            FieldError: The line is not UTF-8 or not a JSON object.
        """
        try:
            record = json.loads(self.line.decode())
        except UnicodeDecodeError as error:
            raise FieldError(
                self.where, "text", expected="UTF-8", got=f"{error.reason} at byte {error.start}"
            ) from None
        except ValueError as error:
            raise FieldError(self.where, "text", expected="a JSON object", got=self._broken(error)) from None
        except RecursionError:
            raise FieldError(self.where, "text", expected="a JSON object", got="one nested too deeply") from None
        if not isinstance(record, dict):
            raise FieldError(self.where, "text", expected="a JSON object", got=shown(record))
        return record

    def digest(self) -> str:
        """A short text that two different records do not have in common."""
        return digest_of(self.line.strip())

    def _broken(self, error: ValueError) -> str:
        if not self.line.endswith(b"\n"):
            return "half of one: the file ends in the middle of the line"
        if not isinstance(error, json.JSONDecodeError):
            return f"broken JSON ({error})"
        # The line's end is white space to JSON, so that a line that stops short is faulted on the next one.
        column = min(error.pos, len(error.doc.rstrip())) + 1
        return f"broken JSON at column {column} ({error.msg})"


class JsonlReader:
    """The records of a JSON Lines stream, one at a time; blank lines are no records.

    Args:
        stream: Opened for reading bytes; closed by `close`.
        size: Bytes in all, where that is known.
        reserved: Names of columns that the scores will take, so that no record may have them.
    """

    def __init__(self, stream: BinaryIO, size: int | None = None, reserved: tuple[str, ...] = ()) -> None:
        self._stream = stream
        self.size = size
        self._reserved = reserved

    def __iter__(self) -> Iterator[Row]:
        position = 0
        for number, line in enumerate(self._stream, start=1):
            position += len(line)
            text = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
            if text.strip():
                yield JsonRow(text, number, position, self._reserved)

    def close(self) -> None:
        """Closes the stream."""
        self._stream.close()


class JsonlWriter:
    """Writes each record as it came with the scores behind it, one line per record.

    Floats are written with nine significant digits, which is enough to read the same float32 back.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def write(self, rows: Sequence[Row], scores: Scores) -> None:
        """Appends one line per record and hands them to the operating system."""
        columns = scores.columns
        for row, score in zip(rows, scores, strict=True):
            record = row.json_object()
            self._stream.write(f"{record[:-1].rstrip()}, {_members(score, columns)}}}\n".encode())
        self._stream.flush()

    def publish(self, grown: Path, path: Path) -> None:
        """The lines are complete as they are."""
        grown.replace(path)


def _members(score: Score, names: tuple[str, ...]) -> str:
    """The scores as members of a JSON object."""
    return ", ".join(f'"{name}": {_number_or_list(getattr(score, name), name)}' for name in names)


def _number_or_list(value: Any, name: str) -> str:  # noqa: ANN401, one of two array-like types by name
    if isinstance(value, bool):
        return "true" if value else "false"
    if name not in PER_TOKEN:
        return f"{value:.9g}"
    return f"[{('%.9g, ' * len(value) % tuple(value.tolist()))[:-2]}]"
