"""The measured rows, read back: lookups that the chart and the tables share."""

from pathlib import Path

from vhead.benchmark.document import Document, Row

FILE = Path(__file__).parent / "results" / "head.json"


class Results(Document):
    """One run of `head.py`, or of `vhead bench`, which has fewer implementations and no errors."""

    def milliseconds(self, mode: str, shape: tuple[int, ...], dtype: str) -> dict[str, float]:
        """Median time of each implementation; the fastest of the reading passes is `read`."""
        times = {name: median / 1e3 for name, median in self.medians(mode, shape, dtype).items()}
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
