"""The one format of figures about the head: a JSON object of lists of rows, and where they come from."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self, TypeAlias

from vhead.checkpoints.replacing import replacing_file
from vhead.errors import FileFormatError

Row: TypeAlias = dict[str, Any]


@dataclass
class Document:
    """One run.

    Attributes:
        provenance: Machine, versions, load.
        times: Percentiles over the rounds, by `mode`, `shape` [N, H], `dtype` and `implementation`.
        saved: Bytes kept between forward and backward, by the same columns but the mode.
        errors: Largest and root-mean-square differences from float64.
        comparisons: Elements that differ from the CPU's, by `dtype` and `what` was compared.
        checks: What else must hold on a device, by `check`.
    """

    provenance: Row
    times: list[Row] = field(default_factory=list)
    saved: list[Row] = field(default_factory=list)
    errors: list[Row] = field(default_factory=list)
    comparisons: list[Row] = field(default_factory=list)
    checks: list[Row] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads what `save` wrote.

        Raises:
            FileFormatError: The file holds something else.
        """
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise FileFormatError(f"{path}: expected the figures that vhead bench writes: {error}") from error

    def save(self, path: Path) -> None:
        """Writes everything that there is, as `write_figures` does."""
        filled = {name: rows for name, rows in asdict(self).items() if rows or name in ("provenance", "times")}
        write_figures(path, filled)

    @property
    def equal(self) -> bool:
        """Whether no compared element differs."""
        return all(row["differing"] == 0 for row in self.comparisons)

    @property
    def passed(self) -> bool:
        """Whether every bit is equal and every check holds."""
        return self.equal and all(row["passed"] for row in self.checks)

    def cases(self) -> list[tuple[str, tuple[int, ...], str]]:
        """Mode, shape and dtype of every case that was timed, in order."""
        return list(dict.fromkeys((row["mode"], tuple(row["shape"]), row["dtype"]) for row in self.times))

    def timed(self, mode: str, shape: Iterable[int], dtype: str) -> dict[str, Row]:
        """The row of each implementation in one case."""
        key = (mode, list(shape), dtype)
        rows = (row for row in self.times if (row["mode"], row["shape"], row["dtype"]) == key)
        return {row["implementation"]: row for row in rows}

    def medians(self, mode: str, shape: Iterable[int], dtype: str) -> dict[str, float]:
        """Median microseconds of each implementation."""
        return {name: row["p50_us"] for name, row in self.timed(mode, shape, dtype).items()}


def write_figures(path: Path, figures: Mapping[str, object]) -> None:
    """Writes figures as JSON, complete or not at all: a broken run leaves the old ones."""
    with replacing_file(path) as file:
        file.write(f"{json.dumps(figures, indent=1)}\n".encode())


def dtype_name(dtype: object) -> str:
    """What rows call a dtype of torch."""
    return str(dtype).removeprefix("torch.")
