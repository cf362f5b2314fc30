import datetime
import json
import sys
import uuid
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.scoring.files.score_file_cases import GOOD, begun, content, put, read, scores_of
from vhead import Scores
from vhead.errors import FieldError, FileFormatError, MissingExtraError
from vhead.rollouts.files import jsonl
from vhead.rollouts.files.opening import open_reader
from vhead.rollouts.files.parquet import ParquetRow
from vhead.scoring.files.opening import open_output


def write(lines, scores, path):
    rows = read("\n".join(lines))
    with begun(path) as output:
        output.write(rows, scores, rows[-1])
        output.publish(rows[-1], scores[:0])
    return path.read_text().splitlines()


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
        assert row.rollouts()[0].kind == kind

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
                r"prompt: expected text or a list of messages \(token ids go in `prompt_ids`\), got \[1\] \(list\)",
            ),
            ({"prompt": "", "completion": "b"}, "prompt: expected text, got an empty text"),
            ({"prompt_ids": [1], "completion_ids": []}, "completion_ids: expected at least one token, got none"),
            (
                {"prompt_ids": [1, -1], "completion_ids": [2]},
                "prompt_ids: expected token ids >= 0, got -1 at position 1",
            ),
            ({"prompt_ids": [1, 2.5], "completion_ids": [2]}, "prompt_ids: expected text or a flat list of integer"),
            ({"messages": [{"role": "user", "content": "a"}]}, "messages: expected a list of two messages or more"),
            ({"prompt_ids": [1, True], "completion_ids": [2]}, "prompt_ids: expected text or a flat list of integer"),
            ({"prompt_ids": [2**63], "completion_ids": [2]}, "prompt_ids: expected text or a flat list of integer"),
            ({"prompt": "a\ud800", "completion": "b"}, "prompt: expected text that Unicode .*pair at character 1"),
            (
                {
                    "messages": [
                        {"role": "user", "content": "a", "x": ["\udc00"]},
                        {"role": "assistant", "content": "b"},
                    ]
                },
                "line 1: messages: expected text that Unicode can hold, got half of a surrogate pair",
            ),
            ({f"field {i}": 1 for i in range(40)}, "got the fields field 0, .* and 30 more"),
        ],
    )
    def test_what_does_not(self, record, message):
        (row,) = read(json.dumps(record))
        with pytest.raises(FieldError, match=message):
            row.rollouts()[0]


