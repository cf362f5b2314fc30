"""Gradients that are no numbers, and whose they are."""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from vhead.errors import GradientError
from vhead.training.batches import TrainingBatch

_SHOWN = 3


def watch(batch: TrainingBatch, name: str, tensor: Tensor) -> None:
    """Has backward raise where the gradient of `[T, ...]` is not finite for some of a batch's tokens.

    Raises:
        GradientError: From backward; it names the rollouts.
    """
    if tensor.requires_grad:
        tensor.register_hook(partial(_check, batch, name))  # type: ignore[no-untyped-call]  # torch's


def _check(batch: TrainingBatch, name: str, gradient: Tensor | None) -> None:
    # DDP asks for the gradients of all outputs, also of those that no loss was made of.
    if gradient is None:
        return
    finite = torch.isfinite(gradient)
    if bool(finite.all()):
        return
    tokens = np.flatnonzero(~finite.reshape(len(gradient), -1).all(dim=1).cpu().numpy())
    owners = np.searchsorted(batch.offsets, tokens, side="right") - 1
    first = int(tokens[0] - batch.offsets[owners[0]])
    found = np.unique(owners)
    names = [batch.given.names[batch.places[at]] for at in found]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    raise GradientError(
        f"{', '.join(names[:_SHOWN])}{more}: expected finite gradients of {name}, got one that is not, the first at "
        f"completion token {first}; look at what the loss was given for it, such as its advantages",
        rollouts=tuple(int(batch.places[at]) for at in found),
    )
