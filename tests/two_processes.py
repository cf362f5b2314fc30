"""Checks that run in two processes of torch.distributed, and what became of each by its name."""

import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

RANKS = 2

Check = Callable[[Any], None]


def outcomes_of(checks: Sequence[Check], *, in_folder: bool = False) -> dict[str, list[str]]:
    """Runs checks one after the other in each process, and gives "passed" or a traceback for each name and process.

    A check is given its process's rank, or with `in_folder` a folder that the processes share.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.spawn(_run_rank, (checks, folder, in_folder), nprocs=RANKS, join=False)
        try:
            while not context.join(timeout=120):
                pass
        except torch.multiprocessing.ProcessRaisedException:
            pass  # The files say what failed, by name.

        def read(path: Path) -> str:
            return path.read_text() if path.exists() else "did not run"

        return {c.__name__: [read(Path(folder, f"{c.__name__}.{rank}")) for rank in range(RANKS)] for c in checks}


def _run_rank(rank: int, checks: Sequence[Check], folder: str, in_folder: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    for check in checks:
        try:
            check(Path(folder) if in_folder else rank)
            outcome = "passed"
        except Exception:
            outcome = traceback.format_exc()
        Path(folder, f"{check.__name__}.{rank}").write_text(outcome)
        if outcome != "passed":
            raise RuntimeError(outcome)
    dist.destroy_process_group()
