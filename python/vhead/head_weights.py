"""What a head is, once it has been found: its projections, and what its checkpoint says about them."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vhead.support import Support


@dataclass(frozen=True, eq=False)
class LinearWeights:
    """One projection of a head.

    Attributes:
        weight: `[out, in]`, float32.
        bias: `[out]`, float32, or None where the format has none.
    """

    weight: Tensor
    bias: Tensor | None = None

    @property
    def bias_or_zeros(self) -> Tensor:
        """The bias, `[out]`, of zeros where there is none."""
        return torch.zeros(self.weight.shape[0]) if self.bias is None else self.bias


@dataclass(frozen=True, eq=False)
class HeadWeights:
    """A trained head: projections from a hidden state to the outputs, with a ReLU between each two of them.

    Attributes:
        layers: The projections, one or two today, first the one that reads the hidden state.
        format: The name of the format it was read in.
        source: Where it was read: file and format.
        mean: The reward's mean over the training data that the checkpoint states, or None. The head does not subtract
            it.
        std: The reward's standard deviation, likewise.
        support: The returns that the outputs of a distributional head stand for, or None.
        activation: "softmax" for a classifier of each state, as process reward models are, or None. The head does not
            apply it.
    """

    layers: tuple[LinearWeights, ...]
    format: str
    source: str
    mean: float | None = None
    std: float | None = None
    support: Support | None = None
    activation: Literal["softmax"] | None = None

    @property
    def weight(self) -> Tensor:
        """The last projection's weight: `[K, in]`, float32."""
        return self.layers[-1].weight

    @property
    def bias(self) -> Tensor:
        """The last projection's bias, `[K]`, float32: zeros where the format has none."""
        return self.layers[-1].bias_or_zeros

    @property
    def sizes(self) -> list[int]:
        """The sizes around the projections: H, those between two of them, K."""
        return [self.hidden_size, *(layer.weight.shape[0] for layer in self.layers)]

    @property
    def hidden_size(self) -> int:
        """Elements of the hidden state that the head reads: H."""
        return self.layers[0].weight.shape[1]

    @property
    def intermediate_size(self) -> int | None:
        """Elements between the two projections, or None for a head of one."""
        return self.layers[0].weight.shape[0] if len(self.layers) > 1 else None

    @property
    def num_outputs(self) -> int:
        """Numbers that the head gives for each hidden state: K, 1 for a critic and for a head with a support."""
        return 1 if self.support is not None else self.layers[-1].weight.shape[0]
