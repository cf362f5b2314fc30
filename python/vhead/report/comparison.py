"""The whole comparison of two scorings, from arrays or `Scores`."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vhead.errors import FieldError
from vhead.report.causes import Cause, likely_cause
from vhead.report.differences import Difference, LogprobDifference, difference, logprob_difference
from vhead.report.pairs import Pairs
from vhead.report.records import Matched, Problems, check_finite, matched, paired
from vhead.report.sides import ENTROPY, LOGPROBS, MASK, OTHERS, TOKEN_IDS, Record, Side
from vhead.rollouts.ragged import offsets_of

if TYPE_CHECKING:
    from vhead.scoring import Scores

WORST = 5


@dataclass(frozen=True, slots=True)
class Comparison:
    """What two scorings of the same rollouts say about each other. All differences are ours - theirs.

    Attributes:
        rollouts: How many rollouts are compared.
        tokens: How many of their tokens have log-probabilities on both sides, and are not masked.
        logprobs: How far log-probabilities are apart; None where a side has none.
        values: How far values are apart; None likewise.
        reward: How far rewards are apart; None likewise.
        cause: A guess at why log-probabilities differ; None where there are none.
        by_id: Whether rollouts were matched by their ids; otherwise by position.
        only_ours: How many rollouts theirs lacks.
        only_theirs: How many rollouts ours lacks.
        left_out: How many records were left out, whole or a field of them, because they do not fit.
        problems: Why, for the first of them.
    """

    rollouts: int
    tokens: int
    logprobs: LogprobDifference | None
    values: Difference | None
    reward: Difference | None
    cause: Cause | None
    by_id: bool = False
    only_ours: int = 0
    only_theirs: int = 0
    left_out: int = 0
    problems: tuple[str, ...] = ()


def compare(
    ours: "ArrayLike | Scores",
    theirs: "ArrayLike | Scores",
    *,
    offsets: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    entropy: ArrayLike | None = None,
    prompt_lengths: ArrayLike | None = None,
    worst: int = WORST,
) -> Comparison:
    """Compares log-probabilities of the same tokens, d = ours - theirs, or all that two `Scores` have in common.

    Args:
        ours: The trainer's log-probabilities in nats, `[T]` with `offsets`, or `[B, T]`; any array or torch tensor.
            Or `Scores`, which need no other argument.
        theirs: Those of the engine that generated, or of before the update, in the same shape; or `Scores`.
        offsets: Rollout i owns the entries `offsets[i]:offsets[i + 1]`, ints `[N + 1]`. None: a one-dimensional array
            is one rollout, and each row of a two-dimensional one is.
        mask: The tokens that count, bool or 0 and 1, in the same shape. What stands at the others does not matter.
        entropy: Ours, in nats, in the same shape; it makes the guess at another temperature exact.
        prompt_lengths: Tokens of each prompt, ints `[N]`; they help to see a fault of padding.
        worst: How many of the tokens with the largest |d| are listed.

    Raises:
        FieldError: Shapes differ, or a number that counts is NaN or infinite. With `Scores`, also: an id is there
            twice and the order differs, or no rollouts or fields are in both.
    """
    if hasattr(ours, "computed") and hasattr(theirs, "computed"):
        problems = Problems()
        found = matched(_side(ours, "ours"), _side(theirs, "theirs"))
        return of_records(found, problems, worst)[0]
    flat = _lined_up(ours, theirs, offsets, mask, entropy)
    if prompt_lengths is not None:
        flat = replace(flat, prompt_lengths=_prompt_lengths(prompt_lengths, len(flat.lengths)))
    return of_pairs(flat, worst)


def of_pairs(pairs: Pairs, worst: int) -> Comparison:
    """The comparison of what is lined up already."""
    logprobs = logprob_difference(pairs, worst)
    return Comparison(
        rollouts=len(pairs.lengths),
        tokens=0 if logprobs is None else logprobs.tokens,
        logprobs=logprobs,
        values=difference(pairs, "values"),
        reward=difference(pairs, "reward"),
        cause=likely_cause(pairs),
    )


def of_records(found: Matched, problems: Problems, worst: int) -> tuple[Comparison, Side]:
    """The comparison of matched records, and those of ours that it is about.

    Raises:
        FieldError: Nothing can be compared.
    """
    pairs, kept = paired(found, problems)
    if not len(found.ours):
        got = f"{found.only_ours:,} only in ours and {found.only_theirs:,} only in theirs"
        raise FieldError(None, "records", expected="a record on both sides", got=got)
    comparison = replace(
        of_pairs(pairs, worst),
        by_id=found.by_id,
        only_ours=found.only_ours,
        only_theirs=found.only_theirs,
        left_out=problems.count,
        problems=tuple(problems.messages),
    )
    if comparison.logprobs is None and comparison.values is None and comparison.reward is None:
        raise _nothing_in_common(found, problems)
    return comparison, kept


def _nothing_in_common(found: Matched, problems: Problems) -> FieldError:
    if problems.count:
        expected = "a pair of records that can be compared"
        return FieldError(
            None, "records", expected=expected, got=f"{problems.count:,} problems: {problems.messages[0]}"
        )
    names = (LOGPROBS, *OTHERS)
    ours, theirs = ({name for name in names if side.column(name).there.any()} for side in (found.ours, found.theirs))
    expected = f"one of {', '.join(names)} on both sides, for a token that is not masked"
    got = f"{', '.join(sorted(ours)) or 'none'} in ours and {', '.join(sorted(theirs)) or 'none'} in theirs"
    return FieldError(None, "fields", expected=expected, got=got)


def _side(scores: Any, side: str) -> Side:
    """The rollouts of `Scores`."""
    names = [name for name in (LOGPROBS, ENTROPY, TOKEN_IDS, *OTHERS) if name in scores.computed]
    masked = getattr(scores, "mask", None) is not None
    records = []
    for at, score in enumerate(scores):
        arrays = {name: np.asarray(score.computed[name]) for name in names}
        if masked:
            arrays[MASK] = np.asarray(score.mask)
        records.append(Record(f"{side}: rollout {at}", score.id, arrays, int(score.prompt_length)))
    return Side.of(records)


def _lined_up(
    ours: Any, theirs: Any, offsets: ArrayLike | None, mask: ArrayLike | None, entropy: ArrayLike | None
) -> Pairs:
    arrays = {"ours": _floats(ours, "ours"), "theirs": _floats(theirs, "theirs")}
    if entropy is not None:
        arrays["entropy"] = _floats(entropy, "entropy")
    shape = arrays["ours"].shape
    if len(shape) not in {1, 2} or (len(shape) == 2 and offsets is not None):
        raise FieldError(None, "ours", expected="[T], or [B, T] without offsets", got=f"shape {list(shape)}")
    counted = np.ones(shape, np.bool_) if mask is None else _mask(mask)
    for name, array in {**arrays, "mask": counted}.items():
        if array.shape != shape:
            raise FieldError(None, name, expected=f"shape {list(shape)}, as ours has", got=f"shape {list(array.shape)}")
    if len(shape) == 2:
        inside = _completions(counted)
        lengths, counted = inside.sum(axis=1), counted[inside]
        arrays = {name: array[inside] for name, array in arrays.items()}
        bounds = offsets_of(lengths)
    else:
        bounds = _offsets(offsets, len(counted))
    for name, array in arrays.items():
        check_finite(array, counted, name)
    return Pairs(
        arrays["ours"], arrays["theirs"], bounds, counted, [None] * (len(bounds) - 1), entropy=arrays.get("entropy")
    )


def _completions(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """From the first token of each row that counts to the last one: what is outside is padding."""
    forward = np.logical_or.accumulate(mask, axis=1)
    return forward & np.logical_or.accumulate(mask[:, ::-1], axis=1)[:, ::-1]


def _floats(numbers: Any, name: str) -> NDArray[np.float64]:
    try:
        # A torch tensor, known by its methods so that torch need not be imported.
        if hasattr(numbers, "detach"):
            numbers = numbers.detach().cpu().double().numpy()
        return np.asarray(numbers, np.float64)
    except (TypeError, ValueError) as error:
        raise FieldError(None, name, expected="an array of numbers", got=str(error)) from None


def _mask(mask: Any) -> NDArray[np.bool_]:
    numbers = _floats(mask, "mask")
    if not np.isin(numbers, (0, 1)).all():
        raise FieldError(None, "mask", expected="bools, or zeros and ones", got="other numbers")
    return numbers.astype(np.bool_)


def _offsets(offsets: ArrayLike | None, tokens: int) -> NDArray[np.int64]:
    if offsets is None:
        return np.array([0, tokens], np.int64)
    bounds = _floats(offsets, "offsets")
    if bounds.ndim != 1 or len(bounds) < 1 or bounds[0] != 0 or bounds[-1] != tokens or (np.diff(bounds) < 0).any():
        got = (
            "others"
            if bounds.ndim != 1 or not len(bounds)
            else f"{bounds[0]:g} to {bounds[-1]:g}, {bounds.size:,} of them"
        )
        raise FieldError(None, "offsets", expected=f"rising numbers from 0 to {tokens:,}, the tokens of ours", got=got)
    return bounds.astype(np.int64)


def _prompt_lengths(lengths: ArrayLike, count: int) -> NDArray[np.int64]:
    numbers = _floats(lengths, "prompt_lengths")
    if numbers.shape != (count,):
        got = f"shape {list(numbers.shape)}"
        raise FieldError(None, "prompt_lengths", expected=f"a number for each of the {count:,} rollouts", got=got)
    return numbers.astype(np.int64)
