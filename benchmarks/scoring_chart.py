"""Draws the scorer's pictures from the data in results/: docs/images/scoring*.png, and the same as .svg."""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from scoring_report import FILE, Results

IMAGES = Path(__file__).parent.parent / "docs" / "images"
RESULTS = Path(__file__).parent / "results"
OURS, PEER, PALE, TEXT = "#c2410c", "#b3b3b3", "#d9d9d9", "#555555"
BAR = 0.2

# Contestants of the two groups of bars, from the top, each with its label and colour.
BARS = {
    "trl": ("TRL 1.12: values and log-probabilities, no entropies", PEER),
    "trl, forward only": ("TRL 1.12, forward only: values", PALE),
    "sorted batches": ("vhead, length-sorted batches", "#fdba74"),
    "vhead": ("vhead", OURS),
}
LIMIT = "the matrix products of vhead's work alone, with nothing around them"
GROUPS = {"values": "values", "all fields": "values, log-\nprobabilities,\nentropies,\nrewards"}
COLOURS = {"values": "#fb923c", "all fields": OURS}
AXES = {
    "rollouts": "rollouts",
    "vocabulary": "vocabulary",
    "completions per prompt": "completions of each prompt",
    "completion length": "tokens of a completion",
}


def main() -> None:
    """Draws every picture whose data is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, default=IMAGES)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    # The same picture is the same file.
    mpl.rcParams["svg.hashsalt"] = "vhead"
    options.images.mkdir(parents=True, exist_ok=True)
    pictures = {"scoring": scoring, "scoring-growth": growth, "scoring-scale": scale}
    for name, draw in pictures.items():
        data = options.results / (FILE.name if name == "scoring" else f"{name}.json")
        if data.exists():
            save(draw(json.loads(data.read_text())), options.images / name)


def save(figure: Figure, path: Path) -> None:
    """As a bitmap and as a drawing, both on white, so that they can be read on a dark page as well."""
    figure.savefig(path.with_suffix(".png"), facecolor="white", dpi=160)
    figure.savefig(path.with_suffix(".svg"), facecolor="white", metadata={"Date": None})
    pyplot.close(figure)


def scoring(data: Mapping[str, Any]) -> Figure:
    """Time of every contestant, and peak memory."""
    results = Results(**data)
    figure, (times, memory) = pyplot.subplots(
        1, 2, figsize=(10, 4.5), layout="constrained", gridspec_kw={"width_ratios": [2, 1]}
    )
    draw_times(times, results)
    draw_memory(memory, results)
    handles, labels = times.get_legend_handles_labels()
    found = dict(zip(labels, handles, strict=True))
    # One column, so that it is read in the bars' order.
    shown = [label for label in (*(label for label, _ in BARS.values()), LIMIT) if label in found]
    figure.legend([found[label] for label in shown], shown, loc="outside upper left", frameon=False, fontsize=8)
    work = results.provenance["workload"]
    about = f"{work['rollouts']} rollouts of {work['tokens']:,} tokens, Qwen2-0.5B's shape with"
    figure.supxlabel(
        f"{about} {results.provenance['layers']} layers, float32; {where(results.provenance)}", fontsize=8, color=TEXT
    )
    return figure


def draw_times(axes: Axes, results: Results) -> None:
    """A group of bars for each set of fields, and a line where the bare matrix products alone would end."""
    for group, fields in enumerate(GROUPS):
        for y, name in rows(results, group, fields):
            label, colour = BARS[name]
            seconds = measured(results.median, name, fields) or 0.0
            axes.barh(y, seconds, BAR * 0.9, color=colour, label=label)
            note(axes, seconds, y, annotation(results, name, fields, seconds))
        limit = results.median("bare GEMM", fields)
        if limit is not None:
            axes.vlines(limit, group - 0.45, group + 0.45, color="black", linewidth=1, label=LIMIT)
    axes.set_yticks(range(len(GROUPS)), GROUPS.values(), fontsize=8)
    axes.set_ylim(-0.5, len(GROUPS) - 0.5)
    finish(axes, "Seconds")


def rows(results: Results, group: int, fields: str) -> Iterator[tuple[float, str]]:
    """Where the bars of a group stand, without gaps: one for each contestant that was timed."""
    present = [name for name in BARS if measured(results.median, name, fields) is not None]
    for slot, name in enumerate(present):
        yield group + (slot - (len(present) - 1) / 2) * BAR, name


def measured(figure: Callable[[str, str], float | None], name: str, fields: str) -> float | None:
    """A contestant's figure; TRL has one loop for both sets of fields."""
    found = figure(name, fields)
    return figure(name, "all fields") if found is None and name == "trl" else found


