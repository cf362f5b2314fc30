"""Draws docs/images/head.png, the README chart, from results/head.json."""

from pathlib import Path

import matplotlib as mpl

mpl.use("agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from results import FILE, Results

IMAGES = Path(__file__).parent.parent / "docs" / "images"
SHAPE = (8192, 2048)
DTYPES = ("float32", "bfloat16", "float16")
SERIES = {"trl": ("TRL 1.12", "#b3b3b3"), "torch": ("plain torch", "#d9d9d9"), "vhead": ("vhead", "#c2410c")}
LIMIT = "reading the hidden states once, and computing nothing"
BAR = 0.26


def main() -> None:
    """Draws."""
    results = Results.load(FILE)
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    titles = {"inference": "Inference", "training": "Training step, dropout 0.1: forward and backward"}
    for axes, (mode, title) in zip(panels, titles.items(), strict=True):
        draw(axes, results, mode, title)
    handles, labels = panels[0].get_legend_handles_labels()
    found = dict(zip(labels, handles, strict=True))
    # In the bars' order.
    shown = [label for label in (*(label for label, _ in SERIES.values()), LIMIT) if label in found]
    handles = [found[label] for label in shown]
    figure.legend(handles, shown, loc="outside upper right", ncols=4, frameon=False, fontsize=8)
    figure.supxlabel(f"milliseconds for hidden states {list(SHAPE)}, {where(results)}", fontsize=8, color="#555555")
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / "head.png", facecolor="white", dpi=160)


def draw(axes: Axes, results: Results, mode: str, title: str) -> None:
    """One panel: a group of bars a dtype, a line where reading the bytes alone would end."""
    for group, dtype in enumerate(DTYPES):
        times = results.milliseconds(mode, SHAPE, dtype)
        for slot, (name, (label, colour)) in enumerate(SERIES.items()):
            y = group + (slot - 1) * BAR
            axes.barh(y, times[name], BAR * 0.9, color=colour, label=label if group == 0 else None)
            axes.annotate(
                annotation(name, times), (times[name], y), (4, 0), textcoords="offset points", va="center", fontsize=8
            )
        if "read" in times:
            label = LIMIT if group == 0 else None
            axes.vlines(times["read"], group - 0.45, group + 0.45, color="black", linewidth=1, label=label)
    axes.set_yticks(range(len(DTYPES)), DTYPES)
    axes.invert_yaxis()
    axes.set_xlim(0, axes.get_xlim()[1] * 1.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize=10)


def annotation(name: str, times: dict[str, float]) -> str:
    """The time, and for ours how often it goes into TRL's."""
    text = f"{times[name]:.3g} ms"
    return f"{text}: {times['trl'] / times[name]:.2g}× TRL's speed" if name == "vhead" else text


def where(results: Results) -> str:
    """The machine in a few words."""
    source = results.provenance
    return f"{source['cpu']}, {source['torch_threads']} threads, torch {source['torch']}"


if __name__ == "__main__":
    main()
