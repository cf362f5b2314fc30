"""What `vhead bench` prints: whether the bits are equal, what else holds, and the medians."""

from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table

from vhead.benchmark.cases import COPY, PASSES
from vhead.benchmark.document import Document, Row

OURS = "vhead.ops"
LEGEND = "medians; GB/s counts the bytes that must move, no others; x: how many times as long as vhead.ops"
MODES = {
    "inference": "forward",
    "dropout": "forward, dropout 0.1",
    "backward": "backward, dropout 0.1",
    "training": "forward and backward, dropout 0.1",
}


def report(console: Console, document: Document) -> None:
    """Prints a run."""
    for line in (*source_lines(document.provenance), *comparison_lines(document), *check_lines(document)):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    for mode, title in MODES.items():
        console.print()
        console.print(times_table(document, mode, title))
    console.print()
    console.print(LEGEND, highlight=False, soft_wrap=True, markup=False)


def source_lines(source: Row) -> Iterator[str]:
    """Where the figures come from."""
    name = source["device_name"] or source["cpu"]
    yield f"device       {source['device']}: {name}"
    yield f"backend      {', '.join(f'{key} {value}' for key, value in source['backend'].items())}"
    yield (
        f"versions     vhead {source['vhead']}, torch {source['torch']}, Python {source['python']}; "
        f"{source['torch_threads']} threads; load {source['load_before']:.1f} to {source['load_after']:.1f}"
    )
    yield from (f"note         {note}" for note in source["notes"])


def comparison_lines(document: Document) -> Iterator[str]:
    """Which bits were compared, and which differ."""
    rows = document.comparisons
    elements = sum(row["elements"] for row in rows)
    compared = ", ".join(dict.fromkeys(row["what"] for row in rows))
    if document.equal:
        yield f"bits         equal to the CPU's: {compared}; {elements:,} numbers"
    for row in rows:
        if row["differing"]:
            yield (
                f"bits         NOT equal: {row['what']} in {row['dtype']}: {row['differing']:,} of "
                f"{row['elements']:,} differ, first: {row['first']}"
            )


def check_lines(document: Document) -> Iterator[str]:
    """Each check and whether it holds."""
    for row in document.checks:
        result = "holds" if row["passed"] else f"does NOT hold: {row['detail']}"
        yield f"check        {row['check']}: {result}"


def times_table(document: Document, mode: str, title: str) -> Table:
    """A line for each shape and dtype: our median, its share of a copy's speed, and the others' multiples of it."""
    cases = [case for case in document.cases() if case[0] == mode]
    peers = dict.fromkeys(name for case in cases for name in document.medians(*case) if name not in (OURS, COPY))
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("hidden states")
    for heading in (f"{OURS}, ms", "GB/s", "of a copy", *(f"{name}, x" for name in peers)):
        table.add_column(heading, justify="right")
    for case in cases:
        table.add_row(f"{case[1][0]} x {case[1][1]} {case[2]}", *_cells(document, case, list(peers)))
    return table


def _cells(document: Document, case: tuple[str, tuple[int, ...], str], peers: list[str]) -> Iterator[str]:
    mode, shape, dtype = case
    medians = document.medians(*case)
    ours = medians[OURS]
    copy = document.medians("inference", shape, dtype)[COPY]
    yield f"{ours / 1e3:.3f}"
    yield f"{_gb_per_s(document, case):.1f}"
    yield f"{PASSES[mode] / PASSES[COPY] * copy / ours:.0%}"
    yield from (f"{medians[name] / ours:.2f}" if name in medians else "" for name in peers)


def _gb_per_s(document: Document, case: tuple[str, tuple[int, ...], str]) -> float:
    mode, shape, dtype = case
    key = (mode, list(shape), dtype, OURS)
    rows = (r for r in document.times if (r["mode"], r["shape"], r["dtype"], r["implementation"]) == key)
    return float(next(rows)["gb_per_s"])
