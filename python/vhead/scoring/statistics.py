"""Log-probabilities and entropies of tokens, a few rows of logits at a time."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_LOGITS_BYTES = 32 * 1024 * 1024
_FLOAT32_BYTES = 4
# exp of it is 0 in float32, so that it stands for minus infinity where a product with 0 has to be 0.
_NEVER = -200.0


def row_chunks(count: int, vocabulary: int) -> Iterator[slice]:
    """Slices of `count` rows such that each chunk's float32 logits take 32 MiB, or one row where that is more."""
    rows = max(1, _LOGITS_BYTES // (_FLOAT32_BYTES * vocabulary))
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))


def token_statistics(
    logits_of: Callable[[slice], Tensor], chunks: Iterator[slice], targets: Tensor, temperature: float, *, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target, and the entropy of each distribution, in nats.

    Args:
        logits_of: Gives the float32 logits `[n, V]` of a slice of rows; they are overwritten.
        chunks: Slices that cover all N rows in order.
        targets: Token ids `[N]`.
        temperature: The logits are divided by it.
        entropy: Whether the entropies are wanted too.

    Returns:
        Log-probabilities `[N]` and entropies `[N]` or None, float32.
    """
    logprobs, entropies = [], []
    for rows in chunks:
        logprob, spread = _statistics(logits_of(rows), targets[rows], temperature, entropy=entropy)
        logprobs.append(logprob)
        entropies.append(spread)
    return torch.cat(logprobs), torch.cat([part for part in entropies if part is not None]) if entropy else None


def _statistics(logits: Tensor, targets: Tensor, temperature: float, *, entropy: bool) -> tuple[Tensor, Tensor | None]:
    if temperature != 1.0:
        logits /= temperature
    logits -= logits.amax(dim=-1, keepdim=True)
    target = logits.gather(-1, targets[:, None]).squeeze(-1)
    if not entropy:
        return target - logits.exp_().sum(dim=-1).log(), None
    weights = logits.exp()
    total = weights.sum(dim=-1)
    log_total = total.log()
    mean = weights.mul_(logits.clamp_(min=_NEVER)).sum(dim=-1) / total
    return target - log_total, log_total - mean
