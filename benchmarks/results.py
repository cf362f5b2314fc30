"""The measured rows, read back: lookups that the chart and the tables share."""

import json
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).parent / "results" / "head.json"

Row = dict[str, object]


@dataclass(frozen=True)
class Results:
    """One run of `head.py`."""

    provenance: Row
    times: list[Row]
    saved: list[Row]
    errors: list[Row]

    @classmethod
    def load(cls, file: Path = FILE) -> "Results":
        """Reads what `head.py` wrote."""
        return cls(**json.loads(file.read_text()))

    def milliseconds(self, mode: str, shape: tuple[int, int], dtype: str) -> dict[str, float]:
        """Median time of each implementation; the fastest of the reading passes is `read`."""
        rows = [r for r in self.times if (r["mode"], tuple(r["shape"]), r["dtype"]) == (mode, shape, dtype)]
        times = {r["implementation"]: r["p50_us"] / 1e3 for r in rows}
        reads = [times.pop(name) for name in list(times) if name.startswith("read: ")]
        return times | ({"read": min(reads)} if reads else {})

    def worst(self, shape: tuple[int, int], dtype: str, dropout: float, what: str, measure: str) -> dict[str, float]:
        """Largest error of each implementation over the seeds; `measure` is `max_error` or `rms_error`."""
        key = (shape, dtype, dropout, what)
        rows = [r for r in self.errors if (tuple(r["shape"]), r["dtype"], r["dropout"], r["what"]) == key]
        return {name: max(r[measure] for r in rows if r["implementation"] == name) for name in _names(rows)}

    def kept(self, shape: tuple[int, int], dtype: str) -> dict[str, int]:
        """Bytes that each implementation keeps for its backward."""
        rows = [r for r in self.saved if (tuple(r["shape"]), r["dtype"]) == (shape, dtype)]
        return {r["implementation"]: r["saved_bytes"] for r in rows}


def _names(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(r["implementation"] for r in rows))
