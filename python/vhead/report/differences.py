"""How far two scorings are apart, as numbers. The sign is `ours - theirs` everywhere, which is new - old."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vhead.report.correlation import pearson, spearman
from vhead.report.pairs import Floats, Pairs
from vhead.rollouts.wording import Id

# A ratio outside these bounds is far from on-policy: PPO's clipping begins there in many recipes.
RATIO_BOUNDS = (0.9, 1.1)


@dataclass(frozen=True, slots=True)
class Bucket:
    """The tokens at positions, or of rollouts with lengths, from `first` to `last`.

    Attributes:
        first: The smallest position or length.
        last: The largest one.
        tokens: How many tokens are compared there.
        mean: Mean of d.
        mean_abs: Mean of |d|.
        k3: Mean of exp(d) - 1 - d.
    """

    first: int
    last: int
    tokens: int
    mean: float
    mean_abs: float
    k3: float


@dataclass(frozen=True, slots=True)
class WorstToken:
    """A token with one of the largest |d|.

    Attributes:
        rollout: The rollout's place among those compared, from 0.
        id: The rollout's id.
        position: The token's place in the completion, from 0.
        ours: Our log-probability.
        theirs: Theirs.
        difference: d.
        token_id: The token, where the files say it.
        before: What stands before it: text, or token ids.
        token: Its text, where the file has text and `token_offsets`.
        after: What stands after it.
    """

    rollout: int
    id: Id
    position: int
    ours: float
    theirs: float
    difference: float
    token_id: int | None = None
    before: str | None = None
    token: str | None = None
    after: str | None = None


@dataclass(frozen=True, slots=True)
class LogprobDifference:
    """How far log-probabilities are apart: d = ours - theirs (new - old), ratio = exp(d), over all tokens that count.

    Attributes:
        tokens: How many tokens are compared.
        k1: Mean of -d, in nats: estimates KL(theirs || ours) on tokens that theirs sampled.
        k3: Mean of exp(d) - 1 - d, in nats: estimates the same, and is never negative.
        chi2: Mean of ratio^2, less 1.
        effective_sample_size: (sum of ratios)^2 / sum of ratio^2, as a share of the tokens.
        outside: Share of ratios outside [0.9, 1.1].
        mean_abs: Mean of |d|.
        max_abs: Largest |d|.
        by_position: By the token's place in the completion, in powers of two.
        by_length: By the length of the completion, in powers of two.
        worst: The tokens with the largest |d|.
    """

    tokens: int
    k1: float
    k3: float
    chi2: float
    effective_sample_size: float
    outside: float
    mean_abs: float
    max_abs: float
    by_position: tuple[Bucket, ...]
    by_length: tuple[Bucket, ...]
    worst: tuple[WorstToken, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """How far values or rewards are apart: ours - theirs.

    Attributes:
        count: How many numbers are compared; K for each place of a head with K outputs.
        mean: Mean difference.
        mean_abs: Mean absolute difference.
        max_abs: Largest absolute difference.
        max_id: The id of the rollout that has it.
        max_position: Its place in the completion; None for rewards.
        spearman: Rank correlation, ties averaged; None where all numbers of a side are equal.
        pearson: Linear correlation; None likewise.
    """

    count: int
    mean: float
    mean_abs: float
    max_abs: float
    max_id: Id
    max_position: int | None
    spearman: float | None
    pearson: float | None


def logprob_difference(pairs: Pairs, worst: int) -> LogprobDifference | None:
    """The numbers for log-probabilities; None where a side has none, or no token counts."""
    if pairs.ours is None or pairs.theirs is None or not pairs.mask.any():
        return None
    ours, theirs = pairs.ours[pairs.mask], pairs.theirs[pairs.mask]
    d = ours - theirs
    # A ratio may be larger than any float; its means are infinite then.
    with np.errstate(over="ignore"):
        ratio = np.exp(d)
        k3 = np.expm1(d) - d
        chi2 = float(np.mean(np.square(ratio)) - 1)
    return LogprobDifference(
        tokens=len(d),
        k1=float((theirs - ours).mean()),
        k3=float(k3.mean()),
        chi2=chi2,
        effective_sample_size=effective_sample_size(d),
        outside=float(np.mean((ratio < RATIO_BOUNDS[0]) | (ratio > RATIO_BOUNDS[1]))),
        mean_abs=float(np.abs(d).mean()),
        max_abs=float(np.abs(d).max()),
        by_position=_buckets(pairs.positions[pairs.mask], d, k3),
        by_length=_buckets(np.repeat(pairs.lengths, pairs.lengths)[pairs.mask], d, k3),
        worst=_worst(pairs, d, worst),
    )


def effective_sample_size(d: Floats) -> float:
    """(sum of ratios)^2 / sum of ratio^2 as a share; ratios are divided by the largest, so that none overflows."""
    weights = np.exp(d - d.max())
    return float(weights.sum() ** 2 / np.square(weights).sum() / len(d))


def difference(pairs: Pairs, name: str) -> Difference | None:
    """The numbers for `values` or `reward`; None where a side has none."""
    if name not in pairs.others:
        return None
    ours, theirs, places = pairs.others[name]
    d = ours - theirs
    rollout, position = places[np.abs(d).max(axis=1).argmax()].tolist()
    return Difference(
        count=d.size,
        mean=float(d.mean()),
        mean_abs=float(np.abs(d).mean()),
        max_abs=float(np.abs(d).max()),
        max_id=pairs.ids[rollout],
        max_position=None if name == "reward" else position,
        spearman=spearman(ours.reshape(-1), theirs.reshape(-1)),
        pearson=pearson(ours.reshape(-1), theirs.reshape(-1)),
    )


def _buckets(numbers: NDArray[np.int64], d: Floats, k3: Floats) -> tuple[Bucket, ...]:
    """The tokens by a number of theirs: 0, 1, 2 to 3, 4 to 7, and so on."""
    _, power = np.frexp(numbers.astype(np.float64))
    counts = np.bincount(power)
    sums = [np.bincount(power, weights) for weights in (d, np.abs(d), k3)]
    return tuple(
        Bucket(2**at // 2, max(0, 2**at - 1), int(count), *(float(each[at] / count) for each in sums))
        for at, count in enumerate(counts.tolist())
        if count
    )


def _worst(pairs: Pairs, d: Floats, count: int) -> tuple[WorstToken, ...]:
    if count < 1 or pairs.ours is None or pairs.theirs is None:
        return ()
    size = np.abs(d)
    few = np.argpartition(size, -min(count, len(d)))[-min(count, len(d)) :]
    # The first of equal ones comes first.
    few = few[np.lexsort((few, -size[few]))]
    found = []
    for place in np.flatnonzero(pairs.mask)[few].tolist():
        rollout = int(pairs.rollouts[place])
        ours, theirs = float(pairs.ours[place]), float(pairs.theirs[place])
        token = WorstToken(rollout, pairs.ids[rollout], int(pairs.positions[place]), ours, theirs, ours - theirs)
        if ours != theirs:
            found.append(token)
    return tuple(found)
