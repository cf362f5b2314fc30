import datetime
import io
import json
import os
import sys
from contextlib import closing, suppress
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vhead import Scores
from vhead.errors import FieldError, FileFormatError, MissingExtraError, ResumeError
from vhead.scoring.files import OutputFile, open_reader
from vhead.scoring.jsonl import JsonlReader, JsonlWriter
from vhead.scoring.parquet import ParquetRow
from vhead.scoring.scores import offsets_of

GOOD = '{"prompt": "a", "completion": "b"}'


def scores_of(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    count = len(lengths)
    return Scores(
        ids=(None,) * count,
        indices=np.arange(count),
        prompt_lengths=np.ones(count, np.int64),
        offsets=offsets_of(np.array(lengths, np.int64)),
        values=rng.normal(size=sum(lengths)).astype(np.float32),
        reward=rng.normal(size=count).astype(np.float32),
    )


def read(text, **options):
    return list(JsonlReader(io.BytesIO(text if isinstance(text, bytes) else text.encode()), **options))


def write(lines, scores):
    stream = io.BytesIO()
    JsonlWriter(stream).write(read("\n".join(lines)), scores)
    return stream.getvalue().decode().splitlines()


class TestFields:
    @pytest.mark.parametrize(
        ("record", "kind"),
        [
            ({"prompt": "a", "completion": "b", "extra": 1}, "text"),
            ({"prompt_ids": [1, 2], "completion_ids": [3]}, "token ids"),
            ({"prompt": "a", "completion": "b", "prompt_ids": [1, 2], "completion_ids": [3]}, "token ids"),
            ({"prompt": "a", "completion": "b", "prompt_ids": None, "messages": None}, "text"),
            ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "messages"),
        ],
    )
    def test_what_makes_a_rollout(self, record, kind):
        (row,) = read(json.dumps(record))
        assert row.rollout().kind == kind

    @pytest.mark.parametrize(
        ("record", "message"),
        [
            ({"text": "a", "y": 1}, "line 1: prompt: expected `prompt` and `completion`, or .* got the fields text, y"),
            ({}, "line 1: prompt: expected .*got the fields none"),
            ({"prompt": "a"}, "line 1: completion: expected the field that goes with `prompt`, got nothing"),
            ({"completion": "a", "prompt": None}, "line 1: prompt: expected the field that goes with `completion`"),
            ({"id": "x", "completion_ids": [1]}, r"line 1 \(id 'x'\): prompt_ids: expected the field that goes with"),
            (
                {"prompt": "a", "completion_ids": [1]},
                "line 1: prompt_ids: expected the field that goes with `completion_ids`",
            ),
            (
                {"prompt": [1], "completion": [2]},
                r"prompt: expected text \(token ids go in `prompt_ids`\), got \[1\] \(list\)",
            ),
            ({"prompt": "", "completion": "b"}, "prompt: expected text, got an empty text"),
            ({"prompt_ids": [1], "completion_ids": []}, "completion_ids: expected at least one token, got none"),
            (
                {"prompt_ids": [1, -1], "completion_ids": [2]},
                "prompt_ids: expected token ids >= 0, got -1 at position 1",
            ),
            ({"prompt_ids": [1, 2.5], "completion_ids": [2]}, "prompt_ids: expected text or a flat list of integer"),
            ({"messages": [{"role": "user", "content": "a"}]}, "messages: expected a list of two messages or more"),
            ({"id": [1], "prompt": "a", "completion": "b"}, "id: expected text, an integer or None"),
        ],
    )
    def test_what_does_not(self, record, message):
        (row,) = read(json.dumps(record))
        with pytest.raises(FieldError, match=message):
            row.rollout()


