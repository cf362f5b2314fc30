"""Measures what agents' rollouts ask for beside values: heads, candidates, turns, comparing. See README.md."""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import report
import torch
from measure import Figures, add_options
from token_statistics import CANDIDATES, TOP, Case
from workloads import QWEN2_VOCABULARY, log_normal, qwen2

from vhead import AutoModelForCausalLMWithValueHead, Rollout, Scorer, ValueHead, ops
from vhead.benchmark.document import Row
from vhead.benchmark.timing import Work, clocked, load_average, turns

LAYERS, PROMPTS, COMPLETIONS, HEADS, HIDDEN = 4, 2, 8, 8, 896
ROWS, TURNS, TURN = 1172, 20, 32
ROLLOUTS, TOKENS = 10_000, 100


def _timed(figure: str, works: Mapping[str, Work], rounds: int) -> Iterator[Row]:
    for work in works.values():
        work()
    for number, name in turns(works, rounds):
        before = load_average()
        row = {"figure": figure, "round": number, "implementation": name, **clocked(works[name])}
        yield row | {"load_before": before, "load_after": load_average()}


def heads(options: argparse.Namespace) -> Iterator[Row]:
    """Values alone, of one head and of eight, over one pass."""
    body, rollouts = qwen2(LAYERS), log_normal(PROMPTS, COMPLETIONS)

    def score_with(count: int) -> Work:
        torch.manual_seed(0)
        scorer = Scorer(body, heads={f"head {i}": ValueHead(None, hidden_size=HIDDEN) for i in range(count)})
        return partial(scorer.score, rollouts, ("values",))

    yield from _timed("heads", {"one": score_with(1), "more": score_with(HEADS)}, options.rounds)


def candidates(options: argparse.Namespace) -> Iterator[Row]:
    """Log-probabilities of the sampled tokens, and of candidates or the likeliest beside them."""
    case = Case.draw(torch.float32, ROWS)
    given = torch.randint(len(case.weight), (len(case.targets), CANDIDATES))
    sampled = partial(ops.token_statistics, case.hidden, case.weight, case.targets)
    works: dict[str, Work] = {
        "sampled": sampled,
        "candidates": partial(sampled, candidates=given),
        "top": partial(sampled, top=TOP),
    }
    yield from _timed("candidates", works, options.rounds)


def trace(options: argparse.Namespace) -> Iterator[Row]:
    """One trace in one pass, and each of its turns as a rollout of its own; the last row is how far apart they are."""
    torch.manual_seed(0)
    scorer = Scorer(AutoModelForCausalLMWithValueHead.from_pretrained(qwen2(LAYERS)).eval())
    tokens = np.random.default_rng(0).integers(0, QWEN2_VOCABULARY, (2 * TURNS + 1) * TURN)
    mask = np.arange(2 * TURNS * TURN) // TURN % 2 == 0
    whole = Rollout(tokens[:TURN], tokens[TURN:], mask=mask)
    starts = range(TURN, len(tokens), 2 * TURN)
    fields = ("values", "logprobs")

    def turn_by_turn() -> list[np.ndarray]:
        parts = [scorer.score([Rollout(tokens[:at], tokens[at : at + TURN])], fields) for at in starts]
        return [np.concatenate([getattr(part, field) for part in parts]) for field in fields]

    works: dict[str, Work] = {"one pass": partial(scorer.score, [whole], fields), "turn by turn": turn_by_turn}
    yield from _timed("trace", works, options.rounds)
    scores = scorer.score([whole], fields)
    differences = [
        np.abs(getattr(scores, field)[mask] - alone).max() for field, alone in zip(fields, turn_by_turn(), strict=True)
    ]
    yield {"figure": "trace", "max_difference": float(max(differences))}


def comparing(options: argparse.Namespace) -> Iterator[Row]:
    """`vhead compare` on two Parquet files of 10^6 tokens, a process each time."""
    rng = np.random.default_rng(0)
    offsets = pa.array(np.arange(ROLLOUTS + 1, dtype=np.int32) * TOKENS)
    logprobs, values = rng.normal(-1, 1, ROLLOUTS * TOKENS), rng.normal(size=ROLLOUTS * TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("before.parquet", "after.parquet")]
        for shift, file in zip((0.0, 0.01), files, strict=True):
            drawn = {"logprobs": logprobs, "values": values}
            arrays = {
                name: pa.ListArray.from_arrays(
                    offsets, pa.array((numbers + shift * rng.normal(size=len(numbers))).astype(np.float32))
                )
                for name, numbers in drawn.items()
            }
            pq.write_table(pa.table({"id": np.arange(ROLLOUTS), **arrays}), file)
        command = [sys.executable, "-m", "vhead", "compare", *map(str, files), "--json"]
        for number in range(options.rounds):
            load, before, wall = load_average(), os.times(), time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            wall, after = time.perf_counter() - wall, os.times()
            processor = sum(after[2:4]) - sum(before[2:4])
            row = {"figure": "compare", "round": number, "implementation": "compare", "wall_s": wall}
            yield row | {"processor_s": processor, "load_before": load, "load_after": load_average()}


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "agents", rounds=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures = Figures(options, layers=LAYERS, turns=TURNS, tokens=ROLLOUTS * TOKENS)
    for measure in (heads, candidates, trace, comparing):
        figures.add("times", measure(options))
    figures.close(report.agents)


if __name__ == "__main__":
    _main()
