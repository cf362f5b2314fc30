"""Records under attack: broken ones among good ones harm nobody, in JSON Lines and in Parquet, and take no memory."""

import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.attack.scale import scaled
from vhead import Rollout, Scorer
from vhead.demo import demo_model_path
from vhead.errors import RecordError, VheadError
from vhead.rollouts.files.jsonl import JsonlReader
from vhead.rollouts.files.opening import open_reader
from vhead.scoring.files.opening import open_output
from vhead.scoring.files.output import Output
from vhead.scoring.files.pipeline import score_file
from vhead.scoring.progress import ScoringProgress

TOLERANCE = 1e-4
GOOD = [
    {"id": "a", "prompt": "The statement ", "completion": "is executed.", "x": 1, "meta": {"k": [1, None]}},
    {"id": 7, "prompt": "An expression ", "completion": "is evaluated ä.", "x": 0.5, "meta": {"k": [], "l": "m"}},
    {"id": None, "prompt_ids": [72, 105], "completion_ids": [33, 34, 35], "x": None},
    {"prompt": "A function ", "completion": "returns.", "x": 2, "meta": None},
]
# What mutation alone finds too seldom.
SPLICES = [
    *(rb'"\ud800"', b"\xff\xfe", b"1e400", b"-0", b"NaN", b"{}", b"null", b"true", b"\r", b"\x00"),
    *(b"[" * 60, b"[" * 990 + b"]" * 990, b'{"a":' * 500, b"9" * 5000, b"9223372036854775808", b"-9223372036854775809"),
    *(b'"values": 1, ', b'"prompt": "", ', b'"id": [[1]], ', b'"meta": {"k": "text"}, ', b'"x": "text", '),
    b'"messages": [{"role": "user", "content": "\\udfff"}], ',
]


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    # In single precision, as a half one's last bits depend on the batch.
    return Scorer.from_pretrained(demo_model_path(), dtype="float32", device="cpu", token_budget=256, chunk_tokens=512)


def scored(scorer: Scorer, source: Path, target: Path) -> tuple[list[RecordError], Exception | None]:
    """`vhead score --on-error skip`: the errors of the records left out, and of the file where that ended it."""
    errors: list[RecordError] = []
    try:
        with closing(open_reader(str(source), ("values", "reward"))) as reader, open_output(str(target)) as output:
            output.begin({}, reader.schema)
            score_file(
                scorer,
                reader,
                output,
                returns=("values", "reward"),
                temperature=1.0,
                progress=ScoringProgress(shown=False),
                on_error=errors.append,
            )
    except (VheadError, OSError) as error:
        return errors, error
    return errors, None


def rollout_of(record: dict[str, object]) -> Rollout:
    if record.get("prompt_ids") is not None and record.get("completion_ids") is not None:
        return Rollout(record["prompt_ids"], record["completion_ids"])
    if record.get("prompt") is not None and record.get("completion") is not None:
        return Rollout(record["prompt"], record["completion"])
    return Rollout.from_messages(record["messages"])


def check_numbers(scorer: Scorer, records: Iterable[dict[str, object]]) -> None:
    """Every record's numbers are those of its own prompt and completion alone."""
    records = list(records)
    expected = scorer.score([rollout_of(record) for record in records], ("values", "reward")) if records else ()
    for record, score in zip(records, expected, strict=True):
        np.testing.assert_allclose(record["reward"], score.reward, atol=TOLERANCE)
        np.testing.assert_allclose(record["values"], score.values, atol=TOLERANCE)