class TestJsonl:
    def test_a_broken_line_harms_no_other(self):
        rows = read(f"{GOOD}\n{{broken\n\n  \n[1]\n{GOOD}\n")
        assert [row.where for row in rows] == ["line 1", "line 2", "line 5", "line 6"]
        assert rows[0].rollout().completion == rows[3].rollout().completion == "b"
        with pytest.raises(FieldError, match=r"^line 2: text: expected a JSON object, got broken JSON at column 2"):
            rows[1].rollout()
        with pytest.raises(FieldError, match=r"^line 5: text: expected a JSON object, got \[1\] \(list\)"):
            rows[2].rollout()

    def test_a_line_that_stops_short_is_faulted_at_its_end(self):
        (row,) = read('{"prompt": "a"\n')
        with pytest.raises(FieldError, match=r"broken JSON at column 15 "):
            row.rollout()

    def test_a_half_written_last_line(self):
        rows = read(f'{GOOD}\n{{"prompt": "a", "comp')
        with pytest.raises(FieldError, match=r"line 2: .* got half of one: the file ends in the middle of the line"):
            rows[1].rollout()

    def test_a_whole_last_line_needs_no_line_break(self):
        assert read(f"{GOOD}\n{GOOD}")[1].rollout().prompt == "a"

    def test_bytes_that_are_no_utf8(self):
        with pytest.raises(FieldError, match="line 1: text: expected UTF-8, got invalid start byte at byte 12"):
            read(b'{"prompt": "\xff"}\n')[0].rollout()

    def test_a_byte_order_mark_and_carriage_returns(self):
        rows = read(b"\xef\xbb\xbf" + f"{GOOD}\r\n{GOOD}\r\n".encode())
        assert [row.rollout().prompt for row in rows] == ["a", "a"]
        assert rows[1].json_object() == GOOD

    def test_deep_nesting(self):
        with pytest.raises(FieldError, match="line 1: text: expected a JSON object"):
            read("[" * 100_000)[0].rollout()

    def test_positions_are_bytes(self):
        text = f"{GOOD}\n\n{GOOD}\n"
        assert [row.position for row in read(text)] == [len(GOOD) + 1, len(text)]

    def test_no_column_is_overwritten(self):
        (row,) = read('{"prompt": "a", "completion": "b", "reward": 1}', reserved=("values", "reward"))
        with pytest.raises(FieldError, match="line 1: reward: expected no such column in the input"):
            row.rollout()

    def test_records_are_carried_through_to_the_byte(self):
        line = '{ "z": 1e400, "prompt":"\\u00e4",  "n": 12345678901234567890, "x": {"y": [null]} }'
        (out,) = write([line], scores_of(2))
        assert out.startswith(
            '{ "z": 1e400, "prompt":"\\u00e4",  "n": 12345678901234567890, "x": {"y": [null]}, "values": ['
        )
        assert set(json.loads(out)) == {"z", "prompt", "n", "x", "values", "reward"}

    @given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
    @example(np.random.default_rng(0).uniform(1000, 1024, 500).astype(np.float32).tolist())
    def test_float32_survives(self, numbers):
        values = np.array(numbers, np.float32)
        scores = Scores(
            ids=(None,),
            indices=np.zeros(1, np.int64),
            prompt_lengths=np.ones(1, np.int64),
            offsets=np.array([0, len(values)]),
            values=values,
            reward=values[:1],
        )
        record = json.loads(write([GOOD], scores)[0])
        np.testing.assert_array_equal(np.array(record["values"], np.float32), values)
        assert np.float32(record["reward"]) == values[0]


