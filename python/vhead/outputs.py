"""What a forward pass of a model with a value head returns."""

from typing import NamedTuple

from torch import Tensor
from transformers import Cache


class ValueHeadOutput(NamedTuple):
    """What `forward` returns: unpacks as TRL's `(lm_logits, loss, value)`, and names its items as transformers does.

    Attributes:
        logits: `[B, T, V]`, float32.
        loss: The language model's loss, or None without labels.
        value: `[B, T]`, float32: the value of the state after each token.
    """

    logits: Tensor | None
    loss: Tensor | None
    value: Tensor

    @property
    def lm_logits(self) -> Tensor | None:
        """The logits, by TRL's name."""
        return self.logits


class ValueHeadOutputWithCache(NamedTuple):
    """What `forward` returns with `return_past_key_values=True`: the items of `ValueHeadOutput`, then the cache."""

    logits: Tensor | None
    loss: Tensor | None
    value: Tensor
    past_key_values: Cache

    @property
    def lm_logits(self) -> Tensor | None:
        """The logits, by TRL's name."""
        return self.logits
