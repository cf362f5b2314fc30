"""An output that is whole or not there, and what becomes of one that another run left.

What a run finds under its output's name, and does about it:

| | neither option | `--resume` | `--overwrite` | both |
|---|---|---|---|---|
| nothing | starts | starts | starts | starts |
| a part of the same run | refuses | continues | starts anew | continues |
| the finished output of the same run | refuses | says so | starts anew | says so |
| a part of another run | refuses | refuses | starts anew | refuses |
| another output | refuses | refuses | starts anew | starts anew |
| a run that is writing it | refuses | refuses | refuses | refuses |
| a link, a folder, a pipe, a device | refuses | refuses | refuses | refuses |

An output that is there stays until the new one is complete.
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from vhead.errors import OutputBusyError, OutputError, RecordError, ResumeError
from vhead.rollouts.files.compressed import compressed
from vhead.rollouts.files.rows import Row
from vhead.scoring.files.journal import START_ANEW, Journal, Published, Run
from vhead.scoring.files.jsonl import JsonlWriter
from vhead.scoring.files.pairs import PairScores
from vhead.scoring.files.part import GrowingFile, Sink, check_name, open_regular, sync_folder
from vhead.scoring.scores import Scores

# A run that is killed has to compute this much again.
_SECONDS_BETWEEN_NOTES = 1.0
_REPLACE = "replace it with --overwrite, or choose another name"

ErrorHandler = Callable[[RecordError], None]


class Writer(Protocol):
    """Records and their scores, into a file that grows."""

    def held(self, rows: Sequence[Row], *, skips: bool) -> tuple[Any, dict[int, RecordError]]:
        """What `append` takes of the rows, and by its place what is wrong with each that the format cannot hold."""

    def append(self, held: Any, scores: Scores | PairScores) -> None:
        """Appends records with their scores."""


class Output:
    """Writes scores as JSON Lines to a stream, and notes nothing about it.

    Args:
        stream: What is appended to.
        suffix: Added to the names of the scores' columns.

    Attributes:
        suffix: As given.
        journal: What is done, and with which settings; None where nothing is noted, and before `begin`.
        finished: Whether an earlier run with the same settings has finished the output.
        continued: How many records of the input an earlier run had done.
        written: How many records this run has written.
        truncated: How many of them lost tokens, as they had too many.
        unit: What they are.
    """

    def __init__(self, stream: Sink, suffix: str = "") -> None:
        self._stream = stream
        self.suffix = suffix
        self._writer: Writer | None = None
        self.journal: Journal | None = None
        self.finished = False
        self.continued = 0
        self.written = 0
        self.truncated = 0
        self.unit = "rollouts"

    @property
    def kept(self) -> Path | None:
        """Where the finished part is if writing stopped early, or None."""
        return None

    def begin(self, settings: Mapping[str, object], schema: Any = None) -> None:
        """Continues where an earlier run stopped, or starts.

        Args:
            settings: What the scores depend on, as JSON has it.
            schema: The input's columns where they are known: `Reader.schema`.

        Raises:
            ResumeError: The earlier run had other settings, or its part is damaged.
            FieldError: The format cannot hold one of these columns.
        """
        self._writer = JsonlWriter(self._stream, self.suffix)

    def write(
        self,
        rows: Sequence[Row],
        scores: Scores | PairScores,
        last: Row | None = None,
        on_error: ErrorHandler | None = None,
    ) -> None:
        """Appends records with their scores.

        Args:
            rows: The records.
            scores: Their scores.
            last: The last record that is done with these, whether or not it is among them; None: none is.
            on_error: Told of each record that the format cannot hold, which is then left out; None: the first one is
                raised, after everything before it has been written.

        Raises:
            RecordError: The format cannot hold a record, and `on_error` is None.
            OSError: Writing failed.
        """
        writer = self._writer
        if writer is None:
            raise ValueError("write: expected an output that has begun; call begin() first")
        held, errors = writer.held(rows, skips=on_error is not None)
        if on_error is None and errors:
            ((place, error),) = errors.items()
            self._append(writer, held, scores[:place])
            self._done(rows[place - 1] if place else None)
            raise error
        self._append(writer, held, scores.without(errors))
        self._done(last)
        if on_error is not None:
            for error in errors.values():
                on_error(error)

    def publish(self, last: Row | None, nothing: Scores | PairScores) -> None:
        """Says that the output is complete.

        Args:
            last: The input's last record; None: there was none behind those that an earlier run finished.
            nothing: The scores of no rollouts, whose columns an output without records has.
        """

    def _append(self, writer: Writer, held: Any, scores: Scores | PairScores) -> None:
        writer.append(held, scores)
        self.written += len(scores)
        if isinstance(scores, PairScores):
            self.unit = "pairs"
        if scores.truncated is not None:
            self.truncated += int(scores.truncated.sum())

    def _done(self, last: Row | None) -> None:
        """Takes note that everything up to a record is written."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stream.flush()


