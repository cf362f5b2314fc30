"""Streams a million short rollouts through the demo model, and watches the process's memory: README.md."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from demo_workload import short
from measure import load_average, provenance

from vhead import Scorer
from vhead.demo import demo_model_path

RESULTS = Path(__file__).parent / "results" / "scoring-scale.json"
FIELDS = ("values", "logprobs", "reward")
COMPLETIONS, PROMPT, COMPLETION = 8, 12, 8
SAMPLES_PER_SECOND = 1.0
# What is made once, such as torch's buffers, is there after this part of the run.
WARM_UP = 0.1

Sample = dict[str, float]


class Samples:
    """How far a run has come, and how much memory a process holds, about once a second.

    Args:
        process: The id of the process that is watched.
    """

    def __init__(self, process: int) -> None:
        self.rows: list[Sample] = []
        self._folder = Path(f"/proc/{process}")
        self._started = time.perf_counter()

    def due(self) -> bool:
        """Whether it is time for another one."""
        return time.perf_counter() - self._started >= len(self.rows) / SAMPLES_PER_SECOND

    def take(self, rollouts: int) -> None:
        """One more."""
        # After the command's name, which is in brackets, come fields 3 and later; 14 and 15 are clock ticks.
        fields = (self._folder / "stat").read_text().rpartition(")")[2].split()
        resident = int((self._folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        if not resident:  # The process has ended.
            return
        self.rows.append(
            {
                "rollouts": rollouts,
                "wall_s": time.perf_counter() - self._started,
                "processor_s": (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
                "rss_bytes": resident,
            }
        )


def growth(samples: list[Sample]) -> dict[str, float]:
    """The line through resident memory after the warm-up, and the rate of the whole run."""
    last = samples[-1]
    # At the end a file is put together, which is not what grows with its length.
    settled = [row for row in samples if WARM_UP * last["rollouts"] <= row["rollouts"] < last["rollouts"]] or samples
    progress = np.array([row["rollouts"] for row in settled])
    memory = np.array([row["rss_bytes"] for row in settled]) / 2**20
    slope = float(np.polyfit(progress, memory, 1)[0]) if np.ptp(progress) else 0.0
    return {
        "mib_per_million_rollouts": slope * 1e6,
        "mib_at_first": float(memory[0]),
        "mib_at_last": float(memory[-1]),
        "mib_at_most": max(row["rss_bytes"] for row in samples) / 2**20,
        "rollouts_per_s": last["rollouts"] / last["wall_s"],
        "wall_s": last["wall_s"],
    }


def streamed(rollouts: int, threads: int) -> Iterator[list[Sample]]:
    """`Scorer.stream` over rollouts that are made as they are read; the samples so far, again and again."""
    torch.set_num_threads(threads)
    scorer = Scorer.from_pretrained(demo_model_path(), device="cpu", num_threads=threads)
    samples = Samples(os.getpid())
    done = 0
    for score in scorer.stream(short(rollouts, COMPLETIONS, PROMPT, COMPLETION), FIELDS):
        done = score.index + 1
        if samples.due():
            samples.take(done)
            yield samples.rows
    samples.take(done)
    yield samples.rows


def write_parquet(path: Path, rollouts: int) -> None:
    """The same rollouts as a file, a group of rows at a time."""
    schema = pa.schema({"id": pa.int64(), "prompt_ids": pa.list_(pa.int32()), "completion_ids": pa.list_(pa.int32())})
    source = short(rollouts, COMPLETIONS, PROMPT, COMPLETION)
    with pq.ParquetWriter(path, schema) as writer:
        while group := list(islice(source, 20_000)):
            columns = [[r.id for r in group], [r.prompt for r in group], [r.completion for r in group]]
            writer.write_table(pa.table(columns, schema=schema))


def command(rollouts: int, threads: int) -> Iterator[list[Sample]]:
    """`vhead score` from Parquet to Parquet in a process of its own; how far it is, it notes beside its output."""
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "in.parquet", Path(folder) / "out.parquet"
        write_parquet(source, rollouts)
        options = ["--model", demo_model_path(), "--output", output, "--returns", ",".join(FIELDS), "--device", "cpu"]
        arguments = [sys.executable, "-m", "vhead", "score", source, *options, "--num-threads", threads]
        with subprocess.Popen([str(argument) for argument in arguments]) as process:
            samples, done = Samples(process.pid), 0
            while process.poll() is None:
                if samples.due():
                    done = max(done, _noted(output))
                    samples.take(done)
                    yield samples.rows
                time.sleep(0.05)
        if process.returncode or pq.read_metadata(output).num_rows != rollouts:
            raise RuntimeError(f"vhead score ended with {process.returncode}")
        samples.rows[-1]["rollouts"] = rollouts
        yield samples.rows


def _noted(output: Path) -> int:
    try:
        return int(json.loads(output.with_name(f"{output.name}.partial.json").read_text())["records"])
    except FileNotFoundError:
        return 0


def main() -> None:
    """Runs both, and writes what is known so far after each sample."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rollouts", type=int, default=1_000_000)
    parser.add_argument("--parquet-rows", type=int, default=200_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    source = provenance(options.threads, 1) | {"load_before": load_average(), "fields": FIELDS}
    source["workload"] = {"prompt": PROMPT, "completions": COMPLETIONS, "completion": [2, COMPLETION]}
    document: dict[str, Any] = {"provenance": source}
    for name, run, asked in (("stream", streamed, options.rollouts), ("command", command, options.parquet_rows)):
        for samples in run(asked, options.threads) if asked else ():
            document[name] = {"asked": asked, **growth(samples), "samples": samples}
            source["load_after"] = load_average()
            write(options.output, document)
        if asked:
            print(f"{name}: " + ", ".join(f"{key} {value:,.1f}" for key, value in growth(samples).items()), flush=True)


def write(path: Path, document: dict[str, Any]) -> None:
    """Beside its place, and then there, so that a run that is stopped leaves a whole file."""
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(beside, path)


if __name__ == "__main__":
    main()
