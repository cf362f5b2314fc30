"""Measures what the scorer adds to the language model's own time, on a model small enough to show it: README.md."""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from demo_workload import as_ids, texts
from measure import load_average, provenance
from torch import Tensor

from vhead import Rollout, Scorer
from vhead.backbone.hidden_states import last_hidden_state
from vhead.cli.app import app
from vhead.demo import demo_model_path
from vhead.rollouts.encoding import Encoded
from vhead.scoring.engine import Read, Work
from vhead.scoring.statistics import token_statistics
from vhead.packing.strategies import as_row
from vhead.scoring.chunks import windows

RESULTS = Path(__file__).parent / "results" / "scoring-overhead.json"
FIELDS = ("values", "logprobs", "reward")

Row = dict[str, object]
Turn = Callable[[], object]


@dataclass(frozen=True)
class Ready:
    """A batch for which nothing is left to do but to run the model.

    Attributes:
        work: The batch, and how the scorer runs it.
        read: Which rows of its states are looked at.
    """

    work: Work
    read: Read


class ModelOnly:
    """The model's part of scoring some rollouts: all batches made, all rows chosen before the clock starts.

    Args:
        scorer: Whose batches these are.
        rollouts: Token ids.
    """

    def __init__(self, scorer: Scorer, rollouts: Sequence[Rollout]) -> None:
        self._engine = scorer._engine
        encoded = (scorer._encoder.encode(index, rollout, "") for index, rollout in enumerate(rollouts))
        self.ready = [
            self._ready(window, work)
            for window, _ in windows(encoded, scorer._window_tokens)
            for work in self._engine.work(window, scorer.token_budget, FIELDS)
        ]

    def _ready(self, window: Sequence[Encoded], work: Work) -> Ready:
        engine, rollouts = self._engine, [window[place] for place in work.batch.places]
        return Ready(work, Read.of(rollouts, work.batch, engine._conventions, engine._pad_token))

    def as_scored(self) -> None:
        """The hidden states as the scorer makes them, attended along each rollout's own path."""
        with self._engine._computing():
            for ready in self.ready:
                self._finish(ready.work.strategy.states(ready.work.batch), ready.read)

    def own_forward(self) -> None:
        """The same rows through the language model as it is, whose attention takes each packed row for one sequence."""
        body = self._engine._body
        with self._engine._computing():
            for ready in self.ready:
                pack = ready.work.batch.content
                inputs = {"input_ids": as_row(pack.tokens), "position_ids": as_row(pack.positions)}
                self._finish(last_hidden_state(body.model, plan=body.plan, **inputs).flatten(0, 1), ready.read)

    def _finish(self, states: Tensor, read: Read) -> None:
        self._engine._head(states[torch.cat([read.predicting, read.rewarded])])
        token_statistics(states[read.predicting], self._engine._rule, read.targets, 1.0, entropy=False)


def to_arrow(scorer: Scorer, rollouts: Sequence[Rollout]) -> list[pa.Table]:
    """Streamed, each window as an Arrow table."""
    return [window.to_arrow() for window in scorer.chunks(rollouts, FIELDS)]


def streamed(scorer: Scorer, rollouts: Sequence[Rollout]) -> int:
    """One score after the other."""
    return sum(1 for _ in scorer.stream(rollouts, FIELDS))


def command(source: Path, output: Path, threads: int) -> None:
    """`vhead score` as a whole: the model's loading and self-check are in it, the start of Python is not."""
    options = ["--model", demo_model_path(), "--output", output, "--returns", ",".join(FIELDS), "--quiet"]
    options += ["--device", "cpu", "--num-threads", threads]
    app(["score", *map(str, [source, *options])], standalone_mode=False)


def write_inputs(folder: Path, rollouts: Sequence[Rollout], ids: Sequence[Rollout]) -> dict[str, Path]:
    """The rollouts in each kind of file that the command is measured on."""
    jsonl, parquet = folder / "text.jsonl", folder / "ids.parquet"
    jsonl.write_text("".join(json.dumps({"prompt": r.prompt, "completion": r.completion}) + "\n" for r in rollouts))
    columns = {"prompt_ids": [r.prompt for r in ids], "completion_ids": [r.completion for r in ids]}
    pq.write_table(pa.table(columns), parquet)
    return {"text in JSON Lines": jsonl, "ids in Parquet": parquet}


def turns(scorer: Scorer, rollouts: Sequence[Rollout], folder: Path, threads: int) -> dict[str, Turn]:
    """Everything that is measured."""
    ids = [as_ids(rollout) for rollout in rollouts]
    model = ModelOnly(scorer, ids)
    files = write_inputs(folder, rollouts, ids)
    contestants: dict[str, Turn] = {
        "model": model.as_scored,
        "model, own attention": model.own_forward,
        "stream of ids": lambda: streamed(scorer, ids),
        "stream of text": lambda: streamed(scorer, rollouts),
        "text to Arrow": lambda: to_arrow(scorer, rollouts),
    }
    for name, source in files.items():
        output = folder / f"out{source.suffix}"
        contestants[f"command, {name}"] = lambda source=source, output=output: command(source, output, threads)
    return contestants


def timed(turn: Turn) -> Row:
    """Seconds by the clock and of the processor, the other threads' included."""
    wall, processor = time.perf_counter(), time.process_time()
    turn()
    return {"wall_s": time.perf_counter() - wall, "processor_s": time.process_time() - processor}


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--only", help="a part of a contestant's name, for profiling")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    scorer = Scorer.from_pretrained(demo_model_path(), device="cpu", num_threads=options.threads)
    rollouts = texts(options.prompts, options.completions)
    source = provenance(options.threads, options.rounds) | {"load_before": load_average(), "fields": FIELDS}
    document: dict[str, Any] = {"provenance": source, "times": []}
    shuffle = random.Random(0)  # noqa: S311, not a secret
    with tempfile.TemporaryDirectory() as folder:
        contestants = turns(scorer, rollouts, Path(folder), options.threads)
        source["workload"] = {"rollouts": len(rollouts), **_sizes(rollouts, scorer)}
        names = [name for name in contestants if options.only is None or options.only in name]
        for number in range(options.rounds):
            shuffle.shuffle(names)
            for name in names:
                row = {"round": number, "contestant": name, **timed(contestants[name])}
                print(f"round {number}, {name}: {row['wall_s']:.2f} s, {row['processor_s']:.2f} s", flush=True)
                document["times"].append(row)
    source["load_after"] = load_average()
    if options.only is None:
        options.output.write_text(json.dumps(document, indent=1) + "\n")
        print(f"wrote {options.output}")


def _sizes(rollouts: Sequence[Rollout], scorer: Scorer) -> dict[str, int]:
    ready = ModelOnly(scorer, [as_ids(rollout) for rollout in rollouts]).ready
    return {
        "tokens": sum(len(r.prompt.encode()) + len(r.completion.encode()) for r in rollouts),
        "computed_tokens": sum(each.work.batch.tokens for each in ready),
        "completion_tokens": sum(len(r.completion.encode()) for r in rollouts),
        "batches": len(ready),
    }


if __name__ == "__main__":
    main()
