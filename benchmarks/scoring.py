"""Measures the scorer against TRL's loop, against its own mechanisms one by one, and against the machine: README.md."""

import argparse
import json
import multiprocessing
import random
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import load_average, provenance
from scoring_peers import ALL_FIELDS, VALUES, Score, contestants, language_model, sizes, workload
from transformers import PreTrainedModel

from vhead import Rollout

RESULTS = Path(__file__).parent / "results" / "scoring.json"
LABELS = {VALUES: "values", ALL_FIELDS: "all fields"}
# Each is measured in a process of its own, as the allocator keeps what an earlier one has freed.
MEASURED_MEMORY = ("vhead", "sorted batches", "batch-invariant", "trl")

Row = dict[str, object]


@dataclass(frozen=True)
class Setting:
    """The model's layers, the workload's size, and torch's threads."""

    layers: int
    prompts: int
    completions: int
    threads: int

    def build(self) -> tuple[PreTrainedModel, list[Rollout]]:
        """The language model and the rollouts."""
        torch.set_num_threads(self.threads)
        return language_model(self.layers), workload(self.prompts, self.completions)


def times(setting: Setting, rounds: int) -> Iterator[Row]:
    """Wall and processor seconds of every contestant on every set of fields, which take turns.

    The first round goes in the order of the list, later ones in random order.
    """
    body, rollouts = setting.build()
    turns = [(each.name, each.make(body, rollouts), fields) for each in contestants() for fields in each.fields]
    shuffle = random.Random(0)  # noqa: S311, not a secret
    for number in range(rounds):
        if number:
            shuffle.shuffle(turns)
        for name, score, fields in turns:
            row = {"round": number, "contestant": name, "fields": LABELS[fields], **_timed(score, fields)}
            print(f"round {number}, {name}, {LABELS[fields]}: {row['wall_s']:.2f} s", flush=True)
            yield row


def _timed(score: Score, fields: tuple[str, ...]) -> Row:
    load = load_average()
    wall, processor = time.perf_counter(), time.process_time()
    score(fields)
    seconds = {"wall_s": time.perf_counter() - wall, "processor_s": time.process_time() - processor}
    return seconds | {"load_before": load, "load_after": load_average()}


def memory(setting: Setting) -> Iterator[Row]:
    """The peak of resident memory above the loaded model, of each contestant in a fresh process."""
    spawn = multiprocessing.get_context("spawn")
    for name, fields in [(each.name, fields) for each in contestants() for fields in each.fields]:
        if name in MEASURED_MEMORY:
            label = LABELS[fields]
            with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as process:
                extra = process.submit(extra_bytes, name, fields, setting).result()
            print(f"{name}, {label}: {extra / 2**20:.0f} MiB", flush=True)
            yield {"contestant": name, "fields": label, "extra_bytes": extra}


def extra_bytes(name: str, fields: tuple[str, ...], setting: Setting) -> int:
    """Runs one contestant, and says by how much resident memory rose at most."""
    body, rollouts = setting.build()
    score = next(each for each in contestants() if each.name == name).make(body, rollouts)
    # Every weight is touched, as pages of a model that was never run would count for its first user.
    for parameter in body.parameters():
        parameter.detach().sum()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    score(fields)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    setting = Setting(options.layers, options.prompts, options.completions, options.threads)
    source = provenance(options.threads, options.rounds) | {"layers": options.layers, "load_before": load_average()}
    source |= {"workload": sizes(workload(options.prompts, options.completions))}
    document: dict[str, Any] = {"provenance": source, "times": [], "memory": []}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for name, rows in (("times", times(setting, options.rounds)), ("memory", memory(setting))):
        for row in rows:
            document[name] += [row]
            source["load_after"] = load_average()
            # After each row, as a run takes long.
            options.output.write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
