"""Files of rollouts and of scores: which format a name means, and writing that never leaves half a file behind."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol, Self

from vhead.errors import FileFormatError
from vhead.scoring.jsonl import JsonlReader, JsonlWriter
from vhead.scoring.rows import Row
from vhead.scoring.scores import Scores

STANDARD_STREAM = "-"
FORMATS = (".jsonl", ".parquet")


class Reader(Protocol):
    """The records of a file, in order; `size` in the units of `Row.position`, None when unknown."""

    size: int | None

    def __iter__(self) -> Iterator[Row]: ...

    def close(self) -> None:
        """Lets go of the file."""


class Writer(Protocol):
    """Records and their scores, into a stream."""

    def write(self, rows: Sequence[Row], scores: Scores) -> None:
        """Appends records with their scores."""

    def finish(self, *, complete: bool) -> None:
        """Makes what was written a readable file; writes nothing if nothing was and more was to come."""


def format_of(name: str) -> str:
    """The format that a file name means: its suffix, or `.jsonl` for `-`.

    Raises:
        FileFormatError: The suffix names no format.
    """
    suffix = ".jsonl" if name == STANDARD_STREAM else Path(name).suffix.lower()
    if suffix not in FORMATS:
        raise FileFormatError(f"{name}: expected a name that ends in {' or '.join(FORMATS)}, or `-`, got {suffix!r}")
    return suffix


def open_reader(name: str, reserved: tuple[str, ...] = ()) -> Reader:
    """A reader for a file, or for standard input as JSON Lines when `name` is `-`.

    Args:
        name: A file name or `-`.
        reserved: Names of columns that the input may not have, as the scores will take them.

    Raises:
        FileFormatError: The suffix names no format, or the file does not hold it.
        OSError: The file cannot be opened.
        MissingExtraError: pyarrow is needed and not installed.
    """
    if format_of(name) == ".parquet":
        from vhead.scoring.parquet import ParquetReader  # noqa: PLC0415, pyarrow only when used

        return ParquetReader(Path(name), reserved)
    if name == STANDARD_STREAM:
        return JsonlReader(sys.stdin.buffer, None, reserved)
    return JsonlReader(Path(name).open("rb"), Path(name).stat().st_size, reserved)


class OutputFile:
    """A file of scores that appears under its own name only when it is complete.

    Until then it grows as `NAME.partial` beside it; when writing stops early that part stays, complete up to the last
    records written. `-` is standard output, as JSON Lines.

    Raises:
        FileFormatError: The suffix names no format.
        OSError: The file cannot be created.
        MissingExtraError: pyarrow is needed and not installed.
    """

    def __init__(self, name: str) -> None:
        suffix = format_of(name)
        self.path = None if name == STANDARD_STREAM else Path(name)
        self.partial = None if self.path is None else self.path.with_name(f"{self.path.name}.partial")
        if suffix == ".parquet":
            from vhead.scoring.parquet import ParquetWriter  # noqa: PLC0415, pyarrow only when used

            make: Callable[[BinaryIO], Writer] = ParquetWriter
        else:
            make = JsonlWriter
        self._stream: BinaryIO = sys.stdout.buffer if self.partial is None else self.partial.open("wb")
        self._writer = make(self._stream)

    def write(self, rows: Sequence[Row], scores: Scores) -> None:
        """Appends records with their scores."""
        self._writer.write(rows, scores)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        complete = kind is None
        try:
            self._writer.finish(complete=complete)
            self._stream.flush()
            if complete and self.partial is not None:
                os.fsync(self._stream.fileno())
        except BaseException:
            complete = False
            raise
        finally:
            self._release(complete=complete)

    def _release(self, *, complete: bool) -> None:
        if self.partial is None or self.path is None:
            return
        # On a full disk closing fails as writing did, and writing's is the error to report.
        with suppress(OSError):
            self._stream.close()
        if complete:
            self.partial.replace(self.path)
        elif not self.partial.stat().st_size:
            self.partial.unlink()
