"""Writes results/scoring.md from results/scoring.json: the goals that this project set itself, and all times."""

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.architectures.report import ceiling, goal

FILE = Path(__file__).parent / "results" / "scoring.json"
GOALS = {"values": 11.0, "all fields": 7.0}
MEMORY_GOAL_MIB = 250
GEMM_GOAL = 0.85

WHAT = {
    "trl": "TRL 1.12: right-padded batches of 8 in input order; values and log-probabilities, no entropies",
    "trl, forward only": "the same, forward only: values, and logits that nobody reads",
    "one at a time": "vhead, each rollout alone",
    "sorted batches": "vhead, length-sorted batches: no tree packing",
    "prefix cache": "vhead, the prompt's keys and values computed once, completions padded",
    "dense mask": "vhead, packed trees under one dense mask: no attention by segments",
    "logits of all rows": "vhead, logits of every packed row: no choice of rows, no fused statistics",
    "vhead": "vhead as it is: packed trees, attention by segments, completion rows, fused statistics",
    "batch-invariant": "vhead, `batch_invariant=True`",
    "bare GEMM": "only the matrix products over unique tokens and completion rows",
}

Row = dict[str, object]


@dataclass(frozen=True)
class Results:
    """One run of `scoring.py`."""

    provenance: Row
    times: list[Row]
    memory: list[Row]

    def median(self, contestant: str, fields: str, measure: str = "wall_s") -> float | None:
        """Over the rounds; None where it was not measured."""
        rows = [row for row in self.times if (row["contestant"], row["fields"]) == (contestant, fields)]
        return statistics.median(row[measure] for row in rows) if rows else None

    def ratio(self, contestant: str, fields: str, measure: str = "wall_s", peer: str = "trl") -> float | None:
        """How often faster than a peer in the same round, the median; TRL has one loop for both sets of fields."""
        own, other = (self._rounds(contestant, fields, measure), self._rounds(peer, fields, measure))
        other = other or self._rounds(peer, "all fields", measure)
        rounds = own.keys() & other.keys()
        return statistics.median(other[number] / own[number] for number in rounds) if rounds else None

    def _rounds(self, contestant: str, fields: str, measure: str) -> dict[object, float]:
        return {
            row["round"]: row[measure]
            for row in self.times
            if (row["contestant"], row["fields"]) == (contestant, fields)
        }

    def extra_mib(self, contestant: str, fields: str) -> float | None:
        """Peak memory above the model."""
        found = [r["extra_bytes"] for r in self.memory if (r["contestant"], r["fields"]) == (contestant, fields)]
        return found[0] / 2**20 if found else None


def main() -> None:
    """Writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, nargs="?", default=FILE)
    data = parser.parse_args().data
    results = Results(**json.loads(data.read_text()))
    sections = ["\n".join(part(results)) for part in (source, goals, ablation, memory)]
    heading = f"<!-- Written by benchmarks/scoring_report.py from {data.name}. -->"
    data.with_suffix(".md").write_text(f"{heading}\n" + "\n\n".join(sections) + "\n")


def source(results: Results) -> Iterator[str]:
    """Where the figures come from."""
    p, work = results.provenance, results.provenance["workload"]
    rounds = len({row["round"] for row in results.times})
    yield (
        f"{p['cpu']}, {p['cores']} cores ({p['torch_capability']}), {p['torch_threads']} threads; torch {p['torch']}, "
        f"transformers {p['transformers']}, trl {p['trl']}; commit {str(p['commit'])[:12]}"
        f"{' with uncommitted sources' if p['uncommitted_sources'] else ''}, {p['date']}; rounds: {rounds}; "
        f"load average {p['load_before']:.1f} before, {p['load_after']:.1f} after."
    )
    yield (
        f"Qwen2-0.5B's shape with {p['layers']} layers, float32, random weights; {work['rollouts']} rollouts: "
        f"{work['tokens']:,} tokens, {work['unique_tokens']:,} of them unique, {work['completion_tokens']:,} of "
        "completions."
    )


def goals(results: Results) -> Iterator[str]:
    """Each goal and what was measured."""
    yield from ("| figure | goal | measured | reached |", "|---|---|---|---|")
    for fields, least in GOALS.items():
        yield goal(f"{fields}: speed over TRL's loop", least, results.ratio("vhead", fields))
        yield goal(f"{fields}: the same in processor time", least, results.ratio("vhead", fields, "processor_s"))
    forward = results.ratio("vhead", "values", peer="trl, forward only")
    if forward is not None:
        yield f"| values: speed over TRL's forward alone, which leaves log-probabilities out | | {forward:.1f}× | |"
    for fields in GOALS:
        rate = results.ratio("vhead", fields, peer="bare GEMM")
        yield goal(f"{fields}: speed over the bare matrix products", GEMM_GOAL, rate)
    for fields in GOALS:
        extra = results.extra_mib("vhead", fields)
        if extra is not None:
            yield ceiling(f"{fields}: peak memory above the model", MEMORY_GOAL_MIB, extra, " MiB")


def ablation(results: Results) -> Iterator[str]:
    """Every way of scoring, in seconds and against TRL's loop."""
    yield "| seconds (× TRL's speed; processor seconds) | values | all fields |"
    yield "|---|---|---|"
    for name, what in WHAT.items():
        cells = [_cell(results, name, fields) for fields in GOALS]
        if any(cells):
            yield f"| {what} | {' | '.join(cells)} |"


def _cell(results: Results, name: str, fields: str) -> str:
    wall = results.median(name, fields)
    if wall is None:
        return ""
    return f"{wall:.1f} ({results.ratio(name, fields):.1f}×; {results.median(name, fields, 'processor_s'):.1f})"


def memory(results: Results) -> Iterator[str]:
    """Peak memory above the loaded model, each in a process of its own."""
    yield from ("| peak above the model, MiB | values | all fields |", "|---|---|---|")
    for name in dict.fromkeys(row["contestant"] for row in results.memory):
        extra = [results.extra_mib(name, fields) for fields in GOALS]
        yield f"| {name} | {' | '.join('' if mib is None else f'{mib:,.0f}' for mib in extra)} |"


if __name__ == "__main__":
    main()
