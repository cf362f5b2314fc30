"""What a run that stopped early has finished, so that another run can go on from there."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Self

from vhead.errors import ResumeError


@dataclass(frozen=True)
class Journal:
    """How far an unfinished output has come.

    Attributes:
        settings: What the scores depend on, by name.
        records: How many of the input's records are done, those that were left out between them included.
        last_record: The digest of the last of them, which tells whether the input is still the same up to there.
        written: How many bytes of the unfinished output hold them.
    """

    settings: Mapping[str, object]
    records: int
    last_record: str
    written: int

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """Reads a journal; None where there is none.

        Raises:
            ResumeError: The file is not a journal.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{field.name: content[field.name] for field in fields(cls)})
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise ResumeError(
                f"{path}: expected what an earlier run noted about its progress, got: {error!r}"
            ) from error

    def save(self, path: Path) -> None:
        """Writes the journal beside its place and moves it there, so that it is never half a one."""
        unfinished = path.with_name(f"{path.name}.new")
        unfinished.write_text(json.dumps(asdict(self)), encoding="utf-8")
        unfinished.replace(path)

    def check(self, settings: Mapping[str, object], output: Path) -> None:
        """Checks that a run with these settings may go on where the earlier one stopped.

        Raises:
            ResumeError: A setting differs, or the unfinished output has lost some of its bytes.
        """
        for name in sorted(self.settings.keys() | settings.keys()):
            before, now = self.settings.get(name), settings.get(name)
            if before != now:
                raise ResumeError(f"{output}: {name}: expected {before!r}, as in the run that is resumed, got {now!r}")
        size = output.stat().st_size if output.exists() else 0
        if size < self.written:
            raise ResumeError(f"{output}: expected at least the {self.written} bytes that are done, got {size}")
