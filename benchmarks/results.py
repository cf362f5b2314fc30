"""Figures read back: the lookups that pages and pictures share."""

import statistics
from collections.abc import Iterator

from vhead.benchmark.document import Document, Row


def select(rows: list[Row], **columns: object) -> list[Row]:
    """The rows with these entries."""
    return [row for row in rows if all(row[name] == entry for name, entry in columns.items())]


def median(rows: list[Row], measure: str, **columns: object) -> float | None:
    """The median of a figure over the rounds; None where it was not measured."""
    figures = [row[measure] for row in select(rows, **columns)]
    return statistics.median(figures) if figures else None


def ratio(rows: list[Row], measure: str, over: Row, under: Row) -> float | None:
    """One figure by another of the same round, the median over the rounds: what slows a round slows all of it."""
    numerators, denominators = ({r["round"]: r[measure] for r in select(rows, **key)} for key in (over, under))
    rounds = numerators.keys() & denominators.keys()
    return statistics.median(numerators[number] / denominators[number] for number in rounds) if rounds else None


def scored_by(contestant: str, fields: str) -> Row:
    """Which rows of `scoring.py peers` are about these fields; TRL has one loop for all of them."""
    return {"contestant": contestant, "fields": "all fields" if contestant == "trl" else fields}


def speed(rows: list[Row], fields: str, measure: str = "wall_s", peer: str = "trl", own: str = "vhead") -> float | None:
    """How often faster than a peer the scorer is."""
    return ratio(rows, measure, scored_by(peer, fields), scored_by(own, fields))


def cost(rows: list[Row], axis: str, fields: str) -> Iterator[tuple[int, float]]:
    """Processor microseconds of a token at each place of an axis of `scoring.py growth`."""
    found = [row | {"us": row["processor_s"] / row["tokens"] * 1e6} for row in select(rows, axis=axis, fields=fields)]
    yield from ((at, median(found, "us", at=at)) for at in sorted({row["at"] for row in found}))


def machine(provenance: Row) -> str:
    """The machine in a few words."""
    return f"{provenance['cpu']}, {provenance['torch_threads']} threads, torch {provenance['torch']}"


class HeadFigures(Document):
    """One run of `head.py`, or of `vhead bench`, which has fewer implementations and no errors."""

    def milliseconds(self, mode: str, shape: tuple[int, ...], dtype: str) -> dict[str, float]:
        """Median time of each implementation; the fastest of the reading passes is `read`."""
        times = {name: us / 1e3 for name, us in self.medians(mode, shape, dtype).items()}
        reads = [times.pop(name) for name in list(times) if name.startswith("read: ")]
        return times | ({"read": min(reads)} if reads else {})

    def worst(self, dtype: str, dropout: float, what: str, measure: str) -> dict[str, float]:
        """Largest error of each implementation over the seeds; `measure` is `max_error` or `rms_error`."""
        rows = select(self.errors, dtype=dtype, dropout=dropout, what=what)
        names = dict.fromkeys(row["implementation"] for row in rows)
        return {name: max(row[measure] for row in select(rows, implementation=name)) for name in names}

    def kept(self, shape: tuple[int, int], dtype: str) -> dict[str, int]:
        """Bytes that each implementation keeps for its backward."""
        rows = select(self.saved, shape=list(shape), dtype=dtype)
        return {row["implementation"]: row["saved_bytes"] for row in rows}