class TestJsonl:
    def test_a_broken_line_harms_no_other(self):
        rows = read(f"{GOOD}\n{{broken\n\n  \n[1]\n{GOOD}\n")
        assert [row.where for row in rows] == ["line 1", "line 2", "line 5", "line 6"]
        assert rows[0].rollouts()[0].completion == rows[3].rollouts()[0].completion == "b"
        with pytest.raises(FieldError, match=r"^line 2: text: expected a JSON object, got broken JSON at column 2"):
            rows[1].rollouts()[0]
        with pytest.raises(FieldError, match=r"^line 5: text: expected a JSON object, got \[1\] \(list\)"):
            rows[2].rollouts()[0]

    def test_a_line_that_stops_short_is_faulted_at_its_end(self):
        (row,) = read('{"prompt": "a"\n')
        with pytest.raises(FieldError, match=r"broken JSON at column 15 "):
            row.rollouts()[0]

    def test_a_half_written_last_line(self):
        rows = read(f'{GOOD}\n{{"prompt": "a", "comp')
        with pytest.raises(
            FieldError, match=r"line 2: .* got only half of one, because the file ends in the middle of this line"
        ):
            rows[1].rollouts()[0]

    @pytest.mark.parametrize("end", ["", "\n"])
    def test_a_number_of_more_digits_than_python_reads_is_called_that(self, end: str):
        (row,) = read(f'{{"prompt": "a", "completion": "b", "x": 1{"0" * 5000}}}{end}')
        with pytest.raises(FieldError, match=r"got one with a whole number of more than 4,300 digits$"):
            row.rollouts()

    def test_a_whole_last_line_needs_no_line_break(self):
        assert read(f"{GOOD}\n{GOOD}")[1].rollouts()[0].prompt == "a"

    def test_bytes_that_are_no_utf8(self):
        with pytest.raises(FieldError, match="line 1: text: expected UTF-8, got invalid start byte at byte 12"):
            read(b'{"prompt": "\xff"}\n')[0].rollouts()

    def test_a_byte_order_mark_and_carriage_returns(self):
        rows = read(b"\xef\xbb\xbf" + f"{GOOD}\r\n{GOOD}\r\n".encode())
        assert [row.rollouts()[0].prompt for row in rows] == ["a", "a"]
        assert rows[1].json_object() == GOOD

    def test_deep_nesting(self):
        with pytest.raises(FieldError, match="line 1: text: expected a JSON object"):
            read("[" * 100_000)[0].rollouts()

    def test_positions_are_bytes(self):
        text = f"{GOOD}\n\n{GOOD}\n"
        assert [row.position for row in read(text)] == [len(GOOD) + 1, len(text)]

    def test_no_column_is_overwritten_unasked(self):
        (row,) = read('{"prompt": "a", "completion": "b", "reward": 1}', reserved=("values", "reward"))
        with pytest.raises(FieldError, match=r"line 1: reward: expected no such .*--suffix.*--overwrite"):
            row.rollouts()[0]

    @pytest.mark.parametrize(
        ("line", "left"),
        [
            ('{"prompt": "a", "reward": [1, "x"], "completion": "b"}', '{"prompt": "a", "completion": "b"}'),
            ('{"r\\u0065ward":{"a":[1,{}]} ,"prompt":"a","completion":"b" }', '{"prompt":"a", "completion":"b"}'),
            (
                '{ "prompt": "reward", "completion": "b", "reward": 1, "n": 1.50 }',
                '{"prompt": "reward", "completion": "b", "n": 1.50}',
            ),
            ('{"prompt": "reward", "completion": "b"  }', '{"prompt": "reward", "completion": "b"  }'),
        ],
    )
    def test_columns_are_replaced_when_asked_and_the_others_stay_to_the_byte(self, line, left):
        (row,) = read(line, reserved=("values", "reward"), replaces=True)
        assert row.rollouts()[0].completion == "b"
        assert row.json_object() == left
        assert row.columns().keys() == json.loads(left).keys()

    def test_a_line_that_is_too_long_takes_no_memory_and_harms_no_other(self, monkeypatch):
        monkeypatch.setattr(jsonl, "LONGEST_LINE", 64)
        long = GOOD.replace("a", "a" * 1000)
        rows = read(f"{GOOD}\n{long}\n{GOOD}\n")
        assert [row.position for row in rows] == [35, 36 + len(long), 71 + len(long)]
        assert len(rows[1].line) == 64
        with pytest.raises(FieldError, match="line 2: text: expected a line of less than 64 bytes, got a longer one"):
            rows[1].rollouts()[0]
        assert rows[2].rollouts()[0].prompt == "a"

    def test_each_digest_stands_for_all_records_before(self):
        lines = [GOOD.replace("a", letter) for letter in "abcd"]
        before = [row.digest for row in read("\n".join(lines))]
        assert [row.digest for row in read("\n\n".join(f" {line}\r" for line in lines))] == before
        swapped = [row.digest for row in read("\n".join([lines[1], lines[0], *lines[2:]]))]
        assert not set(before) & set(swapped)

    def test_records_are_carried_through_to_the_byte(self, tmp_path):
        line = '{ "z": 1e400, "prompt":"\\u00e4",  "n": 12345678901234567890, "x": {"y": [null]} }'
        (out,) = write([line], scores_of(2), tmp_path / "out.jsonl")
        assert out.startswith(
            '{ "z": 1e400, "prompt":"\\u00e4",  "n": 12345678901234567890, "x": {"y": [null]}, "values": ['
        )
        assert set(json.loads(out)) == {"z", "prompt", "n", "x", "values", "reward"}

    @given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
    @example(np.random.default_rng(0).uniform(1000, 1024, 500).astype(np.float32).tolist())
    def test_float32_survives(self, tmp_path_factory, numbers):
        values = np.array(numbers, np.float32)
        scores = Scores(
            ids=(None,),
            indices=np.zeros(1, np.int64),
            prompt_lengths=np.ones(1, np.int64),
            offsets=np.array([0, len(values)]),
            computed={"values": values, "reward": values[:1]},
        )
        record = json.loads(write([GOOD], scores, tmp_path_factory.mktemp("out") / "out.jsonl")[0])
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
        rollouts = [row.rollouts()[0] for row in rows]
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
        with begun(tmp_path / "out.parquet", schema=open_reader(str(file)).schema) as output:
            output.write(rows[:2], scores[:2], rows[1])
            output.write(rows[2:], scores[2:], rows[2])
            output.publish(rows[2], scores[:0])
        result = pq.read_table(tmp_path / "out.parquet")
        assert result.select(table.column_names).equals(pq.read_table(file))
        assert result.column_names == [*table.column_names, "values", "reward"]
        assert result.schema.field("values").type == pa.list_(pa.float32())
        flat = result.column("values").combine_chunks().values.to_numpy()
        np.testing.assert_array_equal(flat, scores.values)
        np.testing.assert_array_equal(result.column("reward").to_numpy(), scores.reward)

    def test_rows_that_were_left_out_are_not_written(self, file, tmp_path):
        reader = open_reader(str(file))
        rows = list(reader)
        put(tmp_path / "out.parquet", [rows[0], rows[2]], schema=reader.schema, size=2)
        assert pq.read_table(tmp_path / "out.parquet").column("id").to_pylist() == ["a", "c"]

    def test_to_jsonl(self, file, tmp_path):
        put(tmp_path / "out.jsonl", list(open_reader(str(file))))
        records = content(tmp_path / "out.jsonl")
        assert records[0]["when"] == "1970-01-01T00:00:00.000001"
        assert records[1]["when"] is None
        assert records[2]["nested"] == {"a": []}
        assert [len(record["values"]) for record in records] == [3, 4, 2]

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            (Decimal("1.50"), "1.50"),
            (datetime.date(2026, 1, 2), "2026-01-02"),
            (float("nan"), None),
            ([1.0, float("inf")], [1.0, None]),
            ("ä", "ä"),
            (b"\x00\xff", "AP8="),
            (datetime.timedelta(days=1, microseconds=5), 86400.000005),
            ([b"a"], ["YQ=="]),
        ],
    )
    def test_what_json_can_hold(self, value, expected):
        batch = pa.record_batch({"x": pa.array([value])})
        assert json.loads(ParquetRow(batch, 0, 1, None).json_object()) == {"x": expected}

    def test_uuids_are_text(self):
        value = uuid.UUID(int=5)
        storage = pa.array([value.bytes], pa.binary(16))
        column = pa.ExtensionArray.from_storage(pa.uuid(), storage) if hasattr(pa, "uuid") else pa.array([str(value)])
        row = ParquetRow(pa.record_batch({"x": column}), 0, 1, None)
        assert json.loads(row.json_object()) == {"x": str(value)}

    @pytest.mark.parametrize(
        "column", [pa.array([2**60], pa.timestamp("s")), pa.array([b"\xff"], pa.binary()).view(pa.string())]
    )
    def test_what_python_cannot_hold_is_named(self, column):
        batch = pa.record_batch({"y": [1], "x": column})
        with pytest.raises(FieldError, match="row 1: x: expected a value that can be read"):
            ParquetRow(batch, 0, 1, None).json_object()

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
            [row.rollouts()[0] for row in open_reader(str(tmp_path / "in.parquet"))]

    def test_messages(self, tmp_path):
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        pq.write_table(pa.table({"messages": [chat]}), tmp_path / "in.parquet")
        (row,) = open_reader(str(tmp_path / "in.parquet"))
        assert row.rollouts()[0].completion == (chat[1],)

    def test_no_column_is_overwritten(self, file):
        with pytest.raises(FieldError, match=r"^tag: expected no such column in the input"):
            open_reader(str(file), ("values", "tag"))
        reader = open_reader(str(file), ("values", "tag"), replaces=True)
        assert "tag" not in next(iter(reader)).columns()
        assert "tag" not in reader.schema.names

    def test_a_column_s_name_that_comes_twice_is_the_file_s_fault(self, tmp_path):
        table = pa.table([pa.array(["a"]), pa.array(["b"]), pa.array([1])], names=["prompt", "completion", "prompt"])
        pq.write_table(table, tmp_path / "in.parquet")
        with pytest.raises(FileFormatError, match=r"in\.parquet: expected each column's name once, got 'prompt' twice"):
            open_reader(str(tmp_path / "in.parquet"))

    def test_a_file_of_equal_rows_is_read_in_bounded_memory(self, tmp_path):
        ids = pa.array([[7] * 100_000] * 256, pa.list_(pa.int64()))
        pq.write_table(pa.table({"prompt_ids": ids, "completion_ids": [[1]] * 256}), tmp_path / "in.parquet")
        whole = ids.nbytes
        del ids
        assert (tmp_path / "in.parquet").stat().st_size < 4096
        before, most = pa.total_allocated_bytes(), 0
        for row in open_reader(str(tmp_path / "in.parquet")):
            row.rollouts()[0]
            most = max(most, pa.total_allocated_bytes() - before)
        assert most < whole / 2

    def test_broken_utf8_harms_no_other_row(self, tmp_path):
        prompts = pa.array([b"a", b"\xff", b"c"], pa.binary()).view(pa.string())
        pq.write_table(pa.table({"prompt": prompts, "completion": ["x", "y", "z"]}), tmp_path / "in.parquet")
        rows = list(open_reader(str(tmp_path / "in.parquet")))
        assert [rows[0].rollouts()[0].prompt, rows[2].rollouts()[0].prompt] == ["a", "c"]
        with pytest.raises(FieldError, match=r"row 2: prompt: expected a value that can be read, got .*utf-8"):
            rows[1].rollouts()[0]

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

    def test_without_pyarrow(self, monkeypatch, tmp_path):
        for name in ("rollouts.files.arrow", "rollouts.files.parquet", "scoring.files.parquet"):
            monkeypatch.delitem(sys.modules, f"vhead.{name}", raising=False)
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(MissingExtraError, match=r"pip install 'vhead\[data\]'"):
            open_output(str(tmp_path / "out.parquet"))

    @pytest.mark.parametrize("name", ["out.csv", "out", "out.json"])
    def test_unknown_suffix(self, tmp_path, name):
        with pytest.raises(
            FileFormatError, match=r"expected a name that ends in \.jsonl or \.jsonl\.gz or \.jsonl\.zst or \.parquet"
        ):
            open_output(str(tmp_path / name))
