"""Columns of JSON records in Parquet: one type for each, whatever came first, and never another value."""

import itertools
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.scoring.files.score_file_cases import (
    begun,
    content,
    lines_of,
    put,
    read,
    scores_of,
    stop_after,
    write_in_chunks,
)
from vhead.errors import FieldError
from vhead.scoring.files.schema import Shape, shape_of, united

ABSENT = object()


def carried(folder, values, size=1, **options):
    """What becomes of values of one field, each in a chunk of its own."""
    rows = lines_of(*({} if value is ABSENT else {"x": value} for value in values))
    assert put(folder / "out.parquet", rows, size, **options) == []
    return [record.get("x") for record in content(folder / "out.parquet")]


@pytest.mark.parametrize("size", [1, 2, 9])
class TestWhatFits:
    def test_fractions_stay_fractions_behind_whole_numbers(self, tmp_path, size):
        assert carried(tmp_path, [1, 0, 0.5, 0.9], size) == [1, 0, 0.5, 0.9]

    def test_fractions_inside_lists_and_objects_stay_fractions(self, tmp_path, size):
        values = [{"a": [1], "b": {"c": 0}}, {"a": [0.5, 2], "b": {"c": 0.25}}]
        assert carried(tmp_path, values, size) == values

    def test_later_keys_of_nested_objects_are_kept(self, tmp_path, size):
        found = carried(tmp_path, [{"a": 1}, {"a": 2, "b": "keep"}, {"c": {"d": []}}, {"c": {"d": [True]}}], size)
        assert found == [
            {"a": 1, "b": None, "c": None},
            {"a": 2, "b": "keep", "c": None},
            {"a": None, "b": None, "c": {"d": []}},
            {"a": None, "b": None, "c": {"d": [True]}},
        ]

    def test_later_keys_of_objects_in_lists_are_kept(self, tmp_path, size):
        found = carried(tmp_path, [[{"a": 1}], [], [{"b": "keep"}, None]], size)
        assert found == [[{"a": 1, "b": None}], [], [{"a": None, "b": "keep"}, None]]

    def test_columns_that_come_later_are_added(self, tmp_path, size):
        assert carried(tmp_path, [ABSENT, 5, ABSENT], size) == [None, 5, None]

    @pytest.mark.parametrize(
        "later", [1, 0.5, "text", True, [1], [[0.5], None], {"a": 1}, [{"a": {}}], {"a": {"b": None}}], ids=str
    )
    def test_null_takes_what_comes_later(self, tmp_path, size, later):
        found = carried(tmp_path, [None, None, later, None], size)
        assert found[:2] == [None, None]
        assert found[3] is None
        assert json.dumps(found[2]).replace('"{}"', "{}") == json.dumps(later)

    @pytest.mark.parametrize(
        ("first", "later"), [([], [1]), ([], [[{"a": "x"}]]), ([None], [0.5]), ([[]], [["x"]])], ids=str
    )
    def test_an_empty_list_takes_what_comes_later(self, tmp_path, size, first, later):
        assert carried(tmp_path, [first, later, first], size) == [first, later, first]

    def test_an_empty_object_takes_what_comes_later(self, tmp_path, size):
        assert carried(tmp_path, [{}, {"a": 1}, {}], size) == [{"a": None}, {"a": 1}, {"a": None}]

    def test_objects_that_stay_empty_are_text(self, tmp_path, size):
        assert carried(tmp_path, [{}, None, {}], size) == ["{}", None, "{}"]

    def test_whole_numbers_beyond_63_bits_stay_what_they_are(self, tmp_path, size):
        values = [0, 2**63, 2**64 - 1]
        assert carried(tmp_path, values, size) == values
        assert carried(tmp_path, [-(2**63), 2**63 - 1], size, overwrite=True) == [-(2**63), 2**63 - 1]

    def test_deep_nesting_that_parquet_can_hold(self, tmp_path, size):
        value = "x"
        for _ in range(31):
            value = [value]
        assert carried(tmp_path, [None, value], size) == [None, value]


