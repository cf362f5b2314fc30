"""A guess at why two runs give the same tokens other log-probabilities.

Each known cause leaves marks of its own in d = ours - theirs. They are looked for in an order in which none is taken
for another, and a cause is named only where its marks are plain. The bounds were set on pairs of real models' scores,
of several seeds and two architectures; `tests/report/test_causes.py` makes them again.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vhead.report.correlation import pearson, ranks
from vhead.report.pairs import Floats, Pairs

CauseName = Literal["temperature", "shift", "padding", "dtype", "weights"]

# Fewer tokens show no pattern.
_FEWEST_TOKENS = 200
# Differences below are float32's own, in another order of additions.
_ROUNDING = 1e-4
_NEARLY_CERTAIN = math.log(0.98)
_FEWEST_CERTAIN = 20
# bfloat16 against float32 stays below it also in sharp models, where it is largest.
_LARGEST_K3_OF_DTYPE = 5e-3


@dataclass(frozen=True, slots=True)
class Cause:
    """A guess at the cause, and what it rests on.

    Attributes:
        name: "temperature", "shift", "padding", "dtype" or "weights"; None: none of these fits.
        evidence: One sentence with the numbers that show it.
        temperature: Their temperature, in units of ours, where that is the cause.
    """

    name: CauseName | None
    evidence: str
    temperature: float | None = None


@dataclass(frozen=True)
class _Marks:
    """What several checks look at, over the tokens that count."""

    pairs: Pairs
    ours: Floats
    theirs: Floats
    d: Floats

    @cached_property
    def size(self) -> float:
        return float(np.abs(self.d).mean())

    @cached_property
    def correlation(self) -> float:
        return pearson(self.ours, self.theirs) or 0.0

    @cached_property
    def k3(self) -> float:
        with np.errstate(over="ignore"):
            return float((np.expm1(self.d) - self.d).mean())


def likely_cause(pairs: Pairs) -> Cause | None:
    """The cause that the log-probabilities show; None where there are none to compare."""
    if pairs.ours is None or pairs.theirs is None or not pairs.mask.any():
        return None
    ours, theirs = pairs.ours[pairs.mask], pairs.theirs[pairs.mask]
    marks = _Marks(pairs, ours, theirs, ours - theirs)
    largest = float(np.abs(marks.d).max())
    if largest <= _ROUNDING:
        return Cause(None, f"The two agree: no |d| is above {largest:.1g}, so there is nothing to explain.")
    if len(ours) < _FEWEST_TOKENS:
        return Cause(None, f"A guess needs {_FEWEST_TOKENS} tokens, and here are {len(ours)}.")
    checks: tuple[Callable[[_Marks], Cause | None], ...] = (_shift, _temperature, _padding, _dtype, _weights)
    found = (check(marks) for check in checks)
    return next((cause for cause in found if cause), Cause(None, "None of the known causes fits."))


def _shift(marks: _Marks) -> Cause | None:
    """Their numbers are ours of the token before or after."""
    pairs = marks.pairs
    if pairs.ours is None or pairs.theirs is None:
        return None
    both = pairs.mask[1:] & pairs.mask[:-1] & (pairs.rollouts[1:] == pairs.rollouts[:-1])
    for word, ours, theirs in (
        ("after", pairs.ours[1:][both], pairs.theirs[:-1][both]),
        ("before", pairs.ours[:-1][both], pairs.theirs[1:][both]),
    ):
        there = pearson(ours, theirs) or 0.0
        apart = float(np.abs(ours - theirs).mean()) if len(ours) else math.inf
        if there > 0.8 and there > marks.correlation + 0.2 and apart < marks.size / 2:
            return Cause(
                "shift",
                f"Their number at a token is ours at the token {word} it: moved by one, the correlation rises from "
                f"{marks.correlation:.2f} to {there:.2f}, and the mean |d| falls from {marks.size:.2g} to {apart:.2g}.",
            )
    return None


def _temperature(marks: _Marks) -> Cause | None:
    """With b = 1 / temperature, the derivative of log p(token) by b is log p(token) + entropy, at temperature 1."""
    if marks.correlation < 0.9:
        return None
    if marks.pairs.entropy is None:
        return _temperature_without_entropy(marks)
    gap = marks.ours + marks.pairs.entropy[marks.pairs.mask]
    if not (square := float(gap @ gap)):
        return None
    slope = float(gap @ -marks.d) / square
    share = 1 - float(np.square(marks.d + slope * gap).sum() / np.square(marks.d).sum())
    if share < 0.8 or slope <= -0.9:
        return None
    temperature = 1 / (1 + slope)
    return Cause(
        "temperature",
        f"d follows the entropy gap (log-probability + entropy), which explains {share:.0%} of it, as if theirs were "
        f"taken at {temperature:.2f} times our temperature.",
        temperature,
    )


def _temperature_without_entropy(marks: _Marks) -> Cause | None:
    """Another temperature stretches log-probabilities.

    Noise in one side would stretch it too, but not the mean of both.
    """
    middle = (marks.ours + marks.theirs) / 2
    along = pearson(middle, marks.d) or 0.0
    if along**2 < 0.6:
        return None
    # Of unlikely tokens the normaliser hardly knows, so that they show the stretch best.
    unlikely = middle <= np.quantile(middle, 0.3)
    stretch = -float(np.polyfit(middle[unlikely], marks.d[unlikely], 1)[0])
    if abs(stretch) >= 1:
        return None
    temperature = (2 - stretch) / (2 + stretch)
    return Cause(
        "temperature",
        f"d grows in proportion to the log-probability, which explains {along**2:.0%} of it, as if theirs were taken "
        f"at about {temperature:.1f} times our temperature; with `entropy` in the file this would be more exact.",
        temperature,
    )


def _padding(marks: _Marks) -> Cause | None:
    """In a padded batch the longest row has no padding, and so keeps the right numbers."""
    pairs = marks.pairs
    counts = np.bincount(pairs.rollouts[pairs.mask], minlength=len(pairs.lengths))
    there = counts > 0
    errors = np.bincount(pairs.rollouts[pairs.mask], np.abs(marks.d), minlength=len(counts))[there] / counts[there]
    lengths = pairs.lengths if pairs.prompt_lengths is None else pairs.lengths + pairs.prompt_lengths
    unharmed = errors <= np.median(errors) / 20
    chance = _chance_of_long(lengths[there], unharmed)
    if chance > 1e-3:
        return None
    return Cause(
        "padding",
        f"{unharmed.sum():,} of {len(errors):,} rollouts are unharmed, and they are long ones "
        f"({np.median(lengths[there][unharmed]):.0f} tokens at the median, the others "
        f"{np.median(lengths[there][~unharmed]):.0f}), as the longest row of each padded batch has no padding.",
    )


def _chance_of_long(lengths: NDArray[np.int64], chosen: NDArray[np.bool_]) -> float:
    """How likely it is that a random choice of as many has lengths as large as the chosen ones: by their rank sum."""
    count, others = int(chosen.sum()), int((~chosen).sum())
    if not count or not others:
        return 1.0
    if lengths[chosen].min() > lengths[~chosen].max():
        return 1 / math.comb(count + others, count)
    mean, variance = count * (count + others + 1) / 2, count * others * (count + others + 1) / 12
    return math.erfc((float(ranks(lengths.astype(float))[chosen].sum()) - mean) / math.sqrt(2 * variance)) / 2


def _dtype(marks: _Marks) -> Cause | None:
    """Rounding is small, goes both ways, and has nothing to do with the rollout."""
    bias = abs(float(marks.d.mean())) / marks.size
    if marks.k3 > _LARGEST_K3_OF_DTYPE or bias > 0.2 or not _is_of_logits(marks) or _is_shared_in_rollouts(marks):
        return None
    return Cause(
        "dtype",
        f"d is small (k3 {marks.k3:.2g}), goes both ways (its mean is {bias:.0%} of the mean |d|), is smallest where "
        "the token is certain and unrelated within a rollout, as rounding to a shorter dtype such as bfloat16 makes "
        "it.",
    )


def _weights(marks: _Marks) -> Cause | None:
    """Everything differs, in the way in which logits differ, and more than rounding explains."""
    shared, large = _is_shared_in_rollouts(marks), marks.k3 > _LARGEST_K3_OF_DTYPE
    if marks.correlation < 0.5 or not _is_of_logits(marks) or not (shared or large):
        return None
    return Cause(
        "weights",
        f"d is {'alike within a rollout' if shared else 'found everywhere'}, smallest where the token is certain, and "
        f"{'larger than rounding makes it' if large else 'small'} (k3 {marks.k3:.2g}), and no "
        "other cause fits: the two have other weights, such as those before an update.",
    )


def _is_of_logits(marks: _Marks) -> bool:
    """Whether d vanishes where a token is nearly certain, as it does whatever happens to the logits before softmax."""
    certain = marks.ours > _NEARLY_CERTAIN
    if min(certain.sum(), (~certain).sum()) < _FEWEST_CERTAIN:
        return False
    return float(np.square(marks.d[certain]).mean()) < 0.3 * float(np.square(marks.d[~certain]).mean())


def _is_shared_in_rollouts(marks: _Marks) -> bool:
    """Whether d is alike within a rollout: by the analysis of variance, plainly above chance and above a trace."""
    places = marks.pairs.rollouts[marks.pairs.mask]
    counts = np.bincount(places)
    groups, tokens = int((counts > 0).sum()), len(marks.d)
    if groups < 10 or tokens < 2 * groups:
        return False
    means = np.bincount(places, marks.d) / np.maximum(counts, 1)
    within = float(np.square(marks.d - means[places]).sum()) / (tokens - groups)
    between = float((counts * np.square(means - marks.d.mean()))[counts > 0].sum()) / (groups - 1)
    if not within:
        return between > 0
    ratio = between / within
    share = (ratio - 1) / (ratio - 1 + tokens / groups)
    return ratio - 1 > 5 * math.sqrt(2 / (groups - 1)) and share > 0.05
