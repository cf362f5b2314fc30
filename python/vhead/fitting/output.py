"""The file that a fitted head goes to, and what lies beside it until it is there.

While rollouts are read, the folder `NAME.partial` holds the sums so far and the states that are kept, and
`.NAME.journal` says which records they are of. Sums are written whole under a new name before the journal names them,
so that a run that is killed leaves what another one can continue.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from vhead import formats
from vhead.errors import OutputError, ResumeError
from vhead.head_weights import HeadWeights
from vhead.rollouts.files.rows import Row
from vhead.scoring.files.journal import START_ANEW, Journal, Published, Run
from vhead.scoring.files.part import GrowingFile, check_name, new_file, open_regular, sync_folder

# A run that is killed has to compute this much again, or what takes so many times as long as noting does.
_SECONDS_BETWEEN_NOTES = 5.0
_NOTING_SHARE = 20
_REPLACE = "replace it with --overwrite, or choose another name"
_LOCK = "lock"
_NOTES = "notes"


class HeadOutput:
    """A file with a head that appears under its own name only when it is complete.

    Args:
        path: The output's name.
        resume: Whether to continue what an earlier run of the same settings and input left.
        overwrite: Whether to replace what earlier runs left.

    Attributes:
        folder: Where sums and states are until then.
        journal: What is done, and with which settings; None before `begin`.
        earlier: Notes and tensors of an earlier run that is continued; None: there was none.
        finished: Whether an earlier run with the same settings has finished the output.

    Raises:
        OutputError: Something is there under the output's name that may not be replaced, or another run writes it.
        OSError: The folder cannot be made.
    """

    def __init__(self, path: Path, *, resume: bool = False, overwrite: bool = False) -> None:
        self.path = path
        self.folder = path.with_name(f"{path.name}.partial")
        self._journal_path = path.with_name(f".{path.name}.journal")
        self._resume, self._overwrite = resume, overwrite
        self._noted_at, self._pause = time.monotonic(), _SECONDS_BETWEEN_NOTES
        self.journal: Journal | None = None
        self.earlier: tuple[dict[str, Any], dict[str, Tensor]] | None = None
        self.finished = False
        check_name(path)
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            raise OutputError(f"{self.folder}: expected a folder or nothing, found something else; delete it")
        self.folder.mkdir(exist_ok=True)
        self._lock = GrowingFile(self.folder / _LOCK)
        try:
            self._check_unclaimed()
        except BaseException:
            self._release()
            raise

    @property
    def kept(self) -> Path | None:
        """Where the sums are if reading stopped early, or None."""
        return self.folder if self.journal is not None and self.journal.records and self.folder.exists() else None

    def begin(self, settings: Mapping[str, object]) -> None:
        """Finds what an earlier run noted, or starts.

        Args:
            settings: What the head depends on, as JSON has it.

        Raises:
            OutputError: Another output is there.
            ResumeError: The earlier run had other settings, or what it left is damaged.
        """
        earlier = self._earlier(settings) if self._resume else None
        if self.finished:
            return
        if earlier is not None:
            self.earlier = self._sums(earlier)
            self.journal = replace(earlier, run=Run.this(), published=None)
            self.journal.save(self._journal_path)
            return
        for file in self.folder.iterdir():
            if file.name != _LOCK:
                file.unlink()
        self.journal = Journal(dict(settings), Run.this())
        self.journal.save(self._journal_path)

    def note(self, last: Row, notes: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Notes that everything up to a record is in these sums.

        Args:
            last: The record.
            notes: What is to be found again beside the tensors, as JSON has it.
            tensors: The sums.
        """
        if self.journal is None:
            return
        began = time.monotonic()
        content = save_tensors(dict(tensors), metadata={_NOTES: json.dumps(dict(notes))})
        with new_file(self._sums_path(last.count)) as file:
            file.write(content)
            file.sync()
            digest = file.digest
        before = self._sums_path(self.journal.records)
        self.journal = self.journal.at(last, len(content), digest)
        self.journal.save(self._journal_path)
        if before != self._sums_path(last.count):
            before.unlink(missing_ok=True)
        self._noted_at = time.monotonic()
        self._pause = max(_SECONDS_BETWEEN_NOTES, _NOTING_SHARE * (self._noted_at - began))

    @property
    def is_note_due(self) -> bool:
        """Whether enough has been done since the last note."""
        return time.monotonic() - self._noted_at >= self._pause

    def publish(self, head: HeadWeights, format: str, last: Row | None) -> None:
        """Writes the head, and gives it the output's name.

        Args:
            head: The head.
            format: The name of the format.
            last: The input's last record; None: there was none behind those that an earlier run finished.

        Raises:
            HeadError: The format cannot hold the head.
            OSError: It cannot be written.
        """
        made = self.folder / f"head{self.path.suffix}"
        formats.save(head, made, format, overwrite=True)
        if self.journal is not None:
            content = made.read_bytes()
            published = Published(len(content), hashlib.sha256(content).hexdigest())
            self.journal = replace(self.journal.at(last, 0, ""), published=published)
            self.journal.save(self._journal_path)
        made.replace(self.path)
        sync_folder(self.path)
        shutil.rmtree(self.folder)

    def check_whole(self, rows: Iterable[Row], limit: int | None) -> None:
        """Checks that a finished output is of these records.

        Raises:
            ResumeError: The input has others, or more.
        """
        if self.journal is not None:
            self.journal.check_whole(rows, str(self.path), limit)

    def _check_unclaimed(self) -> None:
        if self._resume or self._overwrite:
            return
        if self.path.exists():
            raise OutputError(f"{self.path}: expected no such file yet; {_REPLACE}")
        journal = None
        with suppress(ResumeError):
            journal = Journal.load(self._journal_path)
        if journal is not None and journal.records and not journal.published:
            raise OutputError(
                f"{self.folder}: an earlier run stopped before it was finished; continue it with --resume, or start "
                "anew with --overwrite"
            )

    def _earlier(self, settings: Mapping[str, object]) -> Journal | None:
        journal = Journal.load(self._journal_path)
        if journal is not None and self._is_published(journal):
            try:
                journal.check(settings, self.path)
            except ResumeError:
                if self._overwrite:
                    return None
                raise
            self.journal, self.finished = journal, True
            return None
        if self.path.exists() and not self._overwrite:
            raise OutputError(f"{self.path}: expected no such file, or that of the same run; {_REPLACE}")
        if journal is None or journal.published or not journal.records:
            return None
        journal.check(settings, self.folder)
        return journal

    def _is_published(self, journal: Journal) -> bool:
        if journal.published is None or not self.path.exists():
            return False
        with open_regular(self.path) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return journal.published == Published(file.tell(), digest)

    def _sums(self, journal: Journal) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The notes and tensors that a journal names."""
        path = self._sums_path(journal.records)
        try:
            with open_regular(path) as file:
                content = file.read()
        except FileNotFoundError:
            content = b""
        if hashlib.sha256(content).hexdigest() != journal.part:
            raise ResumeError(f"{path}: expected the sums that the earlier run wrote, got others; {START_ANEW}")
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return json.loads(header["__metadata__"][_NOTES]), load_tensors(content)

    def _sums_path(self, records: int) -> Path:
        return self.folder / f"sums-{records}.safetensors"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._release()

    def _release(self) -> None:
        """Gives up the lock, and deletes the folder unless sums in it are done."""
        if self.folder.exists() and not self._has_sums():
            shutil.rmtree(self.folder)
            if self.journal is not None and not self.finished and self.journal.published is None:
                self._journal_path.unlink(missing_ok=True)
        self._lock.close()

    def _has_sums(self) -> bool:
        return any(file.name.startswith("sums-") for file in self.folder.iterdir())
