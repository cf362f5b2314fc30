"""Writes results/head.md from results/head.json: the figures that this project set out to reach, and all times.

Other data than head.json can be named; its report is written beside it.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from results import FILE, Results

SHAPE = (8192, 2048)
DTYPES = ("float32", "bfloat16", "float16")
INFERENCE_GOALS = {"float32": 1.0, "bfloat16": 20.0, "float16": 20.0}
TRAINING_GOALS = {"float32": 12.0, "bfloat16": 20.0}
READ_GOAL = 1.3
CALL_GOAL_US = 3.0
COLUMNS = ("trl", "torch", "vhead", "vhead.ops", "linear", "read")
QUANTITIES = ("values", "grad_hidden", "grad_weight", "grad_bias")


def main() -> None:
    """Writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, nargs="?", default=FILE)
    data = parser.parse_args().data
    data.with_suffix(".md").write_text(report(Results.load(data), data.name))


def report(results: Results, name: str) -> str:
    """The page about one run: a section for all that it has."""
    sections = [list(part(results)) for part in (source, bits, goals, times, errors)]
    text = "\n\n".join("\n".join(lines) for lines in sections if lines)
    return f"<!-- Written by benchmarks/report.py from {name}. -->\n{text}\n"


def source(results: Results) -> Iterator[str]:
    """Where the figures come from."""
    p = results.provenance
    where = f"{p['device_name']}, " if p.get("device_name") else ""
    commit = f"commit {p['commit'][:12]}" if "commit" in p else f"vhead {p['vhead']}"
    yield (
        f"{where}{p['cpu']}, {p['cores']} cores ({p['torch_capability']}), {p['torch_threads']} threads; "
        f"torch {p['torch']}, trl {p['trl'] or 'not installed'}, Python {p['python']}; {commit}"
        f"{' with uncommitted sources' if p.get('uncommitted_sources') else ''}, {p['date']}; {p['rounds']} rounds; "
        f"load average {p['load_before']:.1f} before, {p['load_after']:.1f} after"
        f"{''.join(f'; {name}={value}' for name, value in p['environment'].items())}."
    )


def bits(results: Results) -> Iterator[str]:
    """What was compared with the CPU, and what else was checked."""
    if results.comparisons:
        yield from ("| compared with the CPU | dtype | cases | numbers | that differ |", "|---" * 5 + "|")
    for row in results.comparisons:
        yield f"| {row['what']} | {row['dtype']} | {row['cases']:,} | {row['elements']:,} | {row['differing']:,} |"
    for row in results.checks:
        yield f"\n{row['check']}: {'holds' if row['passed'] else '**does not hold**: ' + row['detail']}."


def goals(results: Results) -> Iterator[str]:
    """Each goal and what was measured, where TRL's head and the goal's shape are among what was."""
    rows = [*inference_goals(results), *training_goals(results), *accuracy_goals(results)]
    if rows:
        yield from ("| figure | goal | measured | reached |", "|---|---|---|---|", *rows)


def inference_goals(results: Results) -> Iterator[str]:
    """Speed over TRL's head and over a pass that only reads."""
    for dtype in DTYPES:
        t = results.milliseconds("inference", SHAPE, dtype)
        if {"trl", "vhead", "read"} <= set(t):
            yield goal(f"inference {dtype}: speed over TRL", INFERENCE_GOALS[dtype], t["trl"] / t["vhead"])
            yield ceiling(f"inference {dtype}: time over a reading pass", READ_GOAL, t["vhead"] / t["read"], "×")


def training_goals(results: Results) -> Iterator[str]:
    """Speed over TRL's head, bytes kept for backward, and what a call costs."""
    for dtype, least in TRAINING_GOALS.items():
        t = results.milliseconds("training", SHAPE, dtype)
        if {"trl", "vhead"} <= set(t):
            yield goal(f"training {dtype}, dropout 0.1: speed over TRL", least, t["trl"] / t["vhead"])
    for dtype in DTYPES:
        kept = results.kept(SHAPE, dtype)
        if {"trl", "vhead"} <= set(kept):
            name = f"training {dtype}: bytes kept beyond the hidden states (TRL: {kept['trl']:,})"
            yield ceiling(name, 8, kept["vhead"], " bytes, a seed")
    call = results.milliseconds("call", (4, 16), "float32")
    if call:
        added = (call["vhead.ops"] - call["linear"]) * 1e3
        yield ceiling("`ops.value_head` on [4, 16]: added to a call of `F.linear`", CALL_GOAL_US, added, " µs")


def accuracy_goals(results: Results) -> Iterator[str]:
    """Our error over TRL's, the worst of every dtype, dropout and seed."""
    for what in QUANTITIES if results.errors else ():
        for measure, name in (("max_error", "largest"), ("rms_error", "root mean square")):
            ratios = []
            for dtype in DTYPES:
                for dropout in (0.0, 0.1):
                    e = results.worst(SHAPE, dtype, dropout, what, measure)
                    ratios.append(e["vhead"] / e["trl"])
            yield ceiling(f"{what}: {name} error over TRL's, worst case", 1.0, max(ratios), "×")


def goal(name: str, least: float, measured: float) -> str:
    """A row for a figure that should be high."""
    return f"| {name} | ≥ {least:g}× | {measured:.3g}× | {'yes' if measured >= least else '**no**'} |"


def ceiling(name: str, most: float, measured: float, unit: str) -> str:
    """A row for a figure that should be low."""
    return f"| {name} | ≤ {most:g}{unit} | {measured:.3g}{unit} | {'yes' if measured <= most else '**no**'} |"


def times(results: Results) -> Iterator[str]:
    """Every median."""
    cases = sorted(results.cases(), key=lambda case: case[:2])
    medians = {case: results.milliseconds(*case) for case in cases}
    found = dict.fromkeys(name for t in medians.values() for name in t)
    names = sorted(found, key=lambda name: COLUMNS.index(name) if name in COLUMNS else len(COLUMNS))
    yield from (f"| median, ms | hidden | dtype | {' | '.join(names)} |", "|---" * (3 + len(names)) + "|")
    for (mode, shape, dtype), t in medians.items():
        cells = " | ".join(f"{t[name]:.3g}" if name in t else "" for name in names)
        yield f"| {mode} | {list(shape)} | {dtype} | {cells} |"


def errors(results: Results) -> Iterator[str]:
    """Largest and root-mean-square errors against float64."""
    if not results.errors:
        return
    names = ("trl", "torch", "vhead")
    yield from (f"| error against float64, max (rms) | dtype | dropout | {' | '.join(names)} |", "|---" * 6 + "|")
    for what in QUANTITIES:
        for dtype in DTYPES:
            for dropout in (0.0, 0.1):
                worst, rms = (results.worst(SHAPE, dtype, dropout, what, m) for m in ("max_error", "rms_error"))
                cells = " | ".join(f"{worst[name]:.2g} ({rms[name]:.2g})" for name in names)
                yield f"| {what} | {dtype} | {dropout:g} | {cells} |"


if __name__ == "__main__":
    main()
