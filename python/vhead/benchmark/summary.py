"""A run in lines of text: whether the bits are equal, what else holds, and the medians."""

from collections.abc import Iterator

from vhead.benchmark.cases import COPY, PASSES
from vhead.benchmark.document import Document, Row

OURS = "vhead.ops"
MODES = {
    "inference": "forward",
    "dropout": "forward, dropout 0.1",
    "backward": "backward, dropout 0.1",
    "training": "forward and backward, dropout 0.1",
}
LEGEND = "medians; GB/s counts the bytes that must move, no others; x: how many times as long as vhead.ops"


def facts(document: Document) -> Iterator[str]:
    """Everything but the times."""
    yield from source_lines(document.provenance)
    yield from comparison_lines(document)
    for row in document.checks:
        result = "holds" if row["passed"] else f"does NOT hold: {row['detail']}"
        yield f"check        {row['check']}: {result}"


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


def times(document: Document, mode: str) -> list[list[str]]:
    """A table of one mode, headings first: our median, its share of a copy's speed, the others' multiples of it."""
    cases = [case for case in document.cases() if case[0] == mode]
    peers = list(dict.fromkeys(name for c in cases for name in document.medians(*c) if name not in (OURS, COPY)))
    headings = ["hidden states", f"{OURS}, ms", "GB/s", "of a copy", *(f"{name}, x" for name in peers)]
    return [headings, *([_label(case), *_cells(document, case, peers)] for case in cases)]


def _label(case: tuple[str, tuple[int, ...], str]) -> str:
    _, (rows, columns), dtype = case
    return f"{rows} x {columns} {dtype}"


def _cells(document: Document, case: tuple[str, tuple[int, ...], str], peers: list[str]) -> Iterator[str]:
    mode, shape, dtype = case
    medians = document.medians(*case)
    ours = medians[OURS]
    copy = document.medians("inference", shape, dtype)[COPY]
    yield f"{ours / 1e3:.3f}"
    yield f"{document.timed(*case)[OURS]['gb_per_s']:.1f}"
    yield f"{PASSES[mode] / PASSES[COPY] * copy / ours:.0%}"
    yield from (f"{medians[name] / ours:.2f}" if name in medians else "" for name in peers)
