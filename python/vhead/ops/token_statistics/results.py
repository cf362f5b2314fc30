"""What token statistics are."""

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

Gradients: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]


class Selected(NamedTuple):
    """What was asked for besides the target: the last three fields of `TokenStatistics`."""

    candidate_logprobs: Tensor | None
    top_tokens: Tensor | None
    top_logprobs: Tensor | None

    def whole(self, rows: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As an operator must return them: `[N, 0]` for what was not asked for."""
        none = (rows, 0)
        return (
            like.new_empty(none) if self.candidate_logprobs is None else self.candidate_logprobs,
            like.new_empty(none, dtype=torch.int64) if self.top_tokens is None else self.top_tokens,
            like.new_empty(none) if self.top_logprobs is None else self.top_logprobs,
        )


class TokenStatistics(NamedTuple):
    """What a distribution over the vocabulary says about a token, `[N]` each, and about others that are asked for.

    Attributes:
        logprobs: Log-probability of the target.
        entropy: Entropy of the distribution, in nats.
        log_sum_p_squared: Logarithm of the sum of squared probabilities (minus the Rényi entropy of order 2). No
            gradient flows through it.
        is_top1: Whether the target is the most probable token, the first one where several are.
        candidate_logprobs: Log-probabilities of the candidates, `[N, M]`; None without candidates. No gradient flows
            through them, nor through the next two.
        top_tokens: The `top` most probable tokens, int64 `[N, top]`, of equals the smaller id first; -1 in a row whose
            statistics are NaN. None where `top` is 0.
        top_logprobs: Their log-probabilities, the largest first, `[N, top]`. None where `top` is 0.
    """

    logprobs: Tensor
    entropy: Tensor
    log_sum_p_squared: Tensor
    is_top1: Tensor
    candidate_logprobs: Tensor | None = None
    top_tokens: Tensor | None = None
    top_logprobs: Tensor | None = None