MISFITS = [
    ([1, "x"], "line 2: x: expected a whole number, as line 1 has, got text; JSON Lines"),
    ([None, "x", 1], "line 3: x: expected text, as line 2 has, got a whole number"),
    ([True, 1], "line 2: x: expected a boolean, as line 1 has, got a whole number"),
    ([[1], {"a": 1}], "line 2: x: expected a list, as line 1 has, got an object"),
    ([{"a": {"b": 1}}, {"a": {"b": "x"}}], r"line 2: x\.a\.b: expected a whole number, as line 1 has"),
    ([[{"a": 1}], [{"a": 2}, {"a": "x"}]], r"line 2: x\[\]\.a: expected values of one kind .*got 2 \(int\) and 'x'"),
    ([[1], ["x"]], r"line 2: x\[\]: expected a whole number, as line 1 has, got text"),
    ([[1, "x"]], r"line 1: x\[\]: expected values of one kind in a Parquet file, got 1 \(int\) and 'x' \(str\)"),
    ([2**64], "line 1: x: expected whole numbers of 64 bits in a Parquet file, got 18446744073709551616"),
    ([-(2**63) - 1], "line 1: x: expected whole numbers of 64 bits"),
    (
        [-1, 2**63],
        "line 2: x: expected a number that fits in 64 bits together with -1, which line 1 has, got 9223372036854775808",
    ),
    (
        [2**63, 0, -5],
        "line 3: x: expected a number that fits in 64 bits together with 9223372036854775808, which line 1 has, got -5",
    ),
    ([2**53 + 1, 0.5], "line 2: x: expected a whole number, because line 1 has 9007199254740993, which 64-bit floats"),
    ([0.5, 2**53 + 1], "line 2: x: expected a number that 64-bit floats hold, because line 1 has a fraction"),
    (["\ud800"], "line 1: x: expected text that Unicode can hold, got half of a surrogate pair"),
    ([{"\udfff": 1}], "line 1: x: expected text that Unicode can hold"),
]


@pytest.mark.parametrize("size", [1, 9])
@pytest.mark.parametrize(("values", "message"), MISFITS, ids=lambda value: ascii(value)[:40])
class TestWhatDoesNotFit:
    def test_what_cannot_be_one_type_names_both_records(self, tmp_path, values, message, size):
        rows = lines_of(*({"x": value} for value in values))
        with pytest.raises(FieldError, match=message), begun(tmp_path / "out.parquet") as output:
            write_in_chunks(output, rows, size)

    def test_it_is_left_out_and_the_others_written_when_skipped(self, tmp_path, values, message, size):
        rows = lines_of({"x": None}, *({"x": value} for value in values), {"x": None})
        (error,) = put(tmp_path / "out.parquet", rows, size, skips=True)
        assert error.field.startswith("x")
        assert error.record == f"line {len(values) + 1}"
        assert [record["x"] for record in content(tmp_path / "out.parquet")] == [None, *values[:-1], None]

    def test_json_lines_hold_it(self, tmp_path, values, message, size):
        put(tmp_path / "out.jsonl", lines_of(*({"x": value} for value in values)), size)
        assert [record["x"] for record in content(tmp_path / "out.jsonl")] == values


def nested(depth, value=1, name="a"):
    for _ in range(depth):
        value = {name: value}
    return value


