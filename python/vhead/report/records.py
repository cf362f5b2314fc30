"""Records with scores, and which of one side belongs to which of the other."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vhead.errors import FieldError, RecordError
from vhead.report.pairs import Pairs
from vhead.report.sides import COMPLETION_IDS, ENTROPY, LOGPROBS, MASK, OTHERS, TOKEN_IDS, Column, Record, Side
from vhead.rollouts.ragged import offsets_of, positions_of
from vhead.rollouts.wording import Id, shown

_PROBLEMS_KEPT = 20
# What says how many tokens a rollout has, the first of them that is there.
_OF_TOKENS = (LOGPROBS, "values", TOKEN_IDS, MASK)


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
        ours: Ours, in order.
        theirs: Of each of ours, theirs.
        by_id: Whether they were found by their ids; otherwise by their positions.
        only_ours: How many records theirs lacks.
        only_theirs: How many records ours lacks.
    """

    ours: Side
    theirs: Side
    by_id: bool
    only_ours: int
    only_theirs: int


def matched(ours: Side, theirs: Side) -> Matched:
    """Which records belong together: by `id` where all have one, otherwise by position.

    Ids may be there several times where both sides have the same ones in the same order.

    Raises:
        FieldError: An id is there twice, and the other side is in another order; or no id is on both sides.
    """
    by_id = None not in ours.ids and None not in theirs.ids
    if ours.ids == theirs.ids or not by_id:
        rows = np.tile(np.arange(min(len(ours), len(theirs))), (2, 1))
    else:
        for side in (ours, theirs):
            _check_unique(side)
        places = {_key(id): at for at, id in enumerate(theirs.ids)}
        found = [(at, places[_key(id)]) for at, id in enumerate(ours.ids) if _key(id) in places]
        if not found and len(ours) and len(theirs):
            raise _no_id_in_common(ours, theirs)
        rows = np.array(found, np.int64).reshape(-1, 2).T
    count = len(rows[0])
    return Matched(ours.take(rows[0]), theirs.take(rows[1]), by_id, len(ours) - count, len(theirs) - count)


def paired(found: Matched, problems: Problems) -> tuple[Pairs, Side]:
    """The arrays of all pairs that fit together, and our record of each; the others are problems.

    Values and rewards that do not fit leave only themselves out.
    """
    fits = _judged(found.ours, found.theirs, _may_not_fit(found.ours, found.theirs), _check_pair, problems)
    ours, theirs = (side.take(np.flatnonzero(fits)) for side in (found.ours, found.theirs))
    others = {name: _other(name, ours, theirs, problems) for name in OTHERS}
    for name in (LOGPROBS, *OTHERS):
        _note_missing(name, ours, theirs, problems)
    return _flat(ours, theirs, {name: found for name, found in others.items() if found}), ours


def _judged(
    ours: Side,
    theirs: Side,
    suspects: NDArray[np.bool_],
    check: Callable[[Record, Record], None],
    problems: Problems,
) -> NDArray[np.bool_]:
    """Which pairs pass a check. Only suspects are looked at one by one; their errors are problems."""
    fits = np.ones(len(ours), np.bool_)
    for at in np.flatnonzero(suspects).tolist():
        try:
            check(ours.record(at), theirs.record(at))
        except FieldError as error:
            problems.add(error)
            fits[at] = False
    return fits


def _may_not_fit(ours: Side, theirs: Side) -> NDArray[np.bool_]:
    """All pairs that `_check_pair` refuses, and few others: found by whole columns, as nearly all pairs fit."""
    suspects = np.array([mine != other for mine, other in zip(ours.ids, theirs.ids, strict=True)], np.bool_)
    for name in (TOKEN_IDS, COMPLETION_IDS, MASK):
        suspects |= _differ(name, ours, theirs)
    lengths = _lengths(ours, theirs)
    for side in (ours, theirs):
        for name in (LOGPROBS, ENTROPY, MASK, TOKEN_IDS):
            column = side.column(name)
            suspects |= column.there & (column.lengths != lengths)
        for name in (LOGPROBS, ENTROPY):
            suspects |= _not_finite(side.column(name))
    return suspects


