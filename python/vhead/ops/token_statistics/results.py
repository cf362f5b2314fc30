"""What token statistics are."""

from typing import NamedTuple, TypeAlias

from torch import Tensor

Gradients: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]


class TokenStatistics(NamedTuple):
    """What a distribution over the vocabulary says about a token, `[N]` each.

    Attributes:
        logprobs: Log-probability of the target.
        entropy: Entropy of the distribution, in nats.
        log_sum_p_squared: Logarithm of the sum of squared probabilities (minus the Rényi entropy of order 2). No
            gradient flows through it.
        is_top1: Whether the target is the most probable token, the first one where several are.
    """

    logprobs: Tensor
    entropy: Tensor
    log_sum_p_squared: Tensor
    is_top1: Tensor
