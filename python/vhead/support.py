"""The support of a distributional head: the returns that its outputs stand for, and the targets of its loss."""

import math
import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from vhead.errors import HeadError

KINDS = ("hl_gauss", "two_hot")

# Farebrother et al. 2024 (arXiv 2403.03950) spread a return over about six bins by this share of a bin's width.
_BIN_WIDTHS_OF_SIGMA = 0.75

_MOST_BINS = 1 << 20
_WIDEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Support:
    """The returns that the outputs of a distributional head stand for.

    Args:
        low: The lowest return.
        high: The highest return.
        bins: How many outputs the head has: K, 2 or more.
        kind: "hl_gauss" divides [low, high] into bins of equal width, whose centres the outputs stand for, and spreads
            a return over them by a normal distribution. "two_hot" puts the first output at `low` and the last one at
            `high`, and divides a return between its two neighbours.
        sigma: The standard deviation of "hl_gauss", in the unit of the returns. None: 0.75 of a bin's width.

    Raises:
        HeadError: An argument is not what it must be, or the bins are narrower than float32 can tell apart.
    """

    low: float
    high: float
    bins: int
    kind: Literal["hl_gauss", "two_hot"] = "hl_gauss"
    sigma: float | None = None

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        if not self.low < self.high:
            raise HeadError(f"support: low, high: expected low below high, got {self.low!r} and {self.high!r}")
        if not isinstance(self.bins, Integral) or isinstance(self.bins, bool) or not 2 <= self.bins <= _MOST_BINS:
            raise HeadError(f"support: bins: expected an integer from 2 to {_MOST_BINS:,}, got {self.bins!r:.100}")
        object.__setattr__(self, "bins", operator.index(self.bins))
        if self.kind not in KINDS:
            raise HeadError(f"support: kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.bin_width <= max(abs(self.low), abs(self.high)) * torch.finfo(torch.float32).eps:
            raise HeadError(
                f"support: bins: expected bins that float32 can tell apart, got {self.bins} "
                f"in [{self.low}, {self.high}]"
            )
        if self.sigma is not None:
            object.__setattr__(self, "sigma", self._checked_sigma(self.sigma))

    def _checked_sigma(self, value: float) -> float:
        if self.kind != "hl_gauss":
            raise HeadError(f"support: sigma: expected None for {self.kind}, which spreads nothing, got {value!r}")
        sigma = _number("sigma", value)
        if not 0.0 < sigma <= self.high - self.low:
            raise HeadError(
                f"support: sigma: expected a number above 0 and at most high - low, {self.high - self.low}, "
                f"got {sigma!r}"
            )
        return sigma

    @classmethod
    def from_settings(cls, settings: object, source: str) -> Self:
        """Makes the support that a file states.

        Args:
            settings: What `settings` gave, as the file has it.
            source: The file, for messages.

        Raises:
            HeadError: It is no support.
        """
        required, known = {"low", "high", "bins", "kind"}, set(cls.__dataclass_fields__)
        if not isinstance(settings, Mapping) or not required <= settings.keys() <= known:
            raise HeadError(
                f"{source}: expected an object with {', '.join(sorted(required))} and perhaps sigma, "
                f"got {settings!r:.200}"
            )
        try:
            return cls(**settings)
        except HeadError as error:
            raise HeadError(f"{source}: {error}") from error

    def settings(self) -> dict[str, Any]:
        """The arguments, as JSON has them."""
        return asdict(self)

    @property
    def bin_width(self) -> float:
        """The distance between the returns of two neighbouring outputs."""
        return (self.high - self.low) / (self.bins if self.kind == "hl_gauss" else self.bins - 1)

    def centers(self, device: torch.device | str | None = None) -> Tensor:
        """The return that each output stands for: `[bins]`, float32, ascending."""
        inset = self.bin_width / 2 if self.kind == "hl_gauss" else 0.0
        return torch.linspace(self.low + inset, self.high - inset, self.bins, dtype=torch.float32, device=device)

    @torch.no_grad()
    def target(self, returns: Tensor) -> Tensor:
        """The distribution over the outputs that a return is to be learnt as; returns outside count as the ends.

        Args:
            returns: `[...]`, any floating dtype. NaN gives NaN.

        Returns:
            `[..., bins]`, float32, each row with the sum 1, on the device of `returns`. No gradients flow.
        """
        # Devices of Apple have no float64; there the weights are as exact as float32 makes them.
        dtype = torch.float32 if returns.device.type == "mps" else torch.float64
        inside = returns.to(dtype).clamp(self.low, self.high).unsqueeze(-1)
        weights = self._two_hot(inside) if self.kind == "two_hot" else self._hl_gauss(inside)
        return weights.float()

    def _two_hot(self, inside: Tensor) -> Tensor:
        place = (inside - self.low) / self.bin_width
        outputs = torch.arange(self.bins, dtype=inside.dtype, device=inside.device)
        return (1.0 - (place - outputs).abs()).clamp(min=0.0)

    def _hl_gauss(self, inside: Tensor) -> Tensor:
        sigma = _BIN_WIDTHS_OF_SIGMA * self.bin_width if self.sigma is None else self.sigma
        edges = torch.linspace(self.low, self.high, self.bins + 1, dtype=inside.dtype, device=inside.device)
        below = torch.erf((edges - inside) / (sigma * math.sqrt(2.0)))
        return below.diff(dim=-1) / (below[..., -1:] - below[..., :1])

    def cross_entropy(self, logits: Tensor, returns: Tensor) -> Tensor:
        """The loss of each return: the cross-entropy between its target and the head's distribution.

        Args:
            logits: `[..., bins]`, as `ValueHead.logits` gives them.
            returns: `[...]`.

        Returns:
            `[...]`, float32, in nats; gradients flow to the logits.

        Raises:
            HeadError: The shapes do not fit each other, or the logits are not `bins` many.
        """
        if logits.shape != (*returns.shape, self.bins):
            raise HeadError(
                f"logits: expected {[*returns.shape, self.bins]} for returns {list(returns.shape)}, "
                f"got {list(logits.shape)}"
            )
        return -(self.target(returns).to(logits.device) * log_softmax(logits.float(), dim=-1)).sum(-1)


def _number(name: str, value: object) -> float:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not -_WIDEST <= value <= _WIDEST:  # type: ignore[operator]  # numbers can be compared
        raise HeadError(f"support: {name}: expected a finite number, got {value!r:.100}")
    return float(value)  # type: ignore[arg-type]
