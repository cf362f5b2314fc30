"""Records, scores of them, and outputs that they are written to."""

import io
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from vhead import Scores
from vhead.errors import RecordError
from vhead.rollouts.files.jsonl import JsonlReader
from vhead.rollouts.files.rows import Row
from vhead.scoring.files.opening import open_output
from vhead.scoring.files.output import Output
from vhead.scoring.scores import offsets_of

GOOD = '{"prompt": "a", "completion": "b"}'


class Stopped(BaseException):
    """What ends a run before it is done."""


def scores_of(*lengths: int, seed: int = 0) -> Scores:
    """Random values and rewards of rollouts with so many completion tokens."""
    rng = np.random.default_rng(seed)
    count = len(lengths)
    return Scores(
        ids=(None,) * count,
        indices=np.arange(count),
        prompt_lengths=np.ones(count, np.int64),
        offsets=offsets_of(np.array(lengths, np.int64)),
        computed={
            "values": rng.normal(size=sum(lengths)).astype(np.float32),
            "reward": rng.normal(size=count).astype(np.float32),
        },
    )


def read(text: str | bytes, **options: object) -> list[Row]:
    """The rows of JSON Lines."""
    return list(JsonlReader(io.BytesIO(text if isinstance(text, bytes) else text.encode()), **options))


def lines_of(*fields: dict[str, object]) -> list[Row]:
    """The rows of JSON Lines, each with a rollout and some fields more."""
    return read("".join(f"{json.dumps({'prompt': 'a', 'completion': 'b'} | more)}\n" for more in fields))


def begun(
    path: Path, settings: dict[str, object] | None = None, schema: object = None, **options: bool | str
) -> Output:
    """An output that rows can be written to."""
    output = open_output(str(path), **options)
    output.begin(settings or {}, schema)
    return output


def write_in_chunks(output: Output, rows: Sequence[Row], size: int = 1, *, skips: bool = False) -> list[RecordError]:
    """Writes rows, some at a time, and gives the errors of those that could not be written."""
    errors: list[RecordError] = []
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        scores = scores_of(*[2 + row.count % 3 for row in chunk], seed=start)
        output.write(chunk, scores, chunk[-1], errors.append if skips else None)
    return errors


def put(path: Path, rows: Sequence[Row], size: int = 1, *, skips: bool = False, schema: object = None, **options):
    """Writes a whole output; gives the errors of rows that were left out."""
    with begun(path, schema=schema, **options) as output:
        errors = write_in_chunks(output, rows, size, skips=skips)
        output.publish(rows[-1] if rows else None, scores_of())
    return errors


def stop_after(path: Path, rows: Sequence[Row], size: int = 1, **options) -> None:
    """Writes a part of an output."""
    with suppress(Stopped), begun(path, **options) as output:
        write_in_chunks(output, rows, size)
        raise Stopped


def content(path: Path) -> list[dict[str, object]]:
    """The records of a finished output."""
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text().splitlines()]
