"""What fitting gives."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vhead.head_weights import HeadWeights, LinearWeights


@dataclass(frozen=True, eq=False)
class FittedHead:
    """A head that was fitted, and how well it does on prompts that it was not fitted to.

    Attributes:
        head: Its weights, float32, as `vhead.formats.save` and `ValueHead.load` take them.
        metrics: Figures on held-out prompts, by name; a list of K numbers where the head has K > 1 outputs.
        strength: The penalty on squared weights that was chosen; a tuple where there are several outputs.
        loss: `"squared"` or `"logistic"`.
        rollouts: How many rollouts it was fitted to.
        tokens: How many of their hidden states.
    """

    head: HeadWeights = field(repr=False)
    metrics: Mapping[str, Any]
    strength: float | tuple[float, ...]
    loss: str
    rollouts: int
    tokens: int


@dataclass(frozen=True, eq=False)
class Solution:
    """What a solver gives.

    Attributes:
        layers: Weight `[out, in]` and bias `[out]` of each projection, float64 on the CPU; the bias None where there is
            none.
        strengths: The strength that was chosen for each of K outputs.
        figures: Of held-out rows, with one entry for each output.
    """

    layers: tuple[tuple[Tensor, Tensor | None], ...]
    strengths: tuple[float, ...]
    figures: Mapping[str, list[Any]]

    def fitted(self, *, source: str, loss: str, rollouts: int, tokens: int) -> FittedHead:
        """The head, with single figures in place of lists of one."""
        layers = [LinearWeights(weight.float(), None if bias is None else bias.float()) for weight, bias in self.layers]
        return FittedHead(
            HeadWeights(tuple(layers), format="vhead", source=source),
            {name: values[0] if len(values) == 1 else list(values) for name, values in self.figures.items()},
            self.strengths[0] if len(self.strengths) == 1 else self.strengths,
            loss,
            rollouts,
            tokens,
        )
