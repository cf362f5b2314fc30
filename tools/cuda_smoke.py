"""Everything about the CUDA kernels that only a GPU can show, in one go, for whoever has one.

    python tools/cuda_smoke.py

It compares values, gradients and dropout masks with the CPU's bit by bit: three dtypes, hidden sizes from 1 to 5120,
one or three outputs, five layouts, NaN, infinities and subnormals. It checks that the head's own kernels run, on the
current stream, and that each replay of a captured CUDA graph draws a new mask; that initial weights and seeds are the
CPU's and torch's; that token statistics, candidates and the likeliest tokens among them, are as exact as from all
logits. Then it measures what `vhead bench --compile` measures.

All of it goes into one file, cuda_smoke.json, which is worth attaching to an issue whatever it says. The exit code is 1
where a bit differs or a check does not hold.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from vhead.benchmark.run import Request, check_compiler, run
from vhead.benchmark.summary import LEGEND, MODES, facts, times
from vhead.errors import BenchmarkError
from vhead.ops import backends


def main(words: list[str] | None = None) -> int:
    """Runs all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ...; cpu tries the script itself")
    parser.add_argument("--quick", action="store_true", help="compare and measure less")
    parser.add_argument("--output", type=Path, default=Path("cuda_smoke.json"))
    options = parser.parse_args(words)
    try:
        request = Request.usual(options.device, quick=options.quick)
        document = run(with_compiler(request), lambda step: print(f"{step} ...", file=sys.stderr))
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 1
    document.provenance["backends"] = backends()
    document.save(options.output)
    print("\n".join(facts(document)))
    for mode, title in MODES.items():
        print(f"\n{title}")
        print_table(times(document, mode))
    print(f"\n{LEGEND}\nall figures are in {options.output}")
    return 0 if document.passed else 1


def with_compiler(request: Request) -> Request:
    """The same with `torch.compile` among the contestants, where it works and there is time for it."""
    if request.quick:
        return request
    try:
        check_compiler(request.device)
    except BenchmarkError as error:
        print(f"left out: {error}", file=sys.stderr)
        return request
    return replace(request, compiles=True)


def print_table(rows: list[list[str]]) -> None:
    """Columns as wide as they must be."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


if __name__ == "__main__":
    sys.exit(main())
