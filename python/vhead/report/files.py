"""Files of scores, read for a comparison: only the columns that it needs, a record at a time."""

from collections.abc import Iterable, Mapping, Set
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vhead.errors import FieldError, FileFormatError
from vhead.report.comparison import WORST, Comparison, of_records
from vhead.report.context import in_context
from vhead.report.records import ENTROPY, LOGPROBS, MASK, OTHERS, TOKEN_IDS, Problems, Record, matched
from vhead.rollouts.files.opening import open_reader
from vhead.rollouts.files.rows import Row
from vhead.rollouts.wording import named, shown

OLD_LOGPROBS = "old_logprobs"
_PROMPT = "prompt_ids"
_COLUMNS_SHOWN = 20
_SHARED = (ENTROPY, MASK, TOKEN_IDS, *OTHERS)
_EXPECTED = {
    "values": "a number for each token, or a list of K",
    "reward": "a number, or a list of K",
    TOKEN_IDS: "a whole number for each token",
}


def compare_files(
    ours: str,
    theirs: str | None = None,
    *,
    ours_column: str = LOGPROBS,
    theirs_column: str | None = None,
    worst: int = WORST,
) -> Comparison:
    """Compares two files of scores, or within one file the log-probabilities of two columns: d = ours - theirs.

    Records are matched by `id` where each has one, otherwise by position. Records and fields that do not fit together
    are left out and counted.

    Args:
        ours: A file of scores, JSON Lines or Parquet.
        theirs: Another one. None: theirs are a column of the same file.
        ours_column: Where our log-probabilities are.
        theirs_column: Where theirs are. None: `logprobs` of another file, `old_logprobs` of the same one.
        worst: How many of the tokens with the largest |d| are listed.

    Raises:
        FieldError: A column that was asked for is missing, an id is there twice and the order differs, or no record or
            field is in both.
        FileFormatError: A name's ending means no format, or a file is empty or does not hold what its name promises.
        MissingExtraError: pyarrow is needed and not installed.
        OSError: A file cannot be read.
    """
    problems = Problems()
    if theirs is None:
        both = _read(ours, (ours_column, theirs_column or OLD_LOGPROBS), problems)
        first = [side for side, _ in both]
        second = [side for _, side in both]
    else:
        first = [side for side, _ in _read(ours, (ours_column, None), problems)]
        second = [side for side, _ in _read(theirs, (theirs_column or LOGPROBS, None), problems)]
    comparison, kept = of_records(matched(first, second), problems, worst)
    if comparison.logprobs is None or not comparison.logprobs.worst:
        return comparison
    counts = [kept[token.rollout].count for token in comparison.logprobs.worst]
    explained = in_context(ours, comparison.logprobs.worst, counts)
    return replace(comparison, logprobs=replace(comparison.logprobs, worst=explained))


def _read(name: str, columns: tuple[str, str | None], problems: Problems) -> list[tuple[Record, Record]]:
    """The records of a file, each with its other side: that of the second column, where one is asked for."""
    here, there = columns
    wanted = ("id", here, *([there] if there else []), *_SHARED, _PROMPT)
    found: list[tuple[Record, Record]] = []
    count, known = 0, set[str]()
    reader = open_reader(name)
    try:
        for row in reader:
            count += 1
            try:
                fields = row.members(wanted)
                known |= fields.keys()
                found.append(_sides(name, row, fields, here, there))
            except FieldError as error:
                problems.add(error)
        if not count:
            raise FileFormatError(f"{name}: expected records with scores, and the file has none")
    finally:
        reader.close()
    if found:
        _check_columns(name, known, here, there)
    return found


def _check_columns(name: str, known: Set[str], here: str, there: str | None) -> None:
    """What was asked for by name must be there; without log-probabilities, values or rewards can be compared."""
    asked = {column for column in (here, there) if column} - ({LOGPROBS} if there is None else set())
    if missing := sorted(asked - known):
        expected = "a column of log-probabilities, in some record"
        raise FieldError(name, missing[0], expected=expected, got=f"the columns {_columns(name)}")
    if not known & {here, *OTHERS}:
        expected = f"one of {', '.join((here, *OTHERS))}"
        raise FieldError(name, "columns", expected=expected, got=f"the columns {_columns(name)}")


def _columns(name: str) -> str:
    """The columns of the first record that can be read."""
    reader = open_reader(name)
    try:
        for row in reader:
            try:
                return _listed(row.columns())
            except FieldError:
                continue
    finally:
        reader.close()
    return "none"


def _sides(name: str, row: Row, fields: Mapping[str, Any], here: str, there: str | None) -> tuple[Record, Record]:
    id = fields.get("id")
    id = id if isinstance(id, str | int | float) else None
    where = f"{name}: {row.where}"
    try:
        shared = {column: _array(column, fields[column]) for column in _SHARED if fields.get(column) is not None}
        sides = [
            {LOGPROBS: _array(column, fields[column])} if column and fields.get(column) is not None else {}
            for column in (here, there)
        ]
    except FieldError as error:
        raise error.of(named(where, id)) from None
    prompt = fields.get(_PROMPT)
    length = None if prompt is None or not hasattr(prompt, "__len__") else len(prompt)
    ours = Record(where, id, shared | sides[0], length, row.count)
    return ours, Record(where, id, sides[1], length, row.count)


def _array(name: str, value: Any) -> NDArray[Any]:
    """The numbers of a field; float64, or bool for a mask and int64 for token ids."""
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):
        raise FieldError(None, name, expected="numbers, in lists of one length", got=shown(value)) from None
    if name == MASK:
        if array.ndim != 1 or not (array.dtype.kind == "b" or not array.size or _is_of_zeros_and_ones(array)):
            raise FieldError(None, name, expected="true and false, or 1 and 0, for each token", got=shown(value))
        return array.astype(np.bool_)
    if array.dtype == object and array.ndim == 1 and None in value:
        raise FieldError(None, name, expected="numbers", got=f"nothing at token {list(value).index(None)}")
    least = 0 if name == "reward" else 1
    kinds = "ui" if name == TOKEN_IDS else "uif"
    if (array.dtype.kind not in kinds and array.size) or not least <= array.ndim <= least + (name in OTHERS):
        raise FieldError(None, name, expected=_EXPECTED.get(name, "a number for each token"), got=shown(value))
    if name == TOKEN_IDS:
        return array.astype(np.int64)
    return array.astype(np.float64, copy=False)


def _is_of_zeros_and_ones(array: NDArray[Any]) -> bool:
    return array.dtype.kind in "uif" and bool(((array == 0) | (array == 1)).all())


def _listed(names: Iterable[str]) -> str:
    first = sorted(names)
    listed = ", ".join(name[:40] for name in first[:_COLUMNS_SHOWN])
    return listed if len(first) <= _COLUMNS_SHOWN else f"{listed} and {len(first) - _COLUMNS_SHOWN:,} more"
