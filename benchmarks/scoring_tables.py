"""Writes results/scoring-overhead.md, -growth.md and -scale.md from the data beside them."""

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.architectures.report import ceiling, goal
from scoring_chart import AXES, cost, where

RESULTS = Path(__file__).parent / "results"
OVERHEAD_GOAL_PERCENT = 15.0
COMMAND_GOAL = 0.9
MEASURES = {"wall_s": "by the clock", "processor_s": "in processor time"}
CONTESTANTS = {
    "model": "the model's part of the scorer: batches made and rows chosen before the clock starts",
    "model, own attention": "the same rows through the model's own attention, each packed row for one sequence",
    "stream of ids": "`Scorer.stream` of token ids",
    "stream of text": "`Scorer.stream` of text",
    "text to Arrow": "text to Arrow tables",
    "command, text in JSON Lines": "`vhead score`, text, JSON Lines to JSON Lines",
    "command, ids in Parquet": "`vhead score`, token ids, Parquet to Parquet",
}
COMMANDS = {"command, text in JSON Lines": "stream of text", "command, ids in Parquet": "stream of ids"}

Data = Mapping[str, Any]


def main() -> None:
    """Writes a page for each data set that is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    folder = parser.parse_args().results
    for name, page in {"overhead": overhead, "growth": growth, "scale": scale}.items():
        data = folder / f"scoring-{name}.json"
        if data.exists():
            lines = page(json.loads(data.read_text()))
            heading = f"<!-- Written by benchmarks/scoring_tables.py from {data.name}. -->"
            data.with_suffix(".md").write_text("\n".join([heading, *lines]) + "\n")


def source(data: Data) -> Iterator[str]:
    """Where the figures come from."""
    p = data["provenance"]
    yield (
        f"{where(p)}, transformers {p['transformers']}; commit {p['commit'][:12]}"
        f"{' with uncommitted sources' if p['uncommitted_sources'] else ''}, {p['date']}; "
        f"load average {p['load_before']:.1f} before, {p['load_after']:.1f} after."
    )


def overhead(data: Data) -> Iterator[str]:
    """What the scorer adds to the model, and the command to the scorer."""
    yield from source(data)
    work = data["provenance"]["workload"]
    yield (
        f"The demo model, its checkpoint's dtype; {work['rollouts']:,} rollouts of {work['tokens']:,} bytes, of which "
        f"{work['computed_tokens']:,} go through the model; {', '.join(data['provenance']['fields'])}; "
        f"{data['provenance']['rounds']} rounds.\n"
    )
    yield from ("| figure | goal | measured | reached |", "|---|---|---|---|")
    for measure, how in MEASURES.items():
        added = 100 * (ratio(data, "text to Arrow", "model", measure) - 1)
        name = f"tokenising, packing and Arrow, over the model's part, {how}"
        yield ceiling(name, OVERHEAD_GOAL_PERCENT, added, " %")
    for command, stream in COMMANDS.items():
        for measure, how in MEASURES.items():
            name = f"{CONTESTANTS[command]}, speed over {CONTESTANTS[stream]}, {how}"
            yield goal(name, COMMAND_GOAL, ratio(data, stream, command, measure))
    yield from ("", "| seconds (processor seconds) | |", "|---|---|")
    for name, what in CONTESTANTS.items():
        yield f"| {what} | {median(data, name, 'wall_s'):.2f} ({median(data, name, 'processor_s'):.2f}) |"


def median(data: Data, name: str, measure: str) -> float:
    """Of a contestant over the rounds."""
    return statistics.median(rounds(data, name, measure).values())


def ratio(data: Data, name: str, other: str, measure: str) -> float:
    """One contestant's time by another's in the same round, the median."""
    own, its = rounds(data, name, measure), rounds(data, other, measure)
    return statistics.median(own[number] / its[number] for number in own)


def rounds(data: Data, name: str, measure: str) -> dict[int, float]:
    """A contestant's figure in each round."""
    return {row["round"]: row[measure] for row in data["times"] if row["contestant"] == name}


def growth(data: Data) -> Iterator[str]:
    """Processor microseconds of a token, a table for each thing that grows."""
    yield from source(data)
    yield "Processor microseconds per token of prompts and completions, shared or not."
    for axis, label in AXES.items():
        values, everything = (dict(cost(data["times"], axis, fields)) for fields in ("values", "all fields"))
        yield from ("", f"| {label} | {' | '.join(f'{at:,}' for at in values)} |", "|---" * (len(values) + 1) + "|")
        for name, costs in (("values", values), ("all fields", everything)):
            yield f"| {name} | {' | '.join(f'{costs[at]:.1f}' for at in values)} |"


def scale(data: Data) -> Iterator[str]:
    """Memory along long runs."""
    yield from source(data)
    names = {"stream": "`Scorer.stream`", "command": "`vhead score`, Parquet to Parquet"}
    yield "Resident memory, from a tenth of the run to its last record; at most: in the whole run.\n"
    heads = ("rollouts", "a second", "MiB at first", "at last", "at most", "MiB per million rollouts")
    yield from (f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|")
    for name, what in names.items():
        if name in data:
            r = data[name]
            memory = f"{r['mib_at_first']:,.0f} | {r['mib_at_last']:,.0f} | {r['mib_at_most']:,.0f}"
            rate = f"{r['rollouts_per_s']:,.0f}"
            yield f"| {what} | {r['asked']:,} | {rate} | {memory} | {r['mib_per_million_rollouts']:+.1f} |"


if __name__ == "__main__":
    main()
