"""Files of rollouts and of scores: which format a name means, and writing that never leaves half a file behind."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol, Self

from vhead.errors import FileFormatError, ResumeError
from vhead.scoring.journal import Journal
from vhead.scoring.jsonl import JsonlReader, JsonlWriter
from vhead.scoring.rows import Row
from vhead.scoring.scores import Scores

STANDARD_STREAM = "-"
FORMATS = (".jsonl", ".parquet")

# What a run that is killed has to compute again.
_SECONDS_BETWEEN_NOTES = 1.0


class Reader(Protocol):
    """The records of a file, in order; `size` in the units of `Row.position`, None when unknown."""

    size: int | None

    def __iter__(self) -> Iterator[Row]: ...

    def close(self) -> None:
        """Lets go of the file."""


class Writer(Protocol):
    """Records and their scores, into a file that grows."""

    def write(self, rows: Sequence[Row], scores: Scores) -> None:
        """Appends records with their scores."""

    def publish(self, grown: Path, path: Path) -> None:
        """Makes the complete file of what was appended, under its own name."""


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

    Until then it grows as `NAME.partial` beside it, which for Parquet is a sequence of Arrow streams; when writing
    stops early that part stays, complete up to the last records written. `-` is standard output, as JSON Lines.

    Args:
        name: A file name or `-`.
        settings: What the scores depend on. With them, `NAME.partial.json` notes how far the output has come, so that
            another run can go on; None: nothing is noted.
        resume: Whether to go on where an earlier run stopped, if there is one.

    Attributes:
        done: What an earlier run has finished, or None.

    Raises:
        FileFormatError: The suffix names no format.
        ResumeError: An earlier run left a part and `resume` is False, or it cannot be gone on with.
        OSError: The file cannot be created.
        MissingExtraError: pyarrow is needed and not installed.
    """

    def __init__(self, name: str, *, settings: Mapping[str, object] | None = None, resume: bool = False) -> None:
        suffix = format_of(name)
        self.path = None if name == STANDARD_STREAM else Path(name)
        self.partial = None if self.path is None else self.path.with_name(f"{self.path.name}.partial")
        self._settings = settings
        self._notes = None if self.partial is None else self.partial.with_name(f"{self.partial.name}.json")
        self._noted_at = -_SECONDS_BETWEEN_NOTES
        self._unnoted: Journal | None = None
        self.done = self._earlier(resume=resume)
        make = _maker(suffix, self.partial if self.done else None)
        self._stream = self._open()
        self._writer = make(self._stream)

    def write(self, rows: Sequence[Row], scores: Scores, records: int | None = None) -> None:
        """Appends records with their scores.

        Args:
            rows: The records.
            scores: Their scores.
            records: How many of the input's records are done with these; None: not noted.
        """
        self._writer.write(rows, scores)
        if self._settings is not None and self._notes is not None and records is not None and rows:
            self._stream.flush()
            self._unnoted = Journal(self._settings, records, rows[-1].digest(), self._stream.tell())
            if time.monotonic() - self._noted_at >= _SECONDS_BETWEEN_NOTES:
                self._note()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        complete = False
        try:
            self._stream.flush()
            self._note()
            complete = kind is None
        finally:
            self._release(complete=complete)

    def _earlier(self, *, resume: bool) -> Journal | None:
        if self._settings is None or self._notes is None or self.partial is None:
            return None
        journal = Journal.load(self._notes)
        if journal is None:
            return None
        if not resume:
            raise ResumeError(
                f"{self.partial}: an earlier run finished {journal.records:,} records: go on with it (--resume), or "
                f"delete the file and {self._notes.name}"
            )
        journal.check(self._settings, self.partial)
        return journal

    def _open(self) -> BinaryIO:
        if self.partial is None:
            return sys.stdout.buffer
        if self.done is None:
            return self.partial.open("wb")
        stream = self.partial.open("r+b")
        # What a run that was killed wrote after its last note is computed again.
        stream.truncate(self.done.written)
        stream.seek(0, os.SEEK_END)
        return stream

    def _note(self) -> None:
        """Notes how far the output has come, after it has come there: on the disk, not just in its cache."""
        if self._unnoted is not None and self._notes is not None:
            os.fsync(self._stream.fileno())
            self._unnoted.save(self._notes)
            self._unnoted, self._noted_at = None, time.monotonic()

    def _release(self, *, complete: bool) -> None:
        if self.partial is None or self.path is None or self._notes is None:
            return
        # On a full disk closing fails as writing did, and writing's is the error to report.
        with suppress(OSError):
            self._stream.close()
        if complete:
            self._writer.publish(self.partial, self.path)
            self._notes.unlink(missing_ok=True)
        elif not self.partial.stat().st_size:
            self.partial.unlink()


def _maker(suffix: str, earlier: Path | None) -> Callable[[BinaryIO], Writer]:
    """What makes the writer of a format; `earlier` is the part that it goes on with."""
    if suffix == ".jsonl":
        return JsonlWriter
    from vhead.scoring.parquet import ParquetWriter  # noqa: PLC0415, pyarrow only when used

    return partial(ParquetWriter, earlier=earlier)