def _not_finite(column: Column) -> NDArray[np.bool_]:
    return column.owners(~np.isfinite(column.values))


def _differ(name: str, ours: Side, theirs: Side) -> NDArray[np.bool_]:
    """Where both sides have a field, and not the same."""
    first, second = ours.column(name), theirs.column(name)
    both = first.there & second.there
    same_length = both & (first.lengths == second.lengths)
    rows = np.flatnonzero(same_length)
    first, second = first.take(rows), second.take(rows)
    different: NDArray[np.bool_] = both & ~same_length
    different[rows] = first.owners(first.values != second.values)
    return different


def _lengths(ours: Side, theirs: Side) -> NDArray[np.int64]:
    """Tokens of each rollout by the first field that says it, as `_first_field` has it."""
    lengths, known = np.zeros(len(ours), np.int64), np.zeros(len(ours), np.bool_)
    for name in _OF_TOKENS:
        for side in (ours, theirs):
            column = side.column(name)
            lengths = np.where(known, lengths, column.lengths)
            known = known | column.there
    return lengths


def _no_id_in_common(ours: Side, theirs: Side) -> FieldError:
    """Shows an id of each side: two that are written alike, where there are such."""
    written = {str(id): at for at, id in enumerate(theirs.ids)}
    alike = next(((at, written[str(id)]) for at, id in enumerate(ours.ids) if str(id) in written), None)
    first, second = alike or (0, 0)
    remedy = (
        "give ids the same type on both sides"
        if alike
        else "name rollouts alike on both sides, or leave `id` out of one to match records by position"
    )
    examples = (
        f"such as {shown(ours.ids[first])} at {ours.places[first]} "
        f"and {shown(theirs.ids[second])} at {theirs.places[second]}"
    )
    got = f"{len(ours):,} only in ours and {len(theirs):,} only in theirs, {examples}; {remedy}"
    return FieldError(None, "id", expected="records with the same `id`", got=got)


def _key(id: Id) -> tuple[type, Id]:
    """To Python, `1`, `1.0` and `True` are one key."""
    return type(id), id


def _check_unique(side: Side) -> None:
    (most, count), *_ = Counter(map(_key, side.ids)).most_common(1) or [((str, ""), 0)]
    if count > 1:
        first, second = [place for place, id in zip(side.places, side.ids, strict=True) if _key(id) == most][:2]
        expected = "each id once, where the two are not in the same order"
        raise FieldError(second, "id", expected=expected, got=f"{shown(most[1])} there and at {first}")


def _check_pair(ours: Record, theirs: Record) -> None:
    if ours.id is not None and theirs.id is not None and ours.id != theirs.id:
        raise FieldError(
            ours.name, "id", expected=f"the id of {theirs.name}, which is at the same place", got="another"
        )
    for name in (TOKEN_IDS, COMPLETION_IDS):
        if _is_other(name, ours, theirs):
            got = "others, so that the numbers are those of other tokens"
            raise FieldError(ours.name, name, expected=f"those of {theirs.name}", got=got)
    _check_lengths(ours, theirs)
    if _is_other(MASK, ours, theirs):
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


def _is_other(name: str, ours: Record, theirs: Record) -> bool:
    """Whether both have a field that must be the same, and it is not."""
    there = name in ours.arrays and name in theirs.arrays
    return there and not np.array_equal(ours.arrays[name], theirs.arrays[name])


def _first_field(ours: Record, theirs: Record) -> tuple[int, str]:
    """Tokens of the rollout by the first field that says it, and which one that is."""
    for name in _OF_TOKENS:
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


def _note_missing(name: str, ours: Side, theirs: Side, problems: Problems) -> None:
    """A field that most records have on both sides should be there in all of them."""
    there = np.column_stack([side.column(name).there for side in (ours, theirs)])
    if not there.all(axis=1).any():
        return
    for at, which in np.argwhere(~there).tolist():
        expected = "the field, which other records have on both sides"
        problems.add(FieldError((ours, theirs)[which].name(at), name, expected=expected, got="nothing"))


