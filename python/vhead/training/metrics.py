"""Metrics of a batch, and what it takes to have them over several batches and processes.

A mean of batches' means counts a short batch as much as a long one, and a variance over all of them is no mean of
theirs. So beside the metrics stand the number of tokens and, for each quantity, the mean over them, the sum of squared
deviations from it and the highest. These are what is combined, and the metrics are made of them anew.
"""

import math
import sys
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vhead.errors import VheadError
from vhead.training.totals import is_distributed


class Moments(NamedTuple):
    """Of one quantity over some tokens: the mean, the sum of squared deviations from it, and the highest."""

    mean: float
    squares: float
    highest: float


# Which quantity's which moment each metric is, in the order in which they are said.
_MADE_OF = {
    "clip_fraction": ("clipped", "mean"),
    "kl_k1": ("kl_k1", "mean"),
    "kl_k3": ("kl_k3", "mean"),
    "ratio_mean": ("ratio", "mean"),
    "ratio_max": ("ratio", "highest"),
    "value_mean": ("value", "mean"),
    "return_mean": ("return", "mean"),
    "value_clip_fraction": ("value_clipped", "mean"),
}


class Metrics(dict[str, float]):
    """Metrics by name, which `combined_metrics` can combine.

    Args:
        tokens: How many tokens they are about.
        moments: Of each quantity over these.

    Attributes:
        tokens: As given.
        moments: As given.
    """

    def __init__(self, tokens: int, moments: Mapping[str, Moments]) -> None:
        self.tokens, self.moments = tokens, dict(moments)
        if {"error", "return"} <= moments.keys():
            super().__init__(explained_variance=_explained(tokens, moments["error"], moments["return"]))
        else:
            super().__init__()
        for name, (quantity, moment) in _MADE_OF.items():
            if quantity in moments:
                self[name] = getattr(moments[quantity], moment)

    @classmethod
    def of(cls, **quantities: Tensor) -> "Metrics":
        """Those of quantities `[W]` over W tokens of one batch."""
        columns = torch.stack([quantity.double() for quantity in quantities.values()])
        tokens = columns.shape[1]
        if not tokens:
            return cls(0, dict.fromkeys(quantities, _NONE))
        means = columns.mean(1)
        found = torch.stack([means, (columns - means[:, None]).square().sum(1), columns.amax(1)], dim=1).tolist()
        return cls(tokens, {name: Moments(*numbers) for name, numbers in zip(quantities, found, strict=True)})

    def __reduce__(self) -> tuple[object, ...]:
        """A copy has the same metrics, and what has been added to or taken from them."""
        return _made_again, (self.tokens, self.moments, dict(self))


# How far a mean of equal numbers in float64 may be from them, as a part of them.
_ROUNDING = 16 * sys.float_info.epsilon
_NONE = Moments(math.nan, 0.0, math.nan)


def combined_metrics(parts: Iterable[Metrics], *, across_processes: bool = False) -> Metrics:
    """The metrics over all batches of an update, as one batch of all their tokens would have them.

    Quantiles of ratios cannot be had from those of the batches, and are left out; `policy_metrics` of all batches'
    tokens, laid end to end, gives them.

    Args:
        parts: What `policy_metrics`, or what `value_metrics`, gave for each batch.
        across_processes: Whether those of the other processes are combined with them. All of them have to call this at
            the same time then, and get the same metrics.

    Raises:
        TypeError: A part is something else, such as a plain dict that a copy by `|` or `{**part}` is.
        ValueError: There are no parts, or they are about different metrics.
        VheadError: Another process has refused its parts.
    """
    is_shared = across_processes and is_distributed()
    try:
        own = _combined(list(parts))
    except Exception:
        if is_shared:
            _of_all_processes(None)
        raise
    return _combined(_of_all_processes(own)) if is_shared else own


def _combined(parts: list[Metrics]) -> Metrics:
    if not parts:
        raise ValueError("parts: expected the metrics of at least one batch, got none")
    for place, part in enumerate(parts):
        if not isinstance(part, Metrics):
            raise TypeError(
                f"parts: expected what policy_metrics or value_metrics gave, got a {type(part).__name__} at {place}"
            )
        if part.moments.keys() != parts[0].moments.keys():
            expected, got = (", ".join(each.moments) for each in (parts[0], part))
            raise ValueError(f"parts: expected metrics of {expected}, as the first has, got {got} at {place}")
    filled = [part for part in parts if part.tokens]
    tokens = sum(part.tokens for part in filled)
    names = parts[0].moments
    if not tokens:
        return Metrics(0, dict.fromkeys(names, _NONE))
    return Metrics(tokens, {name: _over([(p.tokens, p.moments[name]) for p in filled], tokens) for name in names})


def _over(parts: list[tuple[int, Moments]], tokens: int) -> Moments:
    """The moments over all parts: deviations within each, and those of its mean from the mean of all."""
    mean = sum(count * part.mean for count, part in parts) / tokens
    squares = sum(part.squares + count * (part.mean - mean) * (part.mean - mean) for count, part in parts)
    highest = [part.highest for _, part in parts]
    return Moments(mean, squares, math.nan if any(map(math.isnan, highest)) else max(highest))


def _of_all_processes(own: Metrics | None) -> list[Metrics]:
    """The metrics of each process; None says that this one has none to give."""
    found: list[Metrics | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    given = [each for each in found if each is not None]
    if own is not None and len(given) < len(found):
        raise VheadError(
            f"parts: expected metrics of each process, but {len(found) - len(given)} of {len(found)} refused theirs; "
            "the errors there say why"
        )
    return given


def _explained(tokens: int, error: Moments, returns: Moments) -> float:
    # Of returns that do not vary, rounding alone makes means that differ from them.
    rounding = _ROUNDING * abs(returns.mean)
    varies = returns.squares > tokens * rounding * rounding
    return 1.0 - error.squares / returns.squares if varies else math.nan


def _made_again(tokens: int, moments: Mapping[str, Moments], numbers: Mapping[str, float]) -> Metrics:
    metrics = Metrics(tokens, moments)
    metrics.clear()
    metrics.update(numbers)
    return metrics
