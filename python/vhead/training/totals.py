"""How much one optimiser step is about, over all its batches and all processes, so that losses are means over it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from vhead.rollouts.encoding import Encoded


@dataclass(frozen=True, slots=True)
class Totals:
    """What all batches of one call of `TrainingPass.batches` hold together, on all processes.

    Attributes:
        tokens: Tokens that the model wrote.
        rollouts: Rollouts.
        processes: Processes, whose gradients DDP and FSDP average.
    """

    tokens: int
    rollouts: int
    processes: int = 1


def is_distributed() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def own_totals(rollouts: Sequence[Encoded]) -> Totals:
    """Those of this process alone."""
    tokens = sum(rollout.completion_length if rollout.mask is None else int(rollout.mask.sum()) for rollout in rollouts)
    return Totals(tokens, len(rollouts))


def of_all_processes(own: Totals, batches: int, device: torch.device) -> tuple[Totals, int]:
    """The totals of all processes, and the most batches that one of them has; every process has to ask.

    Args:
        own: Those of this process.
        batches: Its batches.
        device: Where the processes' backend exchanges numbers.
    """
    sums = torch.tensor([own.tokens, own.rollouts], dtype=torch.int64, device=device)
    most = torch.tensor(batches, dtype=torch.int64, device=device)
    dist.all_reduce(sums)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    tokens, rollouts = sums.tolist()
    return Totals(tokens, rollouts, dist.get_world_size()), int(most)
