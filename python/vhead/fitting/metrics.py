"""How well predictions go with targets: figures that can be had from a few sums, and need no predictions kept."""

import math
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_BINS = 10
# Of a normal distribution: 95% of it lies within so many standard deviations.
_Z = 1.959963984540054


@dataclass(frozen=True, eq=False)
class Agreement:
    """Weighted sums over rows with predictions p and targets y, float64, for each of K outputs.

    Attributes:
        weight: Sum of the weights, `[K]`.
        p: `[K]`.
        y: `[K]`.
        pp: `[K]`.
        py: `[K]`.
        yy: `[K]`.
    """

    weight: Tensor
    p: Tensor
    y: Tensor
    pp: Tensor
    py: Tensor
    yy: Tensor

    @classmethod
    def of(cls, predictions: Tensor, targets: Tensor, weights: Tensor) -> Self:
        """The sums of predictions and targets `[N, K]` and weights `[N]`."""
        p, y, w = predictions.double(), targets.double(), weights.double()[:, None]
        return cls(*((w * each).sum(0) for each in (torch.ones_like(y), p, y, p * p, p * y, y * y)))

    def __add__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def squared_error(self) -> Tensor:
        """Sum of squared errors, `[K]`."""
        return self.pp - 2 * self.py + self.yy

    def figures(self, shift: Tensor) -> dict[str, list[Any]]:
        """Explained variance, mean squared error, and slope and intercept of the targets over the predictions.

        Args:
            shift: What both predictions and targets lack, `[K]`.
        """
        mean_p, mean_y = self.p / self.weight, self.y / self.weight
        mean_error = mean_y - mean_p
        error, spread = self.squared_error / self.weight, self.yy / self.weight - mean_y**2
        slope = (self.py / self.weight - mean_p * mean_y) / (self.pp / self.weight - mean_p**2)
        return {
            "explained_variance": (1 - (error - mean_error**2) / spread).tolist(),
            "mean_squared_error": error.tolist(),
            "calibration_slope": slope.tolist(),
            "calibration_intercept": (mean_y + shift - slope * (mean_p + shift)).tolist(),
        }


@dataclass(frozen=True, eq=False)
class Verdicts:
    """What is counted of probabilities and of what came to be, for each of K outputs.

    Attributes:
        count: Rows, `[K]`.
        right: Rows whose likelier outcome came to be, half of those with even odds, `[K]`.
        weight: Sum of the weights, `[K]`.
        loss: Weighted sum of losses in nats, `[K]`.
        bins: Weighted sums in each of ten bins of probabilities: weight, probability, outcome, `[3, 10, K]`.
    """

    count: Tensor
    right: Tensor
    weight: Tensor
    loss: Tensor
    bins: Tensor

    @classmethod
    def of(cls, logits: Tensor, outcomes: Tensor, weights: Tensor, *, is_pair: bool) -> Self:
        """Counts rows with logits and outcomes 0 or 1 `[N, K]` and weights `[N]`.

        Of a pair, the outcome is always that the chosen side is better; how sure that was is binned for the side that
        was believed to be.
        """
        z, y, w = logits.double(), outcomes.double(), weights.double()[:, None].expand(logits.shape)
        loss = torch.nn.functional.softplus(z) - y * z
        right = torch.where(z == 0, 0.5, ((z > 0) == (y > 0.5)).double())
        p, outcome = (z.abs().sigmoid(), right) if is_pair else (z.sigmoid(), y)
        place = (p.nan_to_num() * _BINS).long().clamp(max=_BINS - 1)
        bins = torch.zeros(3, _BINS, z.shape[1], dtype=torch.float64, device=z.device)
        for sums, added in zip(bins, (w, w * p, w * outcome), strict=True):
            sums.scatter_add_(0, place, added)
        count = torch.full_like(right[0], len(z)) if len(z) else torch.zeros_like(right.sum(0))
        return cls(count, right.sum(0), w.sum(0), (w * loss).sum(0), bins)

    def __add__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def figures(self) -> dict[str, list[Any]]:
        """Accuracy with its interval, mean loss in nats, and expected calibration error."""
        weight, probability, outcome = self.bins
        error = (probability - outcome).abs().sum(0) / weight.sum(0)
        pairs = zip(self.right.tolist(), self.count.tolist(), strict=True)
        return {
            "accuracy": (self.right / self.count).tolist(),
            "accuracy_interval": [wilson_interval(right, count) for right, count in pairs],
            "log_loss": (self.loss / self.weight).tolist(),
            "calibration_error": error.tolist(),
        }


def wilson_interval(right: float, count: float) -> tuple[float, float]:
    """Wilson's interval, 95%, for a share of which `right` of `count` independent rows speak."""
    share, spread = right / count, _Z**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = _Z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def bounds(targets: NDArray[np.float64]) -> NDArray[np.float64]:
    """The lowest and the highest of targets `[N, K]`, `[2, K]`."""
    return np.stack([targets.min(0), targets.max(0)])
