"""`vhead bench`: the head's bits and times on this machine."""

import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vhead.cli.failure import FAILED, reported
from vhead.cli.terminal import say
from vhead.env import MOST_THREADS
from vhead.errors import naming

if TYPE_CHECKING:
    from vhead.benchmark.document import Document
    from vhead.benchmark.run import Request


class BenchDtype(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def bench(
    *,
    device: Annotated[
        str | None,
        typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1, ... Default: cuda if there is one, otherwise cpu."),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            "--shape",
            metavar="NxH",
            help="Rows and hidden size, such as 8192x2048. Give the option again for more than one.",
        ),
    ] = None,
    dtype: Annotated[
        list[BenchDtype] | None,
        typer.Option(
            "--dtype",
            metavar="DTYPE",
            help="Dtype of the hidden states: float32, bfloat16 or float16. Give the option again for more than one.",
        ),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=2, help="How many times each contestant is timed. Default: 21.")
    ] = None,
    num_threads: Annotated[
        int | None, typer.Option(min=1, max=MOST_THREADS, help="CPU threads. Default: those that this process may use.")
    ] = None,
    compiles: Annotated[
        bool, typer.Option("--compile", help="Measure plain torch under torch.compile as well.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A first look in under 20 seconds.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write all figures as JSON.")] = None,
) -> None:
    """Measure the value head on this machine, against plain torch in the steps of TRL's head.

    First its values, gradients and dropout masks are compared bit by bit: a device's with the CPU's, and on the CPU
    those of every layout of hidden states with contiguous rows. Then all contestants take turns, and the figures are
    medians. TRL's own class is among them if a release is installed that has one.

    Exit codes: 0 done, 1 failed, or a bit differs or a check does not hold, 2 wrong usage, 130 interrupted,
    143 terminated.

    **Examples**

    - `vhead bench --quick`
    - `vhead bench --device cuda --compile --output bench.json`
    - `vhead bench --shape 65536x4096 --dtype bfloat16`
    """
    shapes = tuple(parsed_shape(text) for text in shape or ())
    if output is not None and not output.absolute().parent.is_dir():
        raise typer.BadParameter(f"{output}: no such folder", param_hint="--output")
    with reported():
        request = _request(device, shapes, dtype or [], rounds, num_threads, compiles=compiles, quick=quick)
        document = _run(request)
        if output is not None:
            document.save(output)
            say(f"all figures are in {output}")
    if not document.passed:
        raise typer.Exit(FAILED)


def parsed_shape(text: str) -> tuple[int, int]:
    """Reads rows and hidden size from a text such as `8192x2048`.

    Raises:
        typer.BadParameter: The text has another form.
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise typer.BadParameter(f"expected NxH such as 8192x2048, got {text!r}", param_hint="--shape")
    return int(match[1]), int(match[2])


def _request(
    device: str | None,
    shapes: tuple[tuple[int, int], ...],
    dtypes: list[BenchDtype],
    rounds: int | None,
    num_threads: int | None,
    *,
    compiles: bool,
    quick: bool,
) -> "Request":
    import torch  # for a fast --help

    from vhead.benchmark.run import Request  # imports torch

    if num_threads is not None:
        torch.set_num_threads(num_threads)
    names = tuple(getattr(torch, name.value) for name in dtypes)
    return Request.usual(device, shapes=shapes, dtypes=names, rounds=rounds, compiles=compiles, quick=quick)


def _run(request: "Request") -> "Document":
    from rich.console import Console  # for a fast --help

    from vhead.benchmark.run import run  # imports torch
    from vhead.cli.bench_table import report  # for a fast --help

    progress = Console(stderr=True)
    with progress.status("starting") as status:
        document = run(request, status.update)
    with naming("standard output"):
        report(Console(), document)
    return document
