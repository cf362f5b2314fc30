"""Records with scores, and which of one side belongs to which of the other."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vhead.errors import FieldError, RecordError
from vhead.report.pairs import Pairs
from vhead.rollouts.wording import Id, named, shown

LOGPROBS, ENTROPY, MASK, TOKEN_IDS = "logprobs", "entropy", "completion_mask", "token_ids"
COMPLETION_IDS = "completion_ids"
# What is compared beside log-probabilities: a number, or K of them, for each token or each rollout.
OTHERS = ("values", "reward")
_PROBLEMS_KEPT = 20


@dataclass(frozen=True)
class Record:
    """The scores of one rollout on one side.

    Attributes:
        where: Its place, such as `a.jsonl: line 12`.
        id: Its id.
        arrays: What is known of it, by name: float64 `[C]` for log-probabilities and entropy, `[C]` or `[C, K]` for
            values, `[]` or `[K]` for the reward, bool `[C]` for the mask, int64 `[C]` for token ids, int64 for the ids
            of the completion that came with the record.
        prompt_length: Tokens of its prompt, where known.
        count: Its place among the records of its file, from 1.
    """

    where: str
    id: Id
    arrays: Mapping[str, NDArray[Any]]
    prompt_length: int | None = None
    count: int = 0

    @property
    def name(self) -> str:
        """What errors call it."""
        return named(self.where, self.id)


@dataclass
class Problems:
    """What was left out and why: all are counted, and the first ones kept."""

    count: int = 0
    messages: list[str] = field(default_factory=list)

    def add(self, error: RecordError) -> None:
        """Counts one."""
        self.count += 1
        if len(self.messages) < _PROBLEMS_KEPT:
            self.messages.append(str(error))


@dataclass(frozen=True)
class Matched:
    """Records of both sides that belong together.

    Attributes:
        pairs: One of ours and one of theirs each.
        by_id: Whether they were found by their ids; otherwise by their positions.
        only_ours: How many records theirs lacks.
        only_theirs: How many records ours lacks.
    """

    pairs: Sequence[tuple[Record, Record]]
    by_id: bool
    only_ours: int
    only_theirs: int


def matched(ours: Sequence[Record], theirs: Sequence[Record]) -> Matched:
    """Which records belong together: by `id` where all have one, otherwise by position.

    Ids may be there several times where both sides have the same ones in the same order.

    Raises:
        FieldError: An id is there twice, and the other side is in another order; or no id is on both sides.
    """
    ids = [[record.id for record in side] for side in (ours, theirs)]
    if ids[0] == ids[1] or any(None in side for side in ids):
        count = min(len(ours), len(theirs))
        by_id = None not in ids[0] and None not in ids[1]
        pairs = list(zip(ours, theirs, strict=False))
        return Matched(pairs, by_id, len(ours) - count, len(theirs) - count)
    for side in (ours, theirs):
        _check_unique(side)
    there = {_key(record): record for record in theirs}
    pairs = [(record, there[_key(record)]) for record in ours if _key(record) in there]
    if not pairs and ours and theirs:
        raise _no_id_in_common(ours, theirs)
    return Matched(pairs, by_id=True, only_ours=len(ours) - len(pairs), only_theirs=len(theirs) - len(pairs))


def paired(pairs: Sequence[tuple[Record, Record]], problems: Problems) -> tuple[Pairs, list[Record]]:
    """The arrays of all pairs that fit together, and our record of each; the others are problems.

    Values and rewards that do not fit leave only themselves out.
    """
    kept, others = [], []
    for ours, theirs in pairs:
        try:
            _check_pair(ours, theirs)
        except FieldError as error:
            problems.add(error)
        else:
            kept.append((ours, theirs))
    for name in OTHERS:
        others.append((name, _other(name, kept, problems)))
    for name in (LOGPROBS, *OTHERS):
        _note_missing(name, kept, problems)
    return _flat(kept, {name: found for name, found in others if found}), [ours for ours, _ in kept]


def _no_id_in_common(ours: Sequence[Record], theirs: Sequence[Record]) -> FieldError:
    """Shows an id of each side: two that are written alike, where there are such."""
    written = {str(record.id): record for record in theirs}
    alike = next(((record, written[str(record.id)]) for record in ours if str(record.id) in written), None)
    first, second = alike or (ours[0], theirs[0])
    remedy = (
        "give ids the same type on both sides"
        if alike
        else "name rollouts alike on both sides, or leave `id` out of one to match records by position"
    )
    examples = f"such as {shown(first.id)} at {first.where} and {shown(second.id)} at {second.where}"
    got = f"{len(ours):,} only in ours and {len(theirs):,} only in theirs, {examples}; {remedy}"
    return FieldError(None, "id", expected="records with the same `id`", got=got)


def _key(record: Record) -> tuple[type, Id]:
    """To Python, `1`, `1.0` and `True` are one key."""
    return type(record.id), record.id


def _check_unique(side: Sequence[Record]) -> None:
    (most, count), *_ = Counter(map(_key, side)).most_common(1) or [((str, ""), 0)]
    if count > 1:
        first, second = [record.where for record in side if _key(record) == most][:2]
        expected = "each id once, where the two are not in the same order"
        raise FieldError(second, "id", expected=expected, got=f"{shown(most[1])} there and at {first}")


def _check_pair(ours: Record, theirs: Record) -> None:
    if ours.id is not None and theirs.id is not None and ours.id != theirs.id:
        raise FieldError(
            ours.name, "id", expected=f"the id of {theirs.name}, which is at the same place", got="another"
        )
    for name in (TOKEN_IDS, COMPLETION_IDS):
        if _differ(name, ours, theirs):
            got = "others, so that the numbers are those of other tokens"
            raise FieldError(ours.name, name, expected=f"those of {theirs.name}", got=got)
    _check_lengths(ours, theirs)
    if _differ(MASK, ours, theirs):
        raise FieldError(ours.name, MASK, expected=f"that of {theirs.name}", got="another")
    mask = ours.arrays.get(MASK, theirs.arrays.get(MASK))
    for record in (ours, theirs):
        for name in (LOGPROBS, ENTROPY):
            try:
                if name in record.arrays:
                    check_finite(record.arrays[name], mask, name)
            except FieldError as error:
                raise error.of(record.name) from None


def _check_lengths(ours: Record, theirs: Record) -> None:
    length, source = _first_field(ours, theirs)
    for record in (ours, theirs):
        for name in (LOGPROBS, ENTROPY, MASK, TOKEN_IDS):
            array = record.arrays.get(name)
            if array is not None and array.shape != (length,):
                expected = f"{length:,} of them, as {source}"
                raise FieldError(record.name, name, expected=expected, got=_count(array))


def _differ(name: str, ours: Record, theirs: Record) -> bool:
    """Whether both have a field that must be the same, and it is not."""
    there = name in ours.arrays and name in theirs.arrays
    return there and not np.array_equal(ours.arrays[name], theirs.arrays[name])


def _length(ours: Record, theirs: Record) -> int:
    return _first_field(ours, theirs)[0]


def _first_field(ours: Record, theirs: Record) -> tuple[int, str]:
    """Tokens of the rollout by the first field that says it, and which one that is."""
    for name in (LOGPROBS, "values", TOKEN_IDS, MASK):
        for record in (ours, theirs):
            if name in record.arrays:
                return len(record.arrays[name]), f"`{name}` of {record.where} has"
    return 0, "nothing has any"


def check_finite(array: NDArray[Any], mask: NDArray[np.bool_] | None, field: str) -> None:
    """Masked places may hold anything.

    Raises:
        FieldError: A number that counts is NaN or infinite.
    """
    broken = ~np.isfinite(array)
    if mask is not None:
        broken &= mask
    if broken.any():
        at = int(broken.argmax())
        expected = "finite numbers at all tokens that count"
        raise FieldError(None, field, expected=expected, got=f"{array.reshape(-1)[at]} at token {at}")


def _note_missing(name: str, pairs: Sequence[tuple[Record, Record]], problems: Problems) -> None:
    """A field that most records have on both sides should be there in all of them."""
    if not any(name in ours.arrays and name in theirs.arrays for ours, theirs in pairs):
        return
    for pair in pairs:
        for record in pair:
            if name not in record.arrays:
                expected = "the field, which other records have on both sides"
                problems.add(FieldError(record.name, name, expected=expected, got="nothing"))


def _other(
    name: str, pairs: Sequence[tuple[Record, Record]], problems: Problems
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]] | None:
    """Both sides' values or rewards `[n, K]`, and the rollout and the position of each row."""
    sides: tuple[list[NDArray[Any]], list[NDArray[Any]]] = ([], [])
    rollouts, places = [], []
    for rollout, (ours, theirs) in enumerate(pairs):
        if name not in ours.arrays or name not in theirs.arrays:
            continue
        try:
            first, second, rows = _other_pair(name, ours, theirs)
            if not len(rows):
                continue
            if sides[0] and first.shape[1] != sides[0][0].shape[1]:
                expected = f"{sides[0][0].shape[1]} outputs, as in the first record"
                raise FieldError(ours.name, name, expected=expected, got=f"{first.shape[1]}")
        except FieldError as error:
            problems.add(error)
            continue
        sides[0].append(first)
        sides[1].append(second)
        rollouts.append(rollout)
        places.append(rows)
    if not places:
        return None
    owners = np.repeat(rollouts, [len(rows) for rows in places])
    return np.concatenate(sides[0]), np.concatenate(sides[1]), np.column_stack([owners, np.concatenate(places)])


