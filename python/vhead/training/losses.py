"""Losses of an update, and the metrics that people log; `vhead.losses`.

Arrays are flat `[T]`, with `offsets` where sequences matter, or padded `[B, T]`. Masked tokens play no part, whatever
stands there. Every loss is a scalar with gradients, and every metric is detached.

A loss is the mean over what it is given. Where that is one batch of several, or where several processes train together,
give `totals=batch.totals`: the losses of all batches then add up to the mean over all of them, and gradients are right
when they are summed over batches and averaged over processes, as DDP and FSDP average them.
"""

import math
from numbers import Real
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vhead.support import Support
from vhead.training.metrics import Metrics, combined_metrics
from vhead.training.totals import Totals

Agg = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
Kl = Literal["k1", "k2", "k3", "abs"]

__all__ = [
    "Metrics",
    "combined_metrics",
    "distributional",
    "entropy",
    "kl",
    "policy",
    "policy_metrics",
    "value",
    "value_metrics",
]

_AGGS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
_KLS = ("k1", "k2", "k3", "abs")
_QUANTILES = {"ratio_p01": 0.01, "ratio_median": 0.5, "ratio_p99": 0.99}
# Beyond this, a ratio of probabilities and its gradient would overflow.
_LARGEST_LOG_RATIO = 20.0


