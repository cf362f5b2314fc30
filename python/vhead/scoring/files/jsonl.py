"""Scores behind the records that they belong to, in JSON Lines."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from vhead.errors import RecordError
from vhead.rollouts.fields import MASK
from vhead.rollouts.files.rows import Row
from vhead.scoring.files.pairs import MARGIN, PairScores, sides_of
from vhead.scoring.files.part import Sink
from vhead.scoring.scores import TRUNCATED, Score, Scores


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

    def append(self, objects: Sequence[str], scores: Scores | PairScores) -> None:
        """Appends one line per record and hands them to the operating system."""
        parts = [self._side(objects, side, f"{suffix}{self._suffix}") for suffix, side in sides_of(scores).items()]
        if isinstance(scores, PairScores) and scores.margin is not None:
            name = json.dumps(f"{MARGIN}{self._suffix}")
            parts.append([f"{name}: {_json(margin)}" for margin in scores.margin])
        lines = [
            f"{record[:-1].rstrip()}, {', '.join(members)}}}\n"
            for record, *members in zip(objects, *parts, strict=True)
        ]
        self._stream.write("".join(lines).encode())
        self._stream.flush()

    def _side(self, objects: Sequence[str], scores: Scores, suffix: str) -> list[str]:
        """The members that each record gets for its rollout, or for one of the two of a pair."""
        columns = {name: f"{name}{suffix}" for name in scores.columns}
        return [
            f"{_members(score, columns)}{_mask(record, score, f'{MASK}{suffix}')}"
            for record, score in zip(objects, scores, strict=True)
        ]


def _mask(record: str, score: Score, column: str) -> str:
    """Which tokens are the model's, where it did not write all and the record does not say so itself."""
    if score.mask.all():
        return ""
    name = json.dumps(column)
    if name in record and column in json.loads(record):
        return ""
    return f", {name}: {json.dumps(score.mask.tolist())}"


def _members(score: Score, names: dict[str, str]) -> str:
    """The scores as members of a JSON object."""
    return ", ".join(f"{json.dumps(column)}: {_json(_value(score, name))}" for name, column in names.items())


def _value(score: Score, name: str) -> Any:
    return score.truncated if name == TRUNCATED else score.computed[name]


def _json(value: Any) -> str:
    """A number, or an array of one or two dimensions; floats with nine digits, which one format for all makes fast."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value.dtype != np.float32:
        return json.dumps(value.tolist())
    if value.ndim == 0:
        return f"{value:.9g}"
    if value.ndim == 2:
        return f"[{', '.join(map(_json, value))}]"
    return f"[{('%.9g, ' * len(value) % tuple(value.tolist()))[:-2]}]"
