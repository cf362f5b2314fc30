import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vhead.errors import FieldError
from vhead.rollouts.files.parquet import ParquetRow, _check_dictionaries

# 2023-11-14T22:13:20 and 123,456,789 nanoseconds.
POINT = 1_700_000_000_123_456_789
TEXT = "2023-11-14T22:13:20.123456789"
POINTS = pa.timestamp("ns")


def to_json(value, kind):
    return json.loads(ParquetRow(pa.record_batch({"x": pa.array([value], kind)}), 0, 1, None).json_object())["x"]


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (POINT, POINTS, TEXT),
        (POINT, pa.timestamp("ns", "+02:00"), "2023-11-15T00:13:20.123456789+02:00"),
        (-1, POINTS, "1969-12-31T23:59:59.999999999"),
        (86_399_123_456_789, pa.time64("ns"), "23:59:59.123456789"),
        (POINT - 789, POINTS, TEXT[:-3]),
        ([POINT, None], pa.list_(POINTS), [TEXT, None]),
        ([POINT, POINT], pa.list_(POINTS, 2), [TEXT, TEXT]),
        ({"a": POINT, "b": 1}, pa.struct([("a", POINTS), ("b", pa.int8())]), {"a": TEXT, "b": 1}),
        ([("a", POINT)], pa.map_(pa.string(), POINTS), [["a", TEXT]]),
        (None, POINTS, None),
    ],
)
def test_nanoseconds_of_times_are_kept_in_json(value, kind, expected):
    assert to_json(value, kind) == expected


@pytest.mark.parametrize(
    ("value", "unit", "expected"), [(5, "s", 5.0), (-1, "ns", -1e-9), (86_400_000_005, "us", 86400.000005)]
)
def test_time_spans_are_seconds(value, unit, expected):
    assert to_json(value, pa.duration(unit)) == expected


@pytest.mark.parametrize(("value", "unit"), [(POINT, "ns"), (2**62 + 1, "s")])
@pytest.mark.parametrize("nested", [False, True])
def test_a_time_span_that_seconds_would_round_is_refused(value, unit, nested):
    given = ([value], pa.list_(pa.duration(unit))) if nested else (value, pa.duration(unit))
    with pytest.raises(FieldError, match=rf"row 1: x: .* time span of {value} {unit}, .*; a Parquet output keeps it"):
        to_json(*given)


def wrong_dictionary(*indices):
    return pa.DictionaryArray.from_arrays(pa.array(indices, pa.int32()), pa.array(["x", "y"]), safe=False)


def test_an_index_out_of_its_dictionary_is_noticed_before_it_is_followed():
    for array in (
        wrong_dictionary(0, 2),
        wrong_dictionary(-1, 1),
        pa.StructArray.from_arrays([wrong_dictionary(7, 0)], ["tag"]),
        pa.ListArray.from_arrays(pa.array([0, 2], pa.int32()), wrong_dictionary(1, 2)),
    ):
        with pytest.raises(ValueError, match="an index out of a dictionary of 2"):
            _check_dictionaries(array)
    for array in (wrong_dictionary(0, 1), wrong_dictionary(), pa.array([None, "x"]).dictionary_encode(), pa.array([1])):
        _check_dictionaries(array)


def test_arrays_of_numbers_are_read_without_pandas(tmp_path):
    """Which pyarrow's own `to_numpy` would import, for a third of a second."""
    path = tmp_path / "scores.parquet"
    columns = {"values": [[1.5, -2.25], [], [3.0]], "token_ids": [[7], [8, 9], []]}
    pq.write_table(pa.table(columns), path)
    code = (
        "import sys; from vhead.rollouts.files.opening import open_reader; "
        f"print([[list(map(float, row.members(['values', 'token_ids'])[name])) for row in open_reader({str(path)!r})] "
        "for name in ('values', 'token_ids')], 'pandas' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[[[1.5, -2.25], [], [3.0]], [[7.0], [8.0, 9.0], []]] False\n"


LISTS = [[9], [1, 2, 3], None, [], [4, None], [5], [], None, [6, 7]]


def rows_of(batch):
    reader, found = SimpleNamespace(names=frozenset(batch.schema.names)), {}
    return [ParquetRow(batch, at, at + 1, reader, found=found) for at in range(batch.num_rows)]


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list])
@pytest.mark.parametrize("values", [pa.int8(), pa.uint64(), pa.float16(), pa.float32(), pa.float64()])
@pytest.mark.parametrize(("first", "count"), [(0, 9), (1, 8), (2, 5), (5, 1), (6, 2), (0, 0)])
def test_rows_of_a_batch_are_the_lists_of_its_column(kind, values, first, count):
    """An array of the column's own numbers, and Python's objects where there is a null."""
    numbers = [None if given is None else [None if n is None else np.float16(n) for n in given] for given in LISTS]
    given = LISTS if pa.types.is_integer(values) else numbers
    batch = pa.record_batch({"x": pa.array(given, kind(values))}).slice(first, count)
    found = [row.members(("x",))["x"] for row in rows_of(batch)]
    for expected, got in zip(LISTS[first : first + count], found, strict=True):
        if expected is None or None in expected:
            assert got == expected
        else:
            assert got.dtype == values.to_pandas_dtype()
            assert got.tolist() == expected


def test_only_whole_numbers_are_arrays_in_what_is_scored():
    columns = {"prompt_ids": pa.array([[1, 2]]), "completion_ids": pa.array([[1.5]])}
    (row,) = rows_of(pa.record_batch(columns))
    assert isinstance(row._fast("prompt_ids", "iu"), np.ndarray)
    assert row._fast("completion_ids", "iu") == [1.5]


@pytest.mark.parametrize("offsets", [[0, 3, 2, 4], [0, 2, 4, 5], [-1, 0, 2, 4], [3, 2, 2, 2]])
@pytest.mark.parametrize(("kind", "width"), [(pa.list_, "int32"), (pa.large_list, "int64")])
def test_lists_that_lead_out_of_their_column_are_noticed_before_they_are_followed(offsets, kind, width):
    bounds = np.zeros(4, width)
    buffers = [None, pa.py_buffer(bounds)]
    column = pa.Array.from_buffers(kind(pa.float32()), 3, buffers, children=[pa.array([1, 2, 3, 4], pa.float32())])
    batch = pa.record_batch({"y": [1, 2, 3], "x": column})
    bounds[:] = offsets  # Only now, as pyarrow would refuse some of them above.
    for row in rows_of(batch):
        with pytest.raises(
            FieldError, match=rf"^row {row.count}: x: expected a value that can be read, got .* lead out"
        ):
            row.members(("x",))
        assert row.members(("y",)) == {"y": row.count}
