"""Files of scores, read for a comparison: only the columns that it needs, a record at a time."""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vhead.errors import FieldError, FileFormatError
from vhead.report.comparison import WORST, Comparison, of_records
from vhead.report.context import in_context
from vhead.report.records import Problems, matched
from vhead.report.sides import COMPLETION_IDS, ENTROPY, LOGPROBS, MASK, OTHERS, TOKEN_IDS, Record, Side
from vhead.rollouts.files.opening import open_reader
from vhead.rollouts.files.rows import Row
from vhead.rollouts.wording import named, shown

OLD_LOGPROBS = "old_logprobs"
_PROMPT = "prompt_ids"
_COLUMNS_SHOWN = 20
_IDS = (TOKEN_IDS, COMPLETION_IDS)
_SHARED = (ENTROPY, MASK, *_IDS, *OTHERS)
# What came with the rollouts, and so is the same whichever scores are compared.
_OF_ROLLOUTS = (MASK, *_IDS)
_EXPECTED = {
    "values": "a number for each token, or a list of K",
    "reward": "a number, or a list of K",
    TOKEN_IDS: "a whole number for each token",
    COMPLETION_IDS: "a whole number for each token",
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
    are left out and counted. What a column's name has behind `logprobs` counts for the other columns as well: beside
    `logprobs_new`, values are those of `values_new`.

    Args:
        ours: A file of scores, JSON Lines or Parquet.
        theirs: Another one. None: theirs are a column of the same file.
        ours_column: Where our log-probabilities are.
        theirs_column: Where theirs are. None: in the same column of another file, in `old_logprobs` of the same one.
        worst: How many of the tokens with the largest |d| are listed.

    Raises:
        FieldError: A column that was asked for is missing, an id is there twice and the order differs, or no record or
            field is in both.
        FileFormatError: A name's ending means no format, or a file is empty, does not hold what its name promises, or
            has no record that can be read.
        MissingExtraError: pyarrow is needed and not installed.
        OSError: A file cannot be read.
    """
    problems = Problems()
    if theirs is None:
        first, second = _read(ours, (ours_column, theirs_column or OLD_LOGPROBS), problems)
    else:
        (first,) = _read(ours, (ours_column,), problems)
        (second,) = _read(theirs, (theirs_column or ours_column,), problems)
    comparison, kept = of_records(matched(Side.of(first), Side.of(second)), problems, worst)
    if comparison.logprobs is None or not comparison.logprobs.worst:
        return comparison
    counts = [int(kept.counts[token.rollout]) for token in comparison.logprobs.worst]
    explained = in_context(ours, comparison.logprobs.worst, counts)
    return replace(comparison, logprobs=replace(comparison.logprobs, worst=explained))


def _read(name: str, columns: tuple[str, ...], problems: Problems) -> list[list[Record]]:
    """The records of a file, once for each of these columns of log-probabilities."""
    roles = _roles(columns)
    wanted: Sequence[str] = ("id", *roles, _PROMPT)
    found: list[list[Record]] = [[] for _ in columns]
    count, known, broken = 0, set[str](), None
    reader = open_reader(name)
    if reader.schema is not None:
        there = set(reader.schema.names)
        wanted = [column for column in wanted if column in there]
    try:
        for row in reader:
            count += 1
            try:
                fields = _members(name, row, wanted)
                known |= fields.keys()
                for side, record in zip(found, _records(name, row, fields, roles, len(columns)), strict=True):
                    side.append(record)
            except FieldError as error:
                broken = broken or error
                problems.add(error)
        if not count:
            raise FileFormatError(f"{name}: expected records with scores, and the file has none")
        if not found[0]:
            raise FileFormatError(f"{name}: expected records with scores, got none that can be read: {broken}")
    finally:
        reader.close()
    _check_columns(name, known, columns)
    return found


def _members(name: str, row: Row, wanted: Sequence[str]) -> dict[str, Any]:
    """What the row has of these columns; errors name the file as well, as two of them are read."""
    try:
        return row.members(wanted)
    except FieldError as error:
        raise error.of(f"{name}: {row.where}") from None


def _roles(columns: Sequence[str]) -> dict[str, list[tuple[int, str]]]:
    """What each column is, and on which side: of the rollouts themselves, or with the ending of the first column."""
    here = columns[0]
    suffix = here[len(LOGPROBS) :] if here.startswith(LOGPROBS) else ""
    roles: dict[str, list[tuple[int, str]]] = {name: [(0, name)] for name in _OF_ROLLOUTS}
    roles |= {f"{name}{suffix}": [(0, name)] for name in _SHARED}
    for side, column in enumerate(columns):
        roles.setdefault(column, []).append((side, LOGPROBS))
    return roles


def _check_columns(name: str, known: Set[str], columns: tuple[str, ...]) -> None:
    """What was asked for by name must be there; without log-probabilities, values or rewards can be compared."""
    here = columns[0]
    asked = set(columns) - ({LOGPROBS} if len(columns) == 1 else set())
    if missing := sorted(asked - known):
        expected = "a column of log-probabilities, in some record"
        raise FieldError(name, missing[0], expected=expected, got=f"the columns {_listed(_columns(name))}")
    there = () if here in known else _columns(name)
    others = [column for column in there if column.startswith(f"{LOGPROBS}_")]
    if others:
        expected = f"the column, or the name of another by --ours and --theirs, such as {others[0]}"
        raise FieldError(name, here, expected=expected, got=f"the columns {_listed(there)}")
    if not known & {here, *OTHERS}:
        expected = f"one of {', '.join((here, *OTHERS))}"
        raise FieldError(name, "columns", expected=expected, got=f"the columns {_listed(_columns(name))}")


def _columns(name: str) -> Sequence[str]:
    """The columns of the first record that can be read."""
    reader = open_reader(name)
    try:
        for row in reader:
            try:
                return list(row.columns())
            except FieldError:
                continue
    finally:
        reader.close()
    return ()


def _records(
    name: str, row: Row, fields: Mapping[str, Any], roles: Mapping[str, Sequence[tuple[int, str]]], count: int
) -> list[Record]:
    """The record once for each side."""
    id = fields.get("id")
    id = id if isinstance(id, str | int | float) else None
    where = f"{name}: {row.where}"
    sides: list[dict[str, NDArray[Any]]] = [{} for _ in range(count)]
    try:
        for column, value in fields.items():
            for side, of in roles.get(column, ()) if value is not None else ():
                sides[side][of] = _array(of, value, column)
    except FieldError as error:
        raise error.of(named(where, id)) from None
    prompt = fields.get(_PROMPT)
    length = None if prompt is None or not hasattr(prompt, "__len__") else len(prompt)
    return [Record(where, id, side, length, row.count) for side in sides]


def _array(name: str, value: Any, column: str) -> NDArray[Any]:
    """The numbers of a field: floats or ints, or bool for a mask and int64 for token ids."""
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind == "f" and name not in _OF_ROLLOUTS:
        return value
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):
        raise FieldError(None, column, expected="numbers, in lists of one length", got=shown(value)) from None
    if name == MASK:
        if array.ndim != 1 or not (array.dtype.kind == "b" or not array.size or _is_of_zeros_and_ones(array)):
            raise FieldError(None, column, expected="true and false, or 1 and 0, for each token", got=shown(value))
        return array.astype(np.bool_)
    if array.dtype == object and name not in _IDS:
        array = _with_nan(array)
    least = 0 if name == "reward" else 1
    kinds = "ui" if name in _IDS else "uif"
    if (array.dtype.kind not in kinds and array.size) or not least <= array.ndim <= least + (name in OTHERS):
        raise FieldError(None, column, expected=_EXPECTED.get(name, "a number for each token"), got=shown(value))
    return array.astype(np.int64 if name in _IDS else np.float64, copy=False)


def _with_nan(array: NDArray[Any]) -> NDArray[Any]:
    """Numbers with NaN where there is null, as JSON has it; the same array where it holds anything else."""
    if all(item is None or type(item) in (int, float) for item in array.flat):
        return array.astype(np.float64)
    return array


def _is_of_zeros_and_ones(array: NDArray[Any]) -> bool:
    return array.dtype.kind in "uif" and bool(((array == 0) | (array == 1)).all())


def _listed(names: Iterable[str]) -> str:
    first = sorted(names)
    listed = ", ".join(name[:40] for name in first[:_COLUMNS_SHOWN])
    return listed if len(first) <= _COLUMNS_SHOWN else f"{listed} and {len(first) - _COLUMNS_SHOWN:,} more"
