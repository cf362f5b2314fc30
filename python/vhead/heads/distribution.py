"""What the outputs of a distributional head say about the return: its expectation, variance and quantiles."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vhead import ops
from vhead.errors import HeadError
from vhead.support import Support


def expectation(logits: Tensor, support: Support) -> Tensor:
    """The expected return, `[..., 1]`, float32, of logits `[..., bins]`."""
    return _mean(logits.softmax(-1), support.centers(logits.device))


def variance(logits: Tensor, support: Support) -> Tensor:
    """The variance of the return, `[..., 1]`, float32, of logits `[..., bins]`."""
    probabilities, centers = logits.softmax(-1), support.centers(logits.device)
    deviations = centers - _mean(probabilities, centers)
    return (probabilities * deviations.square()).sum(-1, keepdim=True)


def quantile(logits: Tensor, support: Support, q: float | Sequence[float]) -> Tensor:
    """The quantiles of the return, `[..., Q]`, float32, of logits `[..., bins]`, without gradients.

    Raises:
        HeadError: A share is outside [0, 1].
    """
    shares = [q] if isinstance(q, int | float) else list(q)
    if not shares or not all(0.0 <= share <= 1.0 for share in shares):
        raise HeadError(f"q: expected a share in [0, 1], or some of them, got {q!r}")
    with torch.no_grad():
        below = logits.softmax(-1).cumsum(-1)
        # What is below the last bin is 1 but for rounding, and then no bin would reach a share of 1.
        below = below / below[..., -1:]
        wanted = below.new_tensor(shares).expand(*below.shape[:-1], len(shares))
        places = torch.searchsorted(below, wanted.contiguous()).clamp(max=support.bins - 1)
        returns = support.centers(logits.device)[places]
        return returns.masked_fill(below[..., -1:].isnan(), torch.nan)


def _mean(probabilities: Tensor, centers: Tensor) -> Tensor:
    # The head's own operation adds each row in one order, whatever the batch.
    return ops.value_head(probabilities, centers).unsqueeze(-1)