def policy(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    clip: float | tuple[float, float] = 0.2,
    dual_clip: float | None = None,
    agg: Agg = "token-mean",
    offsets: Any = None,
    norm: float | None = None,
    totals: Totals | None = None,
) -> Tensor:
    """PPO's clipped loss: of the ratio to the old policy, and of the ratio within bounds, the worse one.

    Args:
        logprobs: Log-probabilities by the policy that is trained, `[T]` or `[B, T]`.
        old_logprobs: Those by the policy that wrote the tokens.
        advantages: Likewise.
        mask: True where the model wrote the token; None: everywhere.
        clip: How far below and above 1 a ratio counts: one number, or two, as (0.2, 0.28).
        dual_clip: The most that a ratio counts where the advantage is negative, above 1; None: without bound.
        agg: How tokens become one number, by verl's names: the mean over all tokens; the mean over sequences of their
            tokens' sum, of their tokens' mean, or of their tokens' sum over `norm`.
        offsets: Where each sequence's tokens are in flat arrays, `[N + 1]`.
        norm: What the sums are divided by with `"seq-mean-token-sum-norm"`, such as the longest completion's length.
        totals: What the mean is taken over; None: over these arrays.

    Raises:
        TypeError: An argument is no floating tensor, or the mask is not bool.
        ValueError: Shapes differ, a number is out of range, or no token is the model's.
    """
    tokens = _Tokens.of(mask, offsets, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    low, high = _bounds(clip)
    if dual_clip is not None and not dual_clip > 1.0:
        raise ValueError(f"dual_clip: expected a number above 1, got {dual_clip}")
    old_logprobs, advantages = old_logprobs.detach(), advantages.detach()
    ratio = _ratio(tokens.only(logprobs), tokens.only(old_logprobs))
    gain = tokens.only(advantages)
    losses = torch.maximum(-gain * ratio, -gain * ratio.clamp(1.0 - low, 1.0 + high))
    if dual_clip is not None:
        losses = torch.where(gain < 0, torch.minimum(losses, -gain * dual_clip), losses)
    return tokens.aggregated(losses, agg, norm, totals)


def value(
    values: Tensor,
    returns: Tensor,
    *,
    old_values: Tensor | None = None,
    clip: float | None = None,
    mask: Tensor | None = None,
    agg: Agg = "token-mean",
    offsets: Any = None,
    norm: float | None = None,
    totals: Totals | None = None,
) -> Tensor:
    """Half the squared error of values, with `clip` at least that of values no further than this from the old ones.

    Args:
        values: `[T]`, or `[B, T]` with a mask. Of a head with several outputs, give one at a time, `values[:, k]`.
        returns: What they are to be, likewise.
        old_values: The values that the returns were made with; needed with `clip`.
        clip: How far a value may move from its old one before it gains nothing more; None: any way.
        mask: As `policy`.
        agg: As `policy`.
        offsets: As `policy`.
        norm: As `policy`.
        totals: As `policy`.

    Raises:
        TypeError: As `policy`.
        ValueError: As `policy`; `clip` came without old values.
    """
    if clip is not None and (old_values is None or not clip > 0.0):
        raise ValueError(f"clip: expected a number above 0 beside old_values, or None, got {clip}")
    named = {"values": values, "returns": returns} | ({} if old_values is None else {"old_values": old_values})
    _check_outputs(values, mask)
    tokens = _Tokens.of(mask, offsets, **named)
    found, wanted = tokens.only(values), tokens.only(returns.detach())
    losses = (found - wanted).square()
    if clip is not None and old_values is not None:
        old = tokens.only(old_values.detach())
        losses = torch.maximum(losses, (old + (found - old).clamp(-clip, clip) - wanted).square())
    return tokens.aggregated(0.5 * losses, agg, norm, totals)


def distributional(
    logits: Tensor,
    returns: Tensor,
    support: Support,
    *,
    mask: Tensor | None = None,
    agg: Agg = "token-mean",
    offsets: Any = None,
    norm: float | None = None,
    totals: Totals | None = None,
) -> Tensor:
    """The cross-entropy between a distributional head's distribution and that of the returns, in nats.

    Args:
        logits: `[T, bins]` or `[B, T, bins]`, such as `TrainingOutput.value_logits`.
        returns: `[T]` or `[B, T]`.
        support: The head's.
        mask: As `policy`.
        agg: As `policy`.
        offsets: As `policy`.
        norm: As `policy`.
        totals: As `policy`.

    Raises:
        HeadError: There are not as many logits as the support has bins.
        TypeError: As `policy`.
        ValueError: As `policy`.
    """
    tokens = _Tokens.of(mask, offsets, returns=returns, logits=logits[..., 0])
    if tokens.mask is None:
        losses = support.cross_entropy(logits.flatten(0, -2), returns.flatten())
    else:
        losses = support.cross_entropy(logits[tokens.mask], returns[tokens.mask])
    return tokens.aggregated(losses, agg, norm, totals)


def entropy(
    entropies: Tensor,
    *,
    mask: Tensor | None = None,
    agg: Agg = "token-mean",
    offsets: Any = None,
    norm: float | None = None,
    totals: Totals | None = None,
) -> Tensor:
    """The mean entropy, to be subtracted from a loss with a coefficient.

    Args:
        entropies: `[T]` or `[B, T]`.
        mask: As `policy`.
        agg: As `policy`.
        offsets: As `policy`.
        norm: As `policy`.
        totals: As `policy`.

    Raises:
        TypeError: As `policy`.
        ValueError: As `policy`.
    """
    tokens = _Tokens.of(mask, offsets, entropies=entropies)
    return tokens.aggregated(tokens.only(entropies), agg, norm, totals)


def kl(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    kind: Kl = "k3",
    mask: Tensor | None = None,
    agg: Agg = "token-mean",
    offsets: Any = None,
    norm: float | None = None,
    totals: Totals | None = None,
) -> Tensor:
    """An estimate of the divergence from a reference, to be added to a loss with a coefficient.

    With `d = logprobs - ref_logprobs` it is the mean of `d` (k1), `d**2 / 2` (k2), `exp(-d) - 1 + d` (k3) or `abs(d)`.

    Args:
        logprobs: `[T]` or `[B, T]`.
        ref_logprobs: The reference's, likewise.
        kind: Which estimate.
        mask: As `policy`.
        agg: As `policy`.
        offsets: As `policy`.
        norm: As `policy`.
        totals: As `policy`.

    Raises:
        TypeError: As `policy`.
        ValueError: As `policy`.
    """
    tokens = _Tokens.of(mask, offsets, logprobs=logprobs, ref_logprobs=ref_logprobs)
    found = _divergence(tokens.only(logprobs) - tokens.only(ref_logprobs.detach()), kind)
    return tokens.aggregated(found, agg, norm, totals)


@torch.no_grad()
def policy_metrics(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    clip: float | tuple[float, float] = 0.2,
) -> Metrics:
    """What people log of a policy's update, over the tokens of the model.

    Args:
        logprobs: As `policy`.
        old_logprobs: As `policy`.
        advantages: As `policy`.
        mask: As `policy`.
        clip: As `policy`.

    Returns:
        `clip_fraction`, the share of tokens whose ratio gains nothing more; `kl_k1` and `kl_k3`, estimates of the
        divergence from the old policy; `ratio_mean`, `ratio_max`, `ratio_p01`, `ratio_median` and `ratio_p99`. NaN
        where there are no tokens. Those of several batches go to `combined_metrics`; a mean of them would be another
        number.

    Raises:
        TypeError: As `policy`.
        ValueError: As `policy`.
    """
    tokens = _Tokens.of(mask, None, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    low, high = _bounds(clip)
    new, old, gain = (tokens.only(each).detach().double() for each in (logprobs, old_logprobs, advantages))
    ratio = _ratio(new, old)
    clipped = torch.where(gain >= 0, ratio > 1.0 + high, ratio < 1.0 - low)
    metrics = Metrics.of(clipped=clipped, kl_k1=old - new, kl_k3=_divergence(old - new, "k3"), ratio=ratio)
    metrics.update(_quantiles(ratio))
    return metrics


@torch.no_grad()
def value_metrics(
    values: Tensor,
    returns: Tensor,
    *,
    old_values: Tensor | None = None,
    clip: float | None = None,
    mask: Tensor | None = None,
) -> Metrics:
    """What people log of a critic's update, over the tokens of the model.

    Args:
        values: As `value`.
        returns: As `value`.
        old_values: As `value`.
        clip: As `value`.
        mask: As `value`.

    Returns:
        `explained_variance`, NaN where the returns do not vary; `value_mean`, `return_mean`; with `clip`,
        `value_clip_fraction`, the share of values that are further than this from the old ones. Those of several
        batches go to `combined_metrics`.

    Raises:
        TypeError: As `policy`.
        ValueError: As `policy`.
    """
    named = {"values": values, "returns": returns} | ({} if old_values is None else {"old_values": old_values})
    _check_outputs(values, mask)
    tokens = _Tokens.of(mask, None, **named)
    found, wanted = tokens.only(values).detach().double(), tokens.only(returns).detach().double()
    quantities = {"error": wanted - found, "value": found, "return": wanted}
    if clip is not None and old_values is not None:
        quantities["value_clipped"] = (found - tokens.only(old_values).double()).abs() > clip
    return Metrics.of(**quantities)


def _quantiles(ratio: Tensor) -> dict[str, float]:
    if not ratio.numel():
        return dict.fromkeys(_QUANTILES, math.nan)
    # Not torch.quantile, which refuses more than 16 million numbers.
    found = np.quantile(ratio.cpu().numpy(), list(_QUANTILES.values()))
    return dict(zip(_QUANTILES, map(float, found), strict=True))


class _Tokens:
    """Which entries of the arrays are the model's tokens, and which sequences they are of.

    Attributes:
        mask: True at these; None: everywhere.
    """

    def __init__(self, mask: Tensor | None, sequences: Tensor | None, count: int) -> None:
        self.mask = mask
        self._sequences, self._count = sequences, count

    @classmethod
    def of(cls, mask: Tensor | None, offsets: Any, **arrays: Tensor) -> "_Tokens":
        (first_name, first), *others = arrays.items()
        for name, array in arrays.items():
            if not isinstance(array, Tensor) or not array.is_floating_point():
                got = array.dtype if isinstance(array, Tensor) else type(array).__name__
                raise TypeError(f"{name}: expected a floating tensor, got {got}")
        if first.dim() not in (1, 2):
            raise ValueError(f"{first_name}: expected [T] or [B, T], got {list(first.shape)}")
        for name, array in others:
            if array.shape != first.shape:
                raise ValueError(
                    f"{name}: expected {list(first.shape)}, as {first_name}, got {list(array.shape)}; both are about "
                    "the same tokens, and batch.flat brings numbers of rollouts into a batch's order"
                )
        if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool):
            raise TypeError(f"mask: expected a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
        if mask is not None and mask.shape != first.shape:
            several = first.dim() == 2 and mask.shape == first.shape[:1]
            remedy = f"; of several outputs, give one at a time, {first_name}[:, k]" if several else ""
            raise ValueError(f"mask: expected {list(first.shape)}, as {first_name}, got {list(mask.shape)}{remedy}")
        sequences, count = _sequences(first, offsets)
        return cls(mask, sequences if mask is None or sequences is None else sequences[mask], count)

    def only(self, array: Tensor) -> Tensor:
        """The entries of these tokens, `[W]`."""
        return array.flatten() if self.mask is None else array[self.mask]

    def aggregated(self, losses: Tensor, agg: Agg, norm: float | None, totals: Totals | None) -> Tensor:
        """One number of the losses `[W]`."""
        if agg not in _AGGS:
            raise ValueError(f"agg: expected one of {', '.join(_AGGS)}, got {agg!r}")
        if (norm is not None) != (agg == "seq-mean-token-sum-norm") or (norm is not None and not norm > 0):
            raise ValueError(f"norm: expected a number above 0 with seq-mean-token-sum-norm alone, got {norm}")
        if totals is None and self.mask is not None and self.mask.numel() and not losses.numel():
            raise ValueError("mask: expected a token of the model's, got none; give totals to count it as nothing")
        if agg == "token-mean":
            return self._mean(losses.sum(), losses.numel(), None if totals is None else totals.tokens, totals)
        return self._over_sequences(losses, agg, norm, totals)

    def _over_sequences(self, losses: Tensor, agg: Agg, norm: float | None, totals: Totals | None) -> Tensor:
        if self._sequences is None:
            raise ValueError(f"offsets: expected them beside flat arrays, as {agg} is about sequences, got None")
        counts = torch.bincount(self._sequences, minlength=self._count)
        if agg == "seq-mean-token-mean":
            losses = losses / counts[self._sequences]
        total = losses.sum() if norm is None else losses.sum() / norm
        return self._mean(total, int((counts > 0).sum()), None if totals is None else totals.rollouts, totals)

    @staticmethod
    def _mean(total: Tensor, own: int, everything: int | None, totals: Totals | None) -> Tensor:
        if totals is None or everything is None:
            return total / max(own, 1)
        # Of gradients that are averaged over processes, each counts one part in so many.
        return total * (totals.processes / max(everything, 1))


def _check_outputs(values: Tensor, mask: Tensor | None) -> None:
    """Refuses two dimensions that nothing says more about: those of padded rows, or tokens with several outputs."""
    if mask is None and isinstance(values, Tensor) and values.dim() == 2:
        raise ValueError(
            f"mask: expected one beside two dimensions, as values of {list(values.shape)} may be [B, T] as well as "
            "[T, K] for K outputs, got None; give torch.ones_like(values, dtype=torch.bool) where no row has padding, "
            "and of several outputs one at a time, values[:, k]"
        )


def _sequences(like: Tensor, offsets: Any) -> tuple[Tensor | None, int]:
    """Which sequence each entry is of, in the arrays' shape, and how many there are; None where nothing says it."""
    if like.dim() == 2:
        if offsets is not None:
            raise ValueError(f"offsets: expected None beside [B, T] arrays, got {type(offsets).__name__}")
        rows = torch.arange(len(like), device=like.device)[:, None].expand(like.shape)
        return (rows if like.numel() else rows.reshape(like.shape)), len(like)
    if offsets is None:
        return None, 0
    bounds = torch.as_tensor(offsets, dtype=torch.int64, device="cpu")
    lengths = bounds.diff() if bounds.dim() == 1 else bounds
    if bounds.dim() != 1 or not len(bounds) or bounds[0] != 0 or bounds[-1] != len(like) or bool((lengths < 0).any()):
        raise ValueError(f"offsets: expected rising numbers from 0 to {len(like)}, got {bounds.tolist()[:8]}")
    return torch.repeat_interleave(lengths).to(like.device), len(lengths)


def _bounds(clip: float | tuple[float, float]) -> tuple[float, float]:
    both = (clip, clip) if isinstance(clip, int | float) else clip
    are_two = isinstance(both, tuple | list) and len(both) == 2 and all(isinstance(each, Real) for each in both)
    low, high = both if are_two else (math.nan, math.nan)
    if not (0.0 <= low <= 1.0 and high >= 0.0):
        raise ValueError(f"clip: expected how far below 1, at most 1, and above 1 a ratio counts, got {clip!r}")
    return low, high


def _ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    return (logprobs - old_logprobs).clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO).exp()


def _divergence(difference: Tensor, kind: Kl) -> Tensor:
    if kind not in _KLS:
        raise ValueError(f"kind: expected one of {', '.join(_KLS)}, got {kind!r}")
    if kind == "k1":
        return difference
    if kind == "k2":
        return 0.5 * difference.square()
    if kind == "abs":
        return difference.abs()
    return torch.expm1((-difference).clamp(max=_LARGEST_LOG_RATIO)) + difference