def _other_pair(name: str, ours: Record, theirs: Record) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.int64]]:
    first, second = ours.arrays[name], theirs.arrays[name]
    if first.shape != second.shape:
        raise FieldError(ours.name, name, expected=f"{_count(second)}, as {theirs.name} has", got=_count(first))
    if name == "reward":
        rows = np.zeros(1, np.int64)
        first, second = first.reshape(1, -1), second.reshape(1, -1)
    else:
        length = _length(ours, theirs)
        if len(first) != length:
            raise FieldError(ours.name, name, expected=f"values for {length:,} tokens", got=_count(first))
        rows, mask = np.arange(length), ours.arrays.get(MASK, theirs.arrays.get(MASK))
        first, second = (array if array.ndim > 1 else array[:, None] for array in (first, second))
        if mask is not None:
            rows = np.flatnonzero(mask)
            first, second = first[rows], second[rows]
    for record, array in ((ours, first), (theirs, second)):
        finite = np.isfinite(array)
        if not finite.all():
            at = int(rows[finite.all(axis=1).argmin()])
            raise FieldError(record.name, name, expected="finite numbers", got=f"NaN or an infinity at token {at}")
    return first, second, rows


def _flat(pairs: Sequence[tuple[Record, Record]], others: Mapping[str, Any]) -> Pairs:
    lengths = [_length(ours, theirs) for ours, theirs in pairs]
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    first, second = ([side[at] for side in pairs] for at in (0, 1))
    masks = [
        ours.arrays.get(MASK, theirs.arrays.get(MASK)) if {MASK} & {*ours.arrays, *theirs.arrays} else None
        for ours, theirs in pairs
    ]
    compared = [LOGPROBS in ours.arrays and LOGPROBS in theirs.arrays for ours, theirs in pairs]
    counts = [
        np.full(length, here) if mask is None else mask & here
        for mask, length, here in zip(masks, lengths, compared, strict=True)
    ]
    prompts = [record.prompt_length for record in first]
    return Pairs(
        ours=_joined(first, LOGPROBS, lengths) if any(compared) else None,
        theirs=_joined(second, LOGPROBS, lengths) if any(compared) else None,
        offsets=offsets,
        mask=np.concatenate([np.zeros(0, np.bool_), *counts]).astype(np.bool_),
        ids=[record.id for record in first],
        entropy=_joined(first, ENTROPY, lengths) if all(ENTROPY in record.arrays for record in first) else None,
        prompt_lengths=None if None in prompts else np.array(prompts, np.int64),
        others=others,
    )


def _joined(records: Sequence[Record], name: str, lengths: Sequence[int]) -> NDArray[np.float64]:
    missing = [record.arrays.get(name, np.zeros(length)) for record, length in zip_longest(records, lengths)]
    return np.concatenate([np.zeros(0), *missing])


def _count(array: NDArray[Any]) -> str:
    if array.ndim == 2:
        return f"{array.shape[0]:,} of {array.shape[1]} outputs"
    return f"{array.size:,}"
