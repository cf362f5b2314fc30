"""How much one optimiser step is about, over all its batches and all processes, so that losses are means over it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from vhead.errors import VheadError
from vhead.rollouts.encoding import Encoded

_NO_CANDIDATES = -1
_UNLIMITED = 2**62


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


@dataclass(frozen=True, slots=True)
class Share:
    """What one process brings to an optimiser step.

    Attributes:
        totals: Tokens and rollouts.
        batches: How many batches these are.
        candidates: How many candidates its rollouts bring for each token; None: none.
    """

    totals: Totals
    batches: int
    candidates: int | None


def of_all_processes(own: Share, device: torch.device) -> Share:
    """The totals of all processes, and the most batches that one of them has; every process has to ask.

    Args:
        own: That of this process.
        device: Where the processes' backend exchanges numbers.

    Raises:
        VheadError: Another process has refused its rollouts, or they bring another number of candidates.
    """
    tokens, rollouts, refusals = _summed([own.totals.tokens, own.totals.rollouts, 0], device)
    if refusals:
        raise VheadError(
            f"rollouts: expected ones that each process can train on, but {refusals} of {dist.get_world_size()} "
            "refused theirs; the errors there say why"
        )
    count = _NO_CANDIDATES if own.candidates is None else own.candidates
    # A process without rollouts agrees with any number.
    bounds = [count, -count] if own.totals.rollouts else [_NO_CANDIDATES, -_UNLIMITED]
    found = torch.tensor([own.batches, *bounds], dtype=torch.int64, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    batches, most, least = found.tolist()
    if rollouts and most != -least:
        raise VheadError("candidates: expected rollouts of all processes to have as many, or none, got different ones")
    candidates = None if most == _NO_CANDIDATES else most
    return Share(Totals(tokens, rollouts, dist.get_world_size()), batches, candidates)


def tell_refusal(device: torch.device) -> None:
    """What a process asks in place of `of_all_processes` if it refuses its rollouts, so that no other one waits."""
    _summed([0, 0, 1], device)


def all_say(answer: bool, device: torch.device) -> bool:  # noqa: FBT001
    """Whether the answer of every process is yes; every process has to ask."""
    return _summed([int(answer)], device) == [dist.get_world_size()]


def _summed(numbers: Sequence[int], device: torch.device) -> list[int]:
    found = torch.tensor(numbers, dtype=torch.int64, device=device)
    dist.all_reduce(found)
    sums: list[int] = found.tolist()
    return sums