def annotation(results: Results, name: str, fields: str, seconds: float) -> str:
    """The time, and for ours how often faster than the peer."""
    if name != "vhead":
        return f"{seconds:.1f}"
    text = f"{seconds:.1f}: {results.ratio(name, fields):.1f}× TRL's speed"
    forward = results.ratio(name, fields, peer="trl, forward only") if fields == "values" else None
    return text if forward is None else f"{text}, {forward:.1f}× forward only"


def draw_memory(axes: Axes, results: Results) -> None:
    """The peak above the model."""
    for group, fields in enumerate(GROUPS):
        for y, name in rows(results, group, fields):
            mib = measured(results.extra_mib, name, fields)
            if mib is not None:
                axes.barh(y, mib, BAR * 0.9, color=BARS[name][1])
                note(axes, mib, y, f"{mib:,.0f}")
    axes.set_ylim(-0.5, len(GROUPS) - 0.5)
    axes.set_yticks([])
    finish(axes, "Peak memory above the model, MiB")


def note(axes: Axes, x: float, y: float, text: str) -> None:
    """A figure behind its bar."""
    axes.annotate(text, (x, y), (4, 0), textcoords="offset points", va="center", fontsize=8)


def finish(axes: Axes, title: str) -> None:
    """What both panels of bars have."""
    axes.invert_yaxis()
    axes.set_xlim(0, axes.get_xlim()[1] * 1.14)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_title(title, loc="left", fontsize=10)


def growth(data: Mapping[str, Any]) -> Figure:
    """Processor time of a token as something grows, a panel each."""
    figure, panels = pyplot.subplots(1, 4, figsize=(12, 3.4), layout="constrained", sharey=True)
    for axes, (axis, label) in zip(panels, AXES.items(), strict=True):
        for fields, colour in COLOURS.items():
            points = dict(cost(data["times"], axis, fields))
            axes.plot(points.keys(), points.values(), "o-", color=colour, label=fields, markersize=3.5, linewidth=1.5)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = list(points)[:: 1 + len(points) // 5]
        axes.set_xticks(ticks, [short(tick) for tick in ticks], fontsize=8)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(label, fontsize=9)
        axes.grid(visible=True, color="#eeeeee")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", labelsize=8)
    panels[0].set_ylabel("processor µs per token", fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False, fontsize=8)
    base = data["provenance"]["base"]
    rollouts = f"{base['prompts']} prompts of {base['prompt']} tokens with {base['completions']} completions each"
    figure.supxlabel(
        f"per token of prompts and completions, shared or not; {rollouts} of {base['completion']} tokens, unless the "
        f"axis says otherwise (third panel: 192 and 32)\n"
        f"Llama of 4 layers, hidden size 256, vocabulary {base['vocabulary']:,}, float32; {where(data['provenance'])}",
        fontsize=8,
        color=TEXT,
    )
    return figure


def cost(times: list[Mapping[str, Any]], axis: str, fields: str) -> Iterator[tuple[int, float]]:
    """Processor microseconds of a token at each place of an axis, the median over the rounds."""
    rows = [row for row in times if (row["axis"], row["fields"]) == (axis, fields)]
    for at in sorted({row["at"] for row in rows}):
        yield at, statistics.median(row["processor_s"] / row["tokens"] * 1e6 for row in rows if row["at"] == at)


def short(count: int) -> str:
    """A power of two as people write it."""
    return f"{count // 1024}k" if count >= 1024 else f"{count}"


def scale(data: Mapping[str, Any]) -> Figure:
    """Resident memory along long runs."""
    figure, axes = pyplot.subplots(figsize=(10, 3.2), layout="constrained")
    labels = {"stream": ("Scorer.stream", OURS), "command": ("vhead score, Parquet", "#fb923c")}
    for name, (label, colour) in labels.items():
        if name in data:
            # Before the first record a model is loaded; after the last one a file is put together.
            asked = data[name]["asked"]
            rows = [row for row in data[name]["samples"] if 0 < row["rollouts"] < asked]
            counts = [row["rollouts"] / 1e3 for row in rows]
            axes.plot(counts, [row["rss_bytes"] / 2**20 for row in rows], color=colour, label=label, linewidth=1.5)
    axes.set_title("Resident memory, MiB", loc="left", fontsize=10)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.1)
    axes.set_xlabel("thousands of rollouts", fontsize=9)
    axes.grid(visible=True, color="#eeeeee")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False, fontsize=8)
    work = data["provenance"]["workload"]
    figure.supxlabel(
        f"the demo model; prompts of {work['prompt']} tokens, {work['completions']} completions each of "
        f"{work['completion'][0]} to {work['completion'][1]}; {where(data['provenance'])}",
        fontsize=8,
        color=TEXT,
    )
    return figure


def where(provenance: Mapping[str, Any]) -> str:
    """The machine in a few words."""
    return f"{provenance['cpu']}, {provenance['torch_threads']} threads, torch {provenance['torch']}"


if __name__ == "__main__":
    main()
