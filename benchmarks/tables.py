"""What every page of figures is made of: where they come from, tables, and goals with what was measured."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from vhead.benchmark.document import Row

Data: TypeAlias = dict[str, Any]
Page: TypeAlias = Callable[[Data], Iterator[str]]

RESULTS = Path(__file__).parent / "results"
MEASURES = {"wall_s": "by the clock", "processor_s": "in processor time"}
GOALS = ("| figure | goal | measured | reached |", "|---" * 4 + "|")


def write(path: Path, page: Page) -> Path:
    """Writes the page about the figures in a file, beside it."""
    lines = [f"<!-- Written by benchmarks/report.py from {path.name}. -->", *page(json.loads(path.read_text()))]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    return path.with_suffix(".md")


def source(p: Row) -> str:
    """Where the figures come from."""
    where = f"{p['device_name']}, " if p.get("device_name") else ""
    versions = ", ".join(f"{name} {p[name] or 'not installed'}" for name in ("torch", "transformers", "trl"))
    commit = f"commit {p['commit'][:12]}" if "commit" in p else f"vhead {p['vhead']}"
    uncommitted = " with uncommitted sources" if p.get("uncommitted_sources") else ""
    load = f"; load average {p['load_before']:.1f} before, {p['load_after']:.1f} after" if "load_before" in p else ""
    settings = "".join(f"; {name}={value}" for name, value in p["environment"].items())
    return (
        f"{where}{p['cpu']}, {p['cores']} cores ({p['torch_capability']}), {p['torch_threads']} threads; {versions}, "
        f"Python {p['python']}; {commit}{uncommitted}, {p['date']}; rounds: {p['rounds']}{load}{settings}."
    )


def table(headings: str) -> tuple[str, str]:
    """The first two lines of a table."""
    return headings, "|---" * (headings.count("|") - 1) + "|"


def judged(name: str, goal: str, measured: str, *, reached: bool) -> str:
    """A row of the table of goals."""
    return f"| {name} | {goal} | {measured} | {'yes' if reached else '**no**'} |"


def at_least(name: str, goal: float, measured: float) -> str:
    """A row for a figure that should be high."""
    return judged(name, f"≥ {goal:g}×", f"{measured:.3g}×", reached=measured >= goal)


def at_most(name: str, goal: float, measured: float, unit: str = "×") -> str:
    """A row for a figure that should be low."""
    return judged(name, f"≤ {goal:g}{unit}", f"{measured:.3g}{unit}", reached=measured <= goal)


def share(name: str, goal: float, measured: float) -> str:
    """A row for a share that should be high."""
    return judged(name, f"≥ {goal:.0%}", f"{measured:.0%}", reached=measured >= goal)