def content(path: Path) -> list[dict[str, object]]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def mutated(data: bytes, generator: random.Random) -> bytes:
    """The bytes with some of them changed, gone, doubled, or with something else among them."""
    changed = bytearray(data)
    for _ in range(generator.choice([1, 1, 2, 5])):
        at = generator.randrange(len(changed))
        how = generator.randrange(4)
        if how == 0:
            changed[at] = generator.randrange(256)
        elif how == 1:
            del changed[at : at + generator.randrange(1, 9)]
        elif how == 2:
            changed[at:at] = changed[at : at + generator.randrange(1, 30)]
        else:
            changed[at:at] = generator.choice(SPLICES)
        changed = changed or bytearray(b" ")
    return bytes(changed)


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_mutated_lines_harm_no_good_record(tmp_path, scorer, name):
    generator = random.Random(name)
    per_file = 40
    for attempt in range(scaled(3, 20_000 // per_file)):
        lines: list[bytes] = []
        for place in range(per_file):
            good = json.dumps(GOOD[place % len(GOOD)] | {"mark": place}).encode()
            lines += [good, mutated(good.replace(b'"mark"', b'"bad"'), generator).replace(b"\n", b" ")]
        source, target = tmp_path / f"in{attempt}.jsonl", tmp_path / f"{attempt}_{name}"
        source.write_bytes(b"\n".join(lines) + b"\n")
        errors, failure = scored(scorer, source, target)
        assert failure is None
        records = content(target)
        marks = [record["mark"] for record in records if record.get("mark") is not None]
        named = {error.record.split(" (")[0] for error in errors}
        # A mutant may be the first to say what a column holds; a good record that does not fit is then named.
        lost = [place for place in range(per_file) if place not in marks]
        assert all(f"line {2 * place + 1}" in named for place in lost), lost
        assert name != "out.jsonl" or not lost
        check_numbers(scorer, records)


def parquet_bytes(generator: random.Random) -> bytes:
    columns = {
        "id": ["a", "b", None, "d"],
        "prompt": ["The statement ", "An expression ", "A function ", "The file "],
        "completion": ["is executed.", "is evaluated.", "returns.", "is closed."],
        "when": pa.array([1, None, 3, 2**40], pa.timestamp("us")),
        "nested": [{"a": [1]}, None, {"a": []}, {"a": [2, 3]}],
        "tag": pa.array(["x", "y", "x", "x"]).dictionary_encode(),
    }
    stream = io.BytesIO()
    pq.write_table(
        pa.table(columns),
        stream,
        compression=generator.choice(["none", "snappy"]),
        row_group_size=generator.choice([1, 2, 4]),
        use_dictionary=generator.random() < 0.5,
    )
    return stream.getvalue()


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_mutated_parquet_files_give_right_numbers_or_an_error_that_names_them(tmp_path, scorer, name):
    generator = random.Random(name)
    ends = set()
    for attempt in range(scaled(40, 6_000)):
        source, target = tmp_path / f"in{attempt}.parquet", tmp_path / f"{attempt}_{name}"
        data = bytearray(parquet_bytes(generator))
        for _ in range(generator.choice([1, 1, 3])):
            data[generator.randrange(len(data))] = generator.randrange(256)
        source.write_bytes(data)
        _, failure = scored(scorer, source, target)
        ends.add(type(failure).__name__)
        if failure is None and name == "out.jsonl":
            check_numbers(scorer, content(target))
        for path in tmp_path.iterdir():
            path.unlink()
    assert {"NoneType", "FileFormatError"} <= ends


def test_wrong_numbers_can_be_noticed(tmp_path, scorer):
    """Control."""
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in GOOD))
    assert scored(scorer, tmp_path / "in.jsonl", tmp_path / "out.jsonl") == ([], None)
    records = content(tmp_path / "out.jsonl")
    check_numbers(scorer, records)
    records[0]["reward"], records[1]["reward"] = records[1]["reward"], records[0]["reward"]
    with pytest.raises(AssertionError):
        check_numbers(scorer, records)


MEASURED = """
from tests.attack import test_records as attack

scorer = attack.Scorer.from_pretrained(attack.demo_model_path(), device="cpu")
attack.growth(scorer, 1000)
print(attack.growth(scorer, {count}), attack.growth(scorer, {control}, kept=True))
"""


class BrokenLines(io.RawIOBase):
    """Two good lines with broken ones between them, without a file."""

    def __init__(self, count: int) -> None:
        super().__init__()
        good = json.dumps(GOOD[0]).encode() + b"\n"
        self._good, self._count, self._at = good, count, 0

    def readline(self, limit: int = -1) -> bytes:
        self._at += 1
        if self._at in (1, self._count + 2):
            return self._good
        return b'{"prompt": "%d", broken\n' % self._at if self._at < self._count + 2 else b""


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(scorer: Scorer, count: int, *, kept: bool = False) -> int:
    """Scores through broken lines, all of which must be told, and says how many bytes that takes at most."""
    errors: list[object] = []
    before = most = resident()

    def on_error(error: RecordError) -> None:
        nonlocal most
        errors.append(error if kept else None)
        if len(errors) % 1000 == 0:
            most = max(most, resident())

    with Path("/dev/null").open("wb") as nowhere, Output(nowhere) as output:
        output.begin({})
        progress = ScoringProgress(shown=False)
        reader = JsonlReader(BrokenLines(count))
        score_file(scorer, reader, output, returns=("reward",), temperature=1.0, progress=progress, on_error=on_error)
    assert len(errors) == count
    return most - before


def test_broken_lines_take_no_memory():
    """And errors that were kept, the control, would be noticed."""
    code = MEASURED.format(count=scaled(30_000, 1_000_000), control=100_000)
    root = Path(__file__).parent.parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told, kept = map(int, done.stdout.split())
    assert told < 2**26 < kept


def test_a_small_file_of_large_rows_takes_little_memory(tmp_path, scorer):
    rows = scaled(256, 1024)
    ids = pa.array([[7] * 100_000] * rows, pa.list_(pa.int64()))
    pq.write_table(pa.table({"prompt_ids": ids, "completion_ids": [[1]] * rows}), tmp_path / "in.parquet")
    del ids
    pa.default_memory_pool().release_unused()
    before = pa.total_allocated_bytes()
    errors, failure = scored(scorer, tmp_path / "in.parquet", tmp_path / "out.jsonl")
    assert (len(errors), failure) == (rows, None)
    assert pa.total_allocated_bytes() - before < 2**26