class TestAtTheFirstWrite:
    def test_nesting_too_deep_for_parquet_is_found_before_the_end(self, tmp_path):
        errors = put(tmp_path / "out.parquet", lines_of({"x": nested(3)}, {"x": nested(500)}), skips=True)
        assert "expected at most 32 levels of nesting in a Parquet file, got more" in str(errors[0])
        assert content(tmp_path / "out.parquet")[0]["x"] == nested(3)

    def test_a_number_that_would_become_infinite_is_refused(self, tmp_path):
        rows = read('{"prompt": "a", "completion": "b", "x": 1e400}\n{"prompt": "a", "completion": "b", "x": Infinity}')
        (error,) = put(tmp_path / "out.parquet", rows, 2, skips=True)
        assert "line 1: x: expected numbers within the range of 64-bit floats" in str(error)
        assert content(tmp_path / "out.parquet")[0]["x"] == float("inf")

    @pytest.mark.parametrize(
        "digits", ["9007199254740993.0", "-1700000000.123456789", "0.12345678901234567891", "3e-324"]
    )
    def test_a_number_whose_digits_a_float_would_round_away_is_refused(self, tmp_path, digits):
        rows = read(
            f'{{"prompt": "a", "completion": "b", "x": [{{"y": {digits}}}]}}\n{{"prompt": "a", "completion": "b"}}'
        )
        (error,) = put(tmp_path / "out.parquet", rows, 2, skips=True)
        assert "line 1: x: expected a number whose digits a 64-bit float holds" in str(error)
        assert "JSON Lines keeps any" in str(error)
        assert digits in str(error)

    @pytest.mark.parametrize(
        "digits",
        ["9007199254740992.0", "0.10000000000000001", "0.1000000000000000055511151231257827", "1E5", "-0.0", "5e-324"],
    )
    def test_a_number_that_is_a_float_to_its_last_digit_is_taken(self, tmp_path, digits):
        rows = read(f'{{"prompt": "a", "completion": "b", "x": {digits}}}')
        put(tmp_path / "out.parquet", rows, 1)
        assert repr(content(tmp_path / "out.parquet")[0]["x"]) == repr(float(digits))

    @given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from([".16e", ".20e", ".17g", ".800e"]))
    def test_a_float_is_taken_however_many_digits_it_is_written_with(self, number, form):
        (row,) = read(f'{{"x": {number!r}, "y": {number:{form}}}}')
        assert row.columns() == {"x": number, "y": number}

    def test_a_record_that_is_left_out_fixes_no_type(self, tmp_path):
        rows = lines_of({"x": "text", "y": 2**70}, {"x": 1, "y": 2}, {"x": 2, "y": 3})
        assert len(put(tmp_path / "out.parquet", rows, 3, skips=True)) == 1
        assert [record["x"] for record in content(tmp_path / "out.parquet")] == [1, 2]

    @pytest.mark.parametrize("values", [[1, 0.5, "x"], [{"a": 1}, {"a": 2, "b": "keep"}, {"b": 1}], [-1, 2, 2**63]])
    def test_a_resumed_output_knows_what_came_before(self, tmp_path, values):
        rows = lines_of(*({"x": value} for value in values))
        stop_after(tmp_path / "out.parquet", rows[:2])
        with (
            begun(tmp_path / "out.parquet", resume=True) as output,
            pytest.raises(FieldError, match=r"line 3: x.* line [12] has"),
        ):
            write_in_chunks(output, rows[2:])
        put(tmp_path / "whole.parquet", rows[:2])
        with begun(tmp_path / "out.parquet", resume=True) as output:
            output.publish(rows[1], scores_of())
        assert (tmp_path / "out.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()

    def test_columns_of_parquet_that_parquet_cannot_hold_are_named_before_anything_is_scored(self, tmp_path):
        schema = pa.schema([("prompt", pa.string()), ("span", pa.month_day_nano_interval())])
        with pytest.raises(Exception, match="span: expected a column of a type that can be written to Parquet"):
            begun(tmp_path / "out.parquet", schema=schema)


class TestEmptyOutput:
    def test_an_empty_input_of_json_gives_the_scores_columns(self, tmp_path):
        put(tmp_path / "out.parquet", [])
        found = pq.read_schema(tmp_path / "out.parquet")
        assert found.names == ["values", "reward"]
        assert [found.field(0).type.value_type, found.field(1).type] == [pa.float32(), pa.float32()]

    def test_an_empty_input_of_parquet_gives_its_columns_too(self, tmp_path):
        schema = pa.schema([("id", pa.int16()), ("when", pa.timestamp("us"))])
        put(tmp_path / "out.parquet", [], schema=schema, suffix="_b")
        found = pq.read_schema(tmp_path / "out.parquet")
        assert found.names == ["id", "when", "values_b", "reward_b"]
        assert [found.field(0).type, found.field(1).type] == [pa.int16(), pa.timestamp("us")]


SCALARS = st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats(allow_nan=False) | st.text(max_size=3)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=1), inner), max_leaves=8
)


def widened(value, shape):
    """What a value is in a column that holds others too: absent members are null, and empty objects may be text."""
    if value == {} and isinstance(shape, str):
        return "{}"
    if isinstance(value, dict) and isinstance(shape, dict):
        return {name: widened(value.get(name), shape[name]) for name in shape}
    if isinstance(value, list) and isinstance(shape, list):
        return [widened(item, found) for item, found in zip(value, shape, strict=True)]
    return value


@given(st.lists(VALUES, min_size=1, max_size=5), st.integers(1, 3))
def test_every_value_comes_back_or_is_named(tmp_path_factory, values, size):
    path = tmp_path_factory.mktemp("out") / "out.parquet"
    errors = put(path, lines_of(*({"x": value} for value in values)), size, skips=True)
    left_out = {int(error.record.split()[1]) - 1 for error in errors}
    kept = [value for place, value in enumerate(values) if place not in left_out]
    found = [record.get("x") for record in content(path)]
    assert len(found) == len(kept)
    for value, read_back in zip(kept, found, strict=True):
        assert widened(value, read_back) == read_back


@given(st.lists(VALUES, min_size=1, max_size=4))
def test_the_order_of_chunks_does_not_matter(values):
    try:
        shapes = [shape_of([value], f"line {place}") for place, value in enumerate(values)]
    except FieldError:
        return

    def kinds(shape):
        members = {name: kinds(member) for name, member in sorted(shape.members.items())}
        return shape.kind, None if shape.items is None else kinds(shape.items), members

    def together(order):
        shape = shape_of([], "")
        try:
            for one in order:
                shape = united(shape, one)
        except FieldError:
            return None
        assert Shape.from_json(json.loads(json.dumps(shape.to_json()))) == shape
        return kinds(shape)

    results = [together(order) for order in itertools.permutations(shapes)]
    assert all(result == results[0] for result in results)