class TestParquet:
    @pytest.fixture
    def table(self):
        return pa.table(
            {
                "id": ["a", "b", "c"],
                "prompt_ids": pa.array([[1, 2], [3], [4, 5, 6]], pa.list_(pa.int32())),
                "completion_ids": pa.array([[7], [8, 9], [1]], pa.large_list(pa.uint16())),
                "when": pa.array([1, None, 3], pa.timestamp("us")),
                "tag": pa.array(["x", "y", "x"]).dictionary_encode(),
                "nested": [{"a": [1]}, None, {"a": []}],
            }
        )

    @pytest.fixture
    def file(self, table, tmp_path):
        pq.write_table(table, tmp_path / "in.parquet")
        return tmp_path / "in.parquet"

    def test_rows_are_rollouts(self, file):
        reader = open_reader(str(file))
        rows = list(reader)
        assert reader.size == 3
        assert [row.position for row in rows] == [1, 2, 3]
        rollouts = [row.rollout() for row in rows]
        assert [(r.id, r.prompt.tolist(), r.completion.tolist()) for r in rollouts] == [
            ("a", [1, 2], [7]),
            ("b", [3], [8, 9]),
            ("c", [4, 5, 6], [1]),
        ]

    def test_a_row_group_is_not_read_as_a_whole(self, tmp_path):
        rng = np.random.default_rng(0)
        texts = [rng.bytes(1000).hex() for _ in range(8000)]
        pq.write_table(pa.table({"prompt": texts, "completion": ["x"] * 8000}), tmp_path / "in.parquet")
        before, most = pa.total_allocated_bytes(), 0
        for row in open_reader(str(tmp_path / "in.parquet")):
            most = max(most, pa.total_allocated_bytes() - before) if row.position % 100 == 0 else most
        assert most < sum(map(len, texts)) / 2

    def test_columns_and_types_survive(self, file, table, tmp_path):
        rows, scores = list(open_reader(str(file))), scores_of(1, 2, 1)
        with OutputFile(str(tmp_path / "out.parquet")) as output:
            output.write(rows[:2], scores[:2])
            output.write(rows[2:], scores[2:])
        result = pq.read_table(tmp_path / "out.parquet")
        assert result.select(table.column_names).equals(pq.read_table(file))
        assert result.column_names == [*table.column_names, "values", "reward"]
        assert result.schema.field("values").type == pa.list_(pa.float32())
        flat = result.column("values").combine_chunks().values.to_numpy()
        np.testing.assert_array_equal(flat, scores.values)
        np.testing.assert_array_equal(result.column("reward").to_numpy(), scores.reward)

    def test_rows_that_were_left_out_are_not_written(self, file, tmp_path):
        rows = list(open_reader(str(file)))
        with OutputFile(str(tmp_path / "out.parquet")) as output:
            output.write([rows[0], rows[2]], scores_of(1, 1))
        assert pq.read_table(tmp_path / "out.parquet").column("id").to_pylist() == ["a", "c"]

    def test_to_jsonl(self, file, tmp_path):
        with OutputFile(str(tmp_path / "out.jsonl")) as output:
            output.write(list(open_reader(str(file))), scores_of(1, 2, 1))
        records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert records[0]["when"] == "1970-01-01T00:00:00.000001"
        assert records[1]["when"] is None
        assert records[2]["nested"] == {"a": []}
        assert [len(record["values"]) for record in records] == [1, 2, 1]

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            (Decimal("1.50"), "1.50"),
            (datetime.date(2026, 1, 2), "2026-01-02"),
            (float("nan"), None),
            ([1.0, float("inf")], [1.0, None]),
            ("ä", "ä"),
        ],
    )
    def test_what_json_can_hold(self, value, expected):
        batch = pa.record_batch({"x": pa.array([value])})
        assert json.loads(ParquetRow(batch, 0, 1).json_object()) == {"x": expected}

    def test_what_json_cannot_hold(self):
        batch = pa.record_batch({"y": [1], "x": pa.array([b"\x00"])})
        with pytest.raises(FieldError, match="row 1: x: expected a value that JSON can hold, got bytes"):
            ParquetRow(batch, 0, 1).json_object()

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"prompt": ["a", None], "completion": ["b", "c"]}, "row 2: prompt: expected the field that goes with"),
            ({"prompt": ["a", "a"], "completion": ["b", ""]}, "row 2: completion: expected text, got an empty text"),
            ({"prompt_ids": [[1], [None]], "completion_ids": [[1], [2]]}, "row 2: prompt_ids: expected text or a flat"),
            (
                {"prompt_ids": [[1.0], [1.5]], "completion_ids": [[1], [2]]},
                "row 1: prompt_ids: expected text or a flat",
            ),
        ],
    )
    def test_bad_rows_are_named(self, tmp_path, columns, message):
        pq.write_table(pa.table(columns), tmp_path / "in.parquet")
        with pytest.raises(FieldError, match=message):
            [row.rollout() for row in open_reader(str(tmp_path / "in.parquet"))]

    def test_messages(self, tmp_path):
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        pq.write_table(pa.table({"messages": [chat]}), tmp_path / "in.parquet")
        (row,) = open_reader(str(tmp_path / "in.parquet"))
        assert row.rollout().completion == (chat[1],)

    def test_no_column_is_overwritten(self, file):
        with pytest.raises(FieldError, match=r"^tag: expected no such column in the input"):
            open_reader(str(file), ("values", "tag"))

    @pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all, but long enough to hold a footer"])
    def test_a_file_that_is_no_parquet(self, tmp_path, content):
        (tmp_path / "in.parquet").write_bytes(content)
        with pytest.raises(FileFormatError, match="not a readable Parquet file"):
            open_reader(str(tmp_path / "in.parquet"))

    def test_a_file_that_is_broken_inside(self, file):
        content = bytearray(file.read_bytes())
        content[4:60] = bytes(range(200, 256))
        file.write_bytes(content)
        with pytest.raises(FileFormatError, match="broken after row 0"):
            list(open_reader(str(file)))

    def test_from_jsonl(self, tmp_path):
        lines = [
            '{"prompt": "a", "completion": "b", "n": 1, "null": null}',
            '{"completion": "b", "prompt": "a", "m": "x"}',
        ]
        with OutputFile(str(tmp_path / "out.parquet")) as output:
            output.write(read("\n".join(lines)), scores_of(1, 3))
            output.write(read('{"prompt": "c", "completion": "d", "null": "text"}'), scores_of(2))
        assert pq.read_table(tmp_path / "out.parquet").drop(["values", "reward"]).to_pylist() == [
            {"prompt": "a", "completion": "b", "n": 1, "null": None, "m": None},
            {"prompt": "a", "completion": "b", "n": None, "null": None, "m": "x"},
            {"prompt": "c", "completion": "d", "n": None, "null": "text", "m": None},
        ]

    @pytest.mark.parametrize(
        ("later", "message"),
        [
            ('{"prompt": "c", "completion": "d", "new": 1}', "line 1: new: expected a column of the first records"),
            (
                '{"prompt": "c", "completion": "d", "n": "x"}',
                r"line 1: n: expected int64, as in the first records, got 'x'",
            ),
        ],
    )
    def test_columns_stay_those_of_the_first_records(self, tmp_path, later, message):
        with OutputFile(str(tmp_path / "out.parquet")) as output:
            output.write(read('{"prompt": "a", "completion": "b", "n": 1}'), scores_of(1))
            with pytest.raises(FieldError, match=message):
                output.write(read(later), scores_of(1))
        assert pq.read_table(tmp_path / "out.parquet").num_rows == 1

    def test_columns_of_two_types_at_once(self, tmp_path):
        rows = read('{"prompt": "a", "completion": "b", "n": 1}\n{"prompt": "a", "completion": "b", "n": "x"}')
        problem = pytest.raises(FieldError, match="n: expected one type in all records")
        with OutputFile(str(tmp_path / "out.parquet")) as output, problem:
            output.write(rows, scores_of(1, 1))

    def test_without_pyarrow(self, monkeypatch, tmp_path):
        monkeypatch.delitem(sys.modules, "vhead.scoring.parquet")
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(MissingExtraError, match=r"pip install 'vhead\[data\]'"):
            OutputFile(str(tmp_path / "out.parquet"))


