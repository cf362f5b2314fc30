"""`vhead sync`: what a directory of published weights holds, whether it is whole, and what of it can go."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from vhead.cli.failure import reported
from vhead.cli.terminal import show


class Action(StrEnum):
    """What is done with the directory."""

    SHOW = "show"
    VERIFY = "verify"
    GC = "gc"


def sync(
    action: Annotated[
        Action,
        typer.Argument(
            help="show: list the publications. verify: read one and check every byte. gc: remove what nobody needs."
        ),
    ],
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="Where a publisher publishes.")],
    *,
    step: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="verify: the publication of this step. Default: the newest.")
    ] = None,
    keep: Annotated[
        int, typer.Option(min=1, metavar="N", help="gc: the last publications that stay, beside what they change.")
    ] = 8,
) -> None:
    """Look after a directory of published weights.

    Exit codes: 0 done, 1 failed or damaged, 2 wrong usage, 130 interrupted, 143 terminated.

    **Examples**

    - `vhead sync show ./weights`
    - `vhead sync verify ./weights --step 120`
    - `vhead sync gc ./weights --keep 2`
    """
    with reported():
        if action == Action.SHOW:
            _show(directory)
        elif action == Action.VERIFY:
            _verify(directory, step)
        else:
            _collect(directory, keep)


def _show(directory: Path) -> None:
    from vhead.sync import publications  # imports torch

    entries = publications(directory)
    for entry in entries:
        mark = " (latest)" if entry.is_latest else ""
        found = entry.publication
        if found is None:
            show(f"step {entry.step}{mark}: {entry.problem}")
            continue
        what = "full" if found.is_full else f"changes to step {found.base_step}"
        show(f"step {entry.step}{mark}: {what}, {', '.join(found.parts)}, {found.nbytes:,} bytes, {found.metadata}")
    if not entries:
        show("no publications")


def _verify(directory: Path, step: int | None) -> None:
    from vhead.sync import verify  # imports torch

    show(f"step {verify(directory, step).step}: whole")


def _collect(directory: Path, keep: int) -> None:
    from vhead.sync import collect  # imports torch

    steps, leftovers = collect(directory, keep=keep)
    for name in (*(f"step {step}" for step in sorted(steps)), *leftovers):
        show(f"removed {name}")
    if not (steps or leftovers):
        show("nothing to remove")