def _other(
    name: str, ours: Side, theirs: Side, problems: Problems
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]] | None:
    """Both sides' values or rewards `[n, K]`, and the rollout and the position of each row."""
    first, second = ours.column(name), theirs.column(name)
    lengths = np.ones(len(ours), np.int64) if name == "reward" else _lengths(ours, theirs)
    there = first.there & second.there
    alike = there & (first.widths == second.widths) & (first.lengths == lengths) & (second.lengths == lengths)
    outputs = next(iter(first.widths[alike & (lengths > 0)].tolist()), 0)
    suspects = there & (~alike | (first.widths != outputs) | _not_finite(first) | _not_finite(second))
    fits = _judged(ours, theirs, suspects, partial(_check_other, name, outputs), problems)
    rows = np.flatnonzero(fits & alike & (first.widths == outputs))
    mask = np.ones(len(rows), np.bool_) if name == "reward" else _mask(ours, theirs, rows, lengths[rows])
    if not mask.any():
        return None
    places = np.column_stack([np.repeat(rows, lengths[rows]), positions_of(lengths[rows])])
    numbers = (column.take(rows).values.reshape(-1, outputs)[mask] for column in (first, second))
    return next(numbers), next(numbers), places[mask]


def _check_other(name: str, outputs: int, ours: Record, theirs: Record) -> None:
    length = 1 if name == "reward" else _first_field(ours, theirs)[0]
    first, second = (_by_token(name, record) for record in (ours, theirs))
    if first.shape != second.shape:
        if first.shape[1] == second.shape[1] == 1:
            first, second = first[:, 0], second[:, 0]
        raise FieldError(ours.name, name, expected=f"{_count(second)}, as {theirs.name} has", got=_count(first))
    if len(first) != length:
        raise FieldError(ours.name, name, expected=f"values for {length:,} tokens", got=f"{len(first):,}")
    mask = None if name == "reward" else ours.arrays.get(MASK, theirs.arrays.get(MASK))
    for record, array in ((ours, first), (theirs, second)):
        broken = ~np.isfinite(array).all(axis=1)
        if mask is not None:
            broken &= mask
        if broken.any():
            got = f"NaN or an infinity at token {broken.argmax()}"
            raise FieldError(record.name, name, expected="finite numbers", got=got)
    if first.size and first.shape[1] != outputs:
        expected = f"{outputs} outputs, as in the first record"
        raise FieldError(ours.name, name, expected=expected, got=f"{first.shape[1]}")


def _by_token(name: str, record: Record) -> NDArray[np.float64]:
    """Values `[C, K]`; a reward `[1, K]`."""
    array = record.arrays[name]
    return array.reshape(1 if name == "reward" else len(array), -1) if array.size else array.reshape(len(array), 1)


def _mask(ours: Side, theirs: Side, rows: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which tokens of these records count, by ours where both say it; all of them where neither does."""
    first, second = (side.column(MASK).take(rows) for side in (ours, theirs))
    mine, other = (column.filled(lengths, default=True) for column in (first, second))
    return np.where(np.repeat(first.there, lengths), mine, other).astype(np.bool_)


def _flat(ours: Side, theirs: Side, others: Mapping[str, Any]) -> Pairs:
    lengths = _lengths(ours, theirs)
    first, second = ours.column(LOGPROBS), theirs.column(LOGPROBS)
    compared = first.there & second.there
    entropy = ours.column(ENTROPY)
    unknown = ours.prompt_lengths < 0
    return Pairs(
        ours=first.filled(lengths, default=0.0) if compared.any() else None,
        theirs=second.filled(lengths, default=0.0) if compared.any() else None,
        offsets=offsets_of(lengths),
        mask=_mask(ours, theirs, np.arange(len(ours)), lengths) & np.repeat(compared, lengths),
        ids=ours.ids,
        entropy=entropy.values if entropy.there.all() else None,
        prompt_lengths=None if unknown.any() else ours.prompt_lengths,
        others=others,
    )


def _count(array: NDArray[Any]) -> str:
    if array.ndim == 2:
        return f"{array.shape[0]:,} of {array.shape[1]} outputs"
    return f"{array.size:,}"