class TestOutputFile:
    def test_the_name_appears_when_the_file_is_complete(self, tmp_path):
        path = tmp_path / "out.jsonl"
        path.write_text("old\n")
        with OutputFile(str(path)) as output:
            output.write(read(GOOD), scores_of(2))
            assert path.read_text() == "old\n"
            assert output.partial.read_text().count("\n") == 1
        assert json.loads(path.read_text())["completion"] == "b"
        assert os.listdir(tmp_path) == ["out.jsonl"]

    @pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
    def test_a_part_is_kept_and_readable(self, tmp_path, suffix):
        with suppress(KeyboardInterrupt), OutputFile(str(tmp_path / f"out.{suffix}")) as output:
            output.write(read(GOOD), scores_of(2))
            raise KeyboardInterrupt
        assert os.listdir(tmp_path) == [f"out.{suffix}.partial"]
        partial = tmp_path / f"out.{suffix}.partial"
        if suffix == "jsonl":
            assert json.loads(partial.read_text())["completion"] == "b"
        else:
            assert pa.ipc.open_stream(partial.read_bytes()).read_all()["completion"].to_pylist() == ["b"]

    @pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
    def test_an_output_is_gone_on_with(self, tmp_path, suffix):
        path = tmp_path / f"out.{suffix}"
        with suppress(KeyboardInterrupt), OutputFile(str(path), settings={"model": "m"}) as output:
            output.write(read(GOOD), scores_of(2), records=3)
            raise KeyboardInterrupt
        with output.partial.open("ab") as partial:
            partial.write(b"what a killed process wrote after its last note")
        with OutputFile(str(path), settings={"model": "m"}, resume=True) as output:
            assert output.done.records == 3
            output.write(read(GOOD), scores_of(1), records=4)
        assert os.listdir(tmp_path) == [path.name]
        with closing(open_reader(str(path))) as reader:
            assert [len(row.columns()["values"]) for row in reader] == [2, 1]

    def test_columns_of_a_resumed_file_stay_those_of_its_first_records(self, tmp_path):
        path = tmp_path / "out.parquet"
        with suppress(KeyboardInterrupt), OutputFile(str(path), settings={}) as output:
            output.write(read('{"prompt": "a", "completion": "b", "n": 1}'), scores_of(1), records=1)
            raise KeyboardInterrupt
        with (
            OutputFile(str(path), settings={}, resume=True) as output,
            pytest.raises(FieldError, match="n: expected int64"),
        ):
            output.write(read('{"prompt": "c", "completion": "d", "n": "x"}'), scores_of(1), records=2)

    def test_many_small_writes_become_few_row_groups(self, tmp_path):
        with OutputFile(str(tmp_path / "out.parquet")) as output:
            for _ in range(5):
                output.write(read(GOOD), scores_of(2))
        assert pq.ParquetFile(tmp_path / "out.parquet").metadata.num_row_groups == 1

    def test_an_earlier_part_is_never_overwritten_unasked(self, tmp_path):
        path = tmp_path / "out.jsonl"
        with suppress(KeyboardInterrupt), OutputFile(str(path), settings={}) as output:
            output.write(read(GOOD), scores_of(2), records=1)
            raise KeyboardInterrupt
        before = output.partial.read_bytes()
        with pytest.raises(ResumeError, match=r"an earlier run finished 1 records: go on with it \(--resume\)"):
            OutputFile(str(path), settings={})
        assert output.partial.read_bytes() == before

    def test_what_cannot_be_gone_on_with(self, tmp_path):
        path = tmp_path / "out.jsonl"
        with suppress(KeyboardInterrupt), OutputFile(str(path), settings={"temperature": 1.0}) as output:
            output.write(read(GOOD), scores_of(2), records=1)
            raise KeyboardInterrupt
        with pytest.raises(ResumeError, match=r"temperature: expected 1\.0, as in the run that is resumed, got 2\.0"):
            OutputFile(str(path), settings={"temperature": 2.0}, resume=True)
        output.partial.write_bytes(b"")
        with pytest.raises(ResumeError, match=r"expected at least the \d+ bytes that are done, got 0"):
            OutputFile(str(path), settings={"temperature": 1.0}, resume=True)
        (tmp_path / "out.jsonl.partial.json").write_text("{")
        with pytest.raises(ResumeError, match="expected what an earlier run noted"):
            OutputFile(str(path), settings={"temperature": 1.0}, resume=True)

    def test_nothing_is_left_of_nothing(self, tmp_path):
        with pytest.raises(KeyboardInterrupt), OutputFile(str(tmp_path / "out.jsonl")):
            raise KeyboardInterrupt
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
    def test_no_records_are_a_complete_file(self, tmp_path, suffix):
        with OutputFile(str(tmp_path / f"out.{suffix}")):
            pass
        with closing(open_reader(str(tmp_path / f"out.{suffix}"))) as reader:
            assert list(reader) == []

    @pytest.mark.parametrize("name", ["out.csv", "out", "out.json"])
    def test_unknown_suffix(self, tmp_path, name):
        with pytest.raises(FileFormatError, match=r"expected a name that ends in \.jsonl or \.parquet"):
            OutputFile(str(tmp_path / name))