class OutputFile(Output):
    """A file of scores that appears under its own name only when it is complete.

    Until then it grows as `NAME.partial` beside it, and `.NAME.journal` notes how far it has come, so that another run
    can continue it. The journal stays beside the finished output and says what that was made with.

    Args:
        path: The output's name.
        suffix: Added to the names of the scores' columns.
        resume: Whether to continue what an earlier run of the same settings and input left.
        overwrite: Whether to replace what earlier runs left.

    Raises:
        OutputError: Something is there under the output's name that may not be replaced, or another run writes it.
        OSError: The file cannot be created.
    """

    def __init__(self, path: Path, suffix: str = "", *, resume: bool = False, overwrite: bool = False) -> None:
        self.path = path
        self.partial = path.with_name(f"{path.name}.partial")
        self._notes = path.with_name(f".{path.name}.journal")
        self._resume, self._overwrite = resume, overwrite
        self._noted_at = -_SECONDS_BETWEEN_NOTES
        self._noted: Journal | None = None
        self._run = Run.this()
        self._announced = False
        self._part = self._claimed()
        super().__init__(self._part, suffix)
        try:
            self._check_unclaimed()
            self._announce()
        except BaseException:
            self._release()
            raise

    @property
    def kept(self) -> Path | None:
        """Where the finished part is if writing stopped early, or None."""
        return self.partial if self.journal is not None and self.journal.records and self.partial.exists() else None

    def begin(self, settings: Mapping[str, object], schema: Any = None) -> None:
        """Continues where an earlier run stopped, or starts; as `Output.begin` says."""
        journal = self._earlier(settings) if self._resume else None
        if self.finished:
            self.journal = journal
            return
        self._writer = self._make_writer(schema)
        if journal is None:
            # Noted before the part is cut: after a kill in between, the next run starts anew and misses no bytes.
            self.journal = Journal(settings, self._run, part=self._part.digest)
            self._save()
            self._part.cut(0)
        else:
            self.journal = replace(journal, run=self._run, published=None)
            self.continued = journal.records
            self._save()

    def publish(self, last: Row | None, nothing: Scores | PairScores) -> None:
        """Gives the complete output its name; as `Output.publish` says."""
        self._done(last)
        self._part.sync()
        self._complete(nothing)
        sync_folder(self.path)

    def _make_writer(self, schema: Any) -> Writer:
        return JsonlWriter(self._part, self.suffix)

    def _complete(self, nothing: Scores | PairScores) -> None:
        """Gives the part the output's name: lines are complete as they are."""
        self._note_published(self._part)
        self.partial.replace(self.path)

    def _note_published(self, complete: GrowingFile) -> None:
        """Notes what is about to get the output's name, so that a run after a kill in between knows it."""
        if self.journal is not None:
            self.journal = replace(self.journal, published=Published(complete.tell(), complete.digest))
            self._save()

    def _claimed(self) -> GrowingFile:
        check_name(self.path)
        try:
            return GrowingFile(self.partial)
        except OutputBusyError as error:
            journal = None
            with suppress(ResumeError, OSError):
                journal = Journal.load(self._notes)
            raise OutputBusyError(f"{error}{'' if journal is None else f': {journal.run}'}") from None

    def _check_unclaimed(self) -> None:
        """Refuses what is there, unless an option says what is to become of it."""
        check_name(self.path)
        if not self._resume and not self._overwrite:
            if self.path.exists():
                raise OutputError(f"{self.path}: expected no such file yet; {_REPLACE}")
            if not self._part.is_empty:
                raise OutputError(
                    f"{self.partial}: an earlier run stopped before it was finished; continue it with --resume, or "
                    "start anew with --overwrite"
                )

    def _announce(self) -> None:
        """Notes which run is writing, for another one that comes while this one still reads the model."""
        with suppress(ResumeError, OSError):
            journal = Journal.load(self._notes)
            if journal is not None:
                replace(journal, run=self._run).save(self._notes)
            elif self._part.is_empty:
                Journal({}, self._run).save(self._notes)
                self._announced = True

    def _earlier(self, settings: Mapping[str, object]) -> Journal | None:
        """What an earlier run noted, if this one can continue it; None where there was none."""
        journal = Journal.load(self._notes)
        if journal is not None and self._is_published(journal):
            try:
                journal.check(settings, self.path)
            except ResumeError:
                if self._overwrite:
                    return None
                raise
            self.finished = True
            return journal
        if self.path.exists() and not self._overwrite:
            raise OutputError(f"{self.path}: expected no such file, or that of the same run; {_REPLACE}")
        if self._part.is_empty and (journal is None or journal.published or not journal.written):
            return None
        if journal is None:
            raise ResumeError(
                f"{self.partial}: expected {self._notes.name}, which says what is in it, found no such file; "
                f"{START_ANEW}"
            )
        journal.check(settings, self.partial)
        if not self._part.cut(journal.written) or self._part.digest != journal.part:
            raise ResumeError(
                f"{self.partial}: expected the {journal.written:,} bytes that the earlier run wrote, got others; "
                f"{START_ANEW}"
            )
        return journal

    def _is_published(self, journal: Journal) -> bool:
        if journal.published is None or not self.path.exists():
            return False
        with open_regular(self.path) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return journal.published == Published(file.tell(), digest)

    def _done(self, last: Row | None) -> None:
        if self.journal is None:
            return
        self.journal = self.journal.at(last, self._part.tell(), self._part.digest)
        if time.monotonic() - self._noted_at >= _SECONDS_BETWEEN_NOTES:
            self._note()

    def _note(self) -> None:
        """Notes how far the output has come, once all of that is on the disk and not only in its cache."""
        if self.journal is not None and self.journal != self._noted:
            self._part.sync()
            self._save()

    def _save(self) -> None:
        if self.journal is not None:
            self.journal.save(self._notes)
            self._noted, self._noted_at = self.journal, time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if self.journal is not None and self.journal.published is None:
                self._note()
        finally:
            self._release()

    def _release(self) -> None:
        """Closes the part, and deletes it unless records in it are done."""
        if self.journal is None:
            nothing = self._part.is_empty
            unannounced = self._announced
        else:
            nothing = unannounced = not self.journal.records and self.journal.published is None
        # Once this run has published its output, the part's old name may already be that of another run's part.
        if nothing or self.finished:
            self.partial.unlink(missing_ok=True)
        if unannounced:
            self._notes.unlink(missing_ok=True)
        self._part.close()


class CompressedOutput(OutputFile):
    """JSON Lines in a compressed file, where each piece that is appended is a stream of its own.

    So the file can be continued at any of them. The arguments are those of `OutputFile`.
    """

    def _make_writer(self, schema: Any) -> Writer:
        return JsonlWriter(_Compressing(self._part, self.path.suffix.lower()), self.suffix)


class _Compressing:
    """Compresses each piece of bytes by itself."""

    def __init__(self, stream: Sink, suffix: str) -> None:
        self._stream, self._suffix = stream, suffix

    def write(self, data: bytes) -> None:
        if data:
            self._stream.write(compressed(data, self._suffix))

    def flush(self) -> None:
        self._stream.flush()
