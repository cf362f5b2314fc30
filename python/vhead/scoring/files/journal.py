"""What a run noted about its output, so that another run can continue from there, or see that all is done."""

import json
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, Self

from vhead.errors import InputChangedError, ResumeError
from vhead.rollouts.files.rows import Row
from vhead.scoring.files.part import new_file, open_regular

# It names both options, because together they would continue the earlier run or be refused.
START_ANEW = "start anew with --overwrite and without --resume"


@dataclass(frozen=True)
class Run:
    """Who writes an output.

    Attributes:
        process: Its number.
        host: On which machine.
        since: When it began.
    """

    process: int
    host: str
    since: str

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, since {self.since}"

    @classmethod
    def this(cls) -> Self:
        """The run of this process, which begins now."""
        return cls(os.getpid(), socket.gethostname(), time.strftime("%Y-%m-%d %H:%M:%S %z"))


@dataclass(frozen=True)
class Published:
    """A complete output.

    Attributes:
        size: Its bytes.
        digest: Their digest.
    """

    size: int
    digest: str


@dataclass(frozen=True)
class Journal:
    """How far an output has come.

    Attributes:
        settings: What the scores depend on, by name.
        run: Who wrote last.
        records: How many of the input's records are done, those that were left out among them.
        input: The digest of these records.
        written: How many bytes of the unfinished output hold them.
        part: The digest of these bytes.
        published: The complete output; None until there is one.
    """

    settings: Mapping[str, object]
    run: Run
    records: int = 0
    input: str = ""
    written: int = 0
    part: str = ""
    published: Published | None = None

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """Reads a journal; None where there is none.

        Raises:
            ResumeError: The file is not a journal.
            OSError: It cannot be read.
        """
        try:
            with open_regular(path) as file:
                return cls._of(json.loads(file.read()))
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError) as error:
            raise ResumeError(
                f"{path}: this file should say how far an earlier run came, but cannot be read: "
                f"{error or type(error).__name__}; {START_ANEW}"
            ) from None

    @classmethod
    def _of(cls, content: object) -> Self:
        noted = _object(content, "journal", cls)
        published = noted["published"]
        journal = cls(
            **noted
            | {
                "run": Run(**_object(noted["run"], "run", Run)),
                "published": None if published is None else Published(**_object(published, "published", Published)),
            }
        )
        _check("settings", journal.settings, dict)
        numbers = {"records": journal.records, "written": journal.written, "process": journal.run.process}
        texts = {"input": journal.input, "part": journal.part, "host": journal.run.host, "since": journal.run.since}
        if journal.published is not None:
            numbers["size"], texts["digest"] = journal.published.size, journal.published.digest
        for name, text in texts.items():
            _check(name, text, str)
        for name, number in numbers.items():
            _check(name, number, int)
            if number < 0:
                raise ValueError(f"{name}: expected 0 or more, got {number}")
        if not journal.records and (journal.written or journal.input):
            raise ValueError(f"written: expected 0 for no records, got {journal.written}")
        return journal

    def save(self, path: Path) -> None:
        """Writes the journal to a new file and gives that its name, so that readers never see half of it."""
        with new_file(path.with_name(f"{path.name}.new")) as unfinished:
            unfinished.write(json.dumps(asdict(self)).encode())
            unfinished.sync()
            unfinished.path.replace(path)

    def check(self, settings: Mapping[str, object], output: Path) -> None:
        """Checks that a run with these settings may continue where the earlier one stopped.

        Raises:
            ResumeError: A setting differs.
        """
        for name in sorted(self.settings.keys() | settings.keys()):
            before, now = self.settings.get(name), settings.get(name)
            if before != now:
                raise ResumeError(
                    f"{output}: {name}: expected {before!r}, as in the run that is resumed, got {now!r}; "
                    f"give the same again, or {START_ANEW}"
                )

    def pass_over(self, rows: Iterator[Row]) -> Iterator[Row]:
        """Yields the records that are done, and checks after the last one that they are the right ones.

        Raises:
            ResumeError: They are not those that the earlier run finished.
        """
        last = None
        # The range comes first: the other way round, zip would take one row too many and drop it.
        for _, last in zip(range(self.records), rows, strict=False):
            yield last
        found = 0 if last is None else last.count
        if found < self.records:
            raise InputChangedError(
                f"expected the {self.records:,} records that the earlier run finished, got {found:,}; "
                f"give the same input again, or {START_ANEW}"
            )
        if last is not None and last.digest != self.input:
            raise InputChangedError(
                f"expected the {self.records:,} records that the earlier run finished, got others up to "
                f"{last.where}; give the same input again, or {START_ANEW}"
            )

    def check_limit(self, limit: int | None) -> None:
        """Checks that a run that scores only the first so many records may continue.

        Raises:
            ResumeError: More are done than the limit allows.
        """
        if limit is not None and self.records > limit:
            raise ResumeError(f"limit: expected at least the {self.records:,} records that are done, got {limit:,}")

    def check_whole(self, rows: Iterable[Row], output: str, limit: int | None = None) -> None:
        """Checks that a finished output is of the first so many of these records, or of all where there is no limit.

        Raises:
            ResumeError: The input has others or more, or more are done than the limit allows.
        """
        self.check_limit(limit)
        remaining = islice(rows, limit)
        for _ in self.pass_over(remaining):
            pass
        if (more := next(remaining, None)) is not None:
            raise ResumeError(
                f"{output}: expected an input of the {self.records:,} records that are finished, got more: "
                f"{more.where}; to score them too, {START_ANEW}"
            )

    def at(self, row: Row | None, written: int, part: str, published: Published | None = None) -> Self:
        """The journal when all records up to a row are done."""
        records, digest = (self.records, self.input) if row is None else (row.count, row.digest)
        return replace(self, records=records, input=digest, written=written, part=part, published=published)


def _object(content: object, name: str, cls: type) -> dict[str, Any]:
    """A JSON object with exactly the fields of a class."""
    names = {field.name for field in fields(cls)}
    if not isinstance(content, dict) or content.keys() != names:
        raise ValueError(f"{name}: expected an object with {', '.join(sorted(names))}")
    return content


def _check(name: str, value: object, kind: type) -> None:
    if type(value) is not kind:
        raise ValueError(f"{name}: expected {kind.__name__}, got {type(value).__name__}")
