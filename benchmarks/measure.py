"""What every measuring script does in the same way: options, figures that are saved as they come, and memory."""

import argparse
import multiprocessing
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

import report

from vhead.benchmark import machine
from vhead.benchmark.document import Row, write_figures
from vhead.benchmark.timing import load_average

ROOT = Path(__file__).parent.parent

Result = TypeVar("Result")


def add_options(parser: argparse.ArgumentParser, name: str | None, **counts: int) -> None:
    """Threads, the counts of a measurement with what they usually are, and where to write: None where that depends."""
    for option, usual in {**counts, "threads": 2}.items():
        parser.add_argument(f"--{option.replace('_', '-')}", type=int, default=usual)
    parser.add_argument("--output", type=Path, default=name and report.RESULTS / f"{name}.json")


class Figures:
    """The figures of a run under way, written after each change, since a run takes long and may be stopped."""

    def __init__(self, options: argparse.Namespace, **about: object) -> None:
        self._output = options.output
        self._output.parent.mkdir(parents=True, exist_ok=True)
        # Uncommitted changes of what runs here would make a figure nobody's.
        changed = bool(_git("status", "--porcelain", "--", "rust", "python/vhead", "benchmarks/*.py"))
        self._provenance = machine.provenance(options.threads, getattr(options, "rounds", 1)) | about
        self._provenance |= {"commit": _git("rev-parse", "HEAD"), "uncommitted_sources": changed}
        self._provenance["load_before"] = load_average()
        self._document: dict[str, object] = {"provenance": self._provenance}

    def put(self, name: str, figures: object) -> None:
        """Replaces the figures of this name."""
        self._document[name] = figures
        self._provenance["load_after"] = load_average()
        write_figures(self._output, self._document)

    def add(self, name: str, rows: Iterable[Row]) -> None:
        """Appends rows, each as soon as it is measured."""
        measured = self._document.setdefault(name, [])
        for row in rows:
            measured.append(row)
            self.put(name, measured)

    def close(self, page: report.Page) -> None:
        """Writes the page about them."""
        print(f"wrote {self._output} and {report.write(self._output, page).name}")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def in_fresh_process(function: Callable[..., Result], *arguments: object) -> Result:
    """What a function of a script gives in a new interpreter, whose allocator has kept nothing of earlier work."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as process:
        return process.submit(function, *arguments).result()


def memory(field: str, process: int | str = "self") -> int:
    """Bytes in a field of the process' status: `VmRSS`, its peak `VmHWM`, `RssAnon`; 0 when it has ended."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)


def extra_bytes(work: Callable[[], object]) -> int:
    """By how much this process' resident memory rises at most while it works."""
    Path("/proc/self/clear_refs").write_text("5")  # The peak is counted anew from here.
    before = memory("VmRSS")
    work()
    return memory("VmHWM") - before
