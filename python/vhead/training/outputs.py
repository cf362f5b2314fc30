"""What a training pass gives."""

from typing import NamedTuple

from torch import Tensor


class TrainingOutput(NamedTuple):
    """What one batch's completion tokens are given, flat, in the batch's order, with gradients.

    Float32; float64 of a model in float64. None where it was not asked for, or the model cannot give it.

    Attributes:
        values: The head's output at the position that predicts each token, `[tokens]`; `[tokens, K]` for K outputs.
        logprobs: Log-probability of each token that the model wrote, in nats, `[tokens]`; 0 elsewhere.
        entropy: Entropy of the distribution that predicts it, in nats, `[tokens]`; 0 elsewhere.
        value_logits: The logits of a distributional head, `[tokens, bins]`, for `vhead.losses.distributional`.
        candidate_logprobs: Log-probabilities of the rollouts' candidates, `[tokens, M]`; 0 elsewhere.
    """

    values: Tensor | None = None
    logprobs: Tensor | None = None
    entropy: Tensor | None = None
    value_logits: Tensor | None = None
    candidate_logprobs: Tensor | None = None
