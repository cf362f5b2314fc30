"""Scores behind the records that they belong to, in JSON Lines."""

import json
from collections.abc import Sequence
from typing import Any

from vhead.errors import RecordError
from vhead.rollouts.rows import Row
from vhead.scoring.part import Sink
from vhead.scoring.scores import PER_TOKEN, TOKEN_COLUMNS, Score, Scores


class JsonlWriter:
    """Writes each record as it came with the scores behind it, one line per record.

    Floats are written with nine significant digits, which is enough to read the same float32 back.

    Args:
        stream: What is appended to.
        suffix: Added to the names of the scores' columns.
    """

    def __init__(self, stream: Sink, suffix: str = "") -> None:
        self._stream = stream
        self._suffix = suffix

    def held(self, rows: Sequence[Row], *, skips: bool) -> tuple[list[str], dict[int, RecordError]]:
        """The rows as JSON, and by its place in `rows` what is wrong with each that JSON cannot hold.

        Args:
            rows: The records.
            skips: Whether to continue after the first record that it cannot hold.
        """
        objects: list[str] = []
        errors: dict[int, RecordError] = {}
        for place, row in enumerate(rows):
            try:
                objects.append(row.json_object())
            except RecordError as error:
                errors[place] = error
                if not skips:
                    break
        return objects, errors

    def append(self, objects: Sequence[str], scores: Scores) -> None:
        """Appends one line per record and hands them to the operating system."""
        columns = {name: f"{name}{self._suffix}" for name in scores.columns}
        lines = [
            f"{record[:-1].rstrip()}, {_members(score, columns)}}}\n"
            for record, score in zip(objects, scores, strict=True)
        ]
        self._stream.write("".join(lines).encode())
        self._stream.flush()


def _members(score: Score, names: dict[str, str]) -> str:
    """The scores as members of a JSON object."""
    return ", ".join(
        f"{json.dumps(column)}: {_number_or_list(getattr(score, name), name)}" for name, column in names.items()
    )


def _number_or_list(value: Any, name: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if name in TOKEN_COLUMNS:
        return json.dumps(value.tolist())
    if name not in PER_TOKEN:
        return f"{value:.9g}"
    return f"[{('%.9g, ' * len(value) % tuple(value.tolist()))[:-2]}]"
