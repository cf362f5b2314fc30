"""What another program that takes a core costs `vhead score`: 4,000 short rollouts, on the demo model.

The command runs as a user would call it, in a process of its own, on the machine as it is and beside a loop that keeps
one core busy, each with its own choice of threads and with one thread. The four take turns in random order.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path

import report
from measure import Figures, add_options
from workloads import texts

from vhead.benchmark.document import Row
from vhead.benchmark.timing import load_average, turns
from vhead.cli.threads import COUNTING, WAITING
from vhead.demo import demo_model_path


def measure(folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    """One row for each run of the command."""
    source = folder / "rollouts.jsonl"
    rollouts = texts(options.rollouts // 8, 8)
    source.write_text("".join(json.dumps({"prompt": r.prompt, "completion": r.completion}) + "\n" for r in rollouts))
    for number, (machine, threads) in turns(product(report.MACHINES, report.THREADS), options.rounds):
        with busy_core() if machine == report.BUSY else nullcontext():
            row = {"round": number, "machine": machine, "threads": threads, "seconds": command_seconds(source, threads)}
        print(f"round {number}, {machine}, {threads}: {row['seconds']:.2f} s", flush=True)
        yield row | {"load": load_average()}


def command_seconds(source: Path, threads: str) -> float:
    """The time of a whole command, the start of Python and the loading of the model among it."""
    command = [sys.executable, "-m", "vhead", "score", source, "--model", demo_model_path(), "--device", "cpu"]
    command += ["--output", source.with_stem("scores"), "--overwrite", "--quiet"]
    command += ["--num-threads", "1"] if threads == report.ONE_THREAD else []
    # What the command chooses for itself is measured, and not what this shell says.
    environment = {name: value for name, value in os.environ.items() if name not in (*WAITING, *COUNTING)}
    start = time.perf_counter()
    subprocess.run(command, env=environment, check=True)
    return time.perf_counter() - start


@contextmanager
def busy_core() -> Iterator[None]:
    """Keeps one of the cores that this process may use busy, with a loop in a process of its own."""
    core = min(os.sched_getaffinity(0))
    loop = f"import os\nos.sched_setaffinity(0, [{core}])\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", loop]) as process:
        try:
            yield
        finally:
            process.kill()


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "busy-machine", rounds=3, rollouts=4000)
    options = parser.parse_args()
    figures = Figures(options, rollouts=options.rollouts)
    with tempfile.TemporaryDirectory() as folder:
        figures.add("times", measure(Path(folder), options))
    figures.close(report.busy_machine)


if __name__ == "__main__":
    _main()
