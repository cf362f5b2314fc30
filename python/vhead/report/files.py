"""Files of scores, read for a comparison: only the columns that it needs, a record at a time."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vhead.errors import FieldError, FileFormatError
from vhead.report.comparison import WORST, Comparison, of_records
from vhead.report.context import in_context
from vhead.report.records import ENTROPY, LOGPROBS, MASK, OTHERS, TOKEN_IDS, Problems, Record, matched
from vhead.rollouts.files import open_reader
from vhead.rollouts.rollout import Id, named, shown
from vhead.rollouts.rows import Row

OLD_LOGPROBS = "old_logprobs"
_PROMPT = "prompt_ids"


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
    wanted = ("id", here, *([there] if there else []), ENTROPY, MASK, TOKEN_IDS, *OTHERS, _PROMPT)
    found: list[tuple[Record, Record]] = []
    count, known = 0, set[str]()
    reader = open_reader(name)
    try:
        for row in reader:
            count += 1
            try:
                fields = row.fields(wanted)
                known |= fields.keys()
                found.append(_sides(name, row, fields, here, there))
            except FieldError as error:
                problems.add(error)
        if not count:
            raise FileFormatError(f"{name}: expected records with scores, and the file has none")
        _check_columns(name, known, here, there, _names(name) if known else set())
    finally:
        reader.close()
    return found
