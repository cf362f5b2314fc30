"""Records of the forms that data sets have, from any source of mappings, from JSON Lines and from Parquet."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vhead.errors import FieldError
from vhead.rollouts import from_records
from vhead.rollouts.fields import parsed_fields
from vhead.rollouts.files import open_reader
from vhead.rollouts.jsonl import JsonlReader

ASK = {"role": "user", "content": "2 and 2?"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]}
TOLD = {"role": "tool", "content": "4"}
SAY = {"role": "assistant", "content": "four"}
TRACE = [ASK, CALL, TOLD, SAY]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"required": ["a"]}}}]
IDS = {"prompt_ids": [1, 2], "completion_ids": [3, 4, 5]}


def from_mappings(record, fields, folder):
    return next(from_records([record], fields=fields))


def from_jsonl(record, fields, folder):
    (row,) = JsonlReader(io.BytesIO(json.dumps(record).encode() + b"\n"), fields=fields)
    return row.rollout()


def from_parquet(record, fields, folder):
    pq.write_table(pa.Table.from_pylist([record]), folder / "a.parquet")
    (row,) = open_reader(str(folder / "a.parquet"), fields=fields)
    return row.rollout()


@pytest.fixture(params=[from_mappings, from_jsonl, from_parquet], ids=["mappings", "jsonl", "parquet"])
def read(request, tmp_path):
    return lambda record, fields=None: request.param(record, fields, tmp_path)


class TestForms:
    def test_standard(self, read):
        rollout = read({"prompt": "a", "completion": "b", "id": "r", "tools": TOOLS})
        assert (rollout.kind, rollout.prompt, rollout.completion, rollout.id) == ("text", "a", "b", "r")

    def test_conversational(self, read):
        rollout = read({"prompt": [ASK], "completion": TRACE[1:], "tools": TOOLS})
        assert rollout.kind == "messages"
        assert (list(rollout.prompt), list(rollout.completion), list(rollout.tools)) == ([ASK], TRACE[1:], TOOLS)

    def test_messages(self, read):
        rollout = read({"messages": TRACE, "tools": TOOLS})
        assert (list(rollout.prompt), list(rollout.completion), list(rollout.tools)) == ([ASK], TRACE[1:], TOOLS)

    @pytest.mark.parametrize("tools", [json.dumps(TOOLS), TOOLS])
    def test_tools_as_json_too(self, read, tools):
        assert list(read({"messages": TRACE, "tools": tools}).tools) == TOOLS

    @pytest.mark.parametrize("tools", ["", " ", "[]", "null", None])
    def test_no_tools(self, read, tools):
        assert read({"messages": TRACE, "tools": tools}).tools is None

    @pytest.mark.parametrize("mask", [[True, False, True], [1, 0, 1]], ids=str)
    def test_ids_with_a_mask(self, read, mask):
        rollout = read(IDS | {"completion_mask": mask})
        assert rollout.mask.dtype == np.bool_
        assert rollout.mask.tolist() == [True, False, True]

    def test_ids_with_candidates(self, read):
        assert read(IDS | {"candidates": [[1, 2], [3, 4], [5, 6]]}).candidates.tolist() == [[1, 2], [3, 4], [5, 6]]

    def test_candidates_beside_text_are_somebody_else_s(self, read):
        assert read({"prompt": "a", "completion": "b", "candidates": ["b", "c"]}).candidates is None

    def test_token_ids_come_first(self, read):
        assert read(IDS | {"prompt": "a", "completion": "b", "messages": TRACE}).kind == "token ids"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (IDS | {"completion_mask": [1, 0, 2]}, r"completion_mask: expected true and false, or 1 and 0, got 2 .* 2$"),
        (IDS | {"completion_mask": [1.0, 0.0, 1.0]}, "completion_mask: expected true and false, or 1 and 0, got 1.0"),
        (
            IDS | {"completion_mask": [True, None, True]},
            "completion_mask: expected true and false, or 1 and 0, got n",
        ),
        (IDS | {"completion_mask": ["1", "0", "1"]}, "completion_mask: expected true and false, or 1 and 0, got '1'"),
        (IDS | {"completion_mask": [1, 0]}, "completion_mask: expected one boolean for each of the completion's 3"),
        (IDS | {"completion_mask": [0, 0, 0]}, "completion_mask: expected at least one True"),
        (IDS | {"completion_mask": "101"}, "completion_mask: expected a flat list of booleans"),
        (IDS | {"candidates": [[1], [2, 3], [4]]}, "candidates: expected as many candidates for every token"),
        ({"prompt": "a", "completion": "b", "completion_mask": [1]}, "completion_mask: expected none beside text"),
        ({"messages": TRACE, "tools": "{"}, "tools: expected a list of function schemas, or one as JSON, got '{'"),
        ({"messages": TRACE, "tools": '{"a": 1}'}, "tools: expected a list of function schemas"),
        ({"prompt": [ASK], "completion": "b"}, "completion: expected messages, as the prompt is, got text"),
        ({"messages": [ASK, ASK]}, "messages: expected a message of the assistant's"),
    ],
    ids=str,
)
def test_what_is_no_rollout_names_the_field(read, record, message):
    with pytest.raises(FieldError, match=message):
        read(record)


class TestOtherNames:
    def test_columns_of_other_names(self, read):
        rollout = read(
            {"question": "a", "response": "b", "key": 7}, {"prompt": "question", "completion": "response", "id": "key"}
        )
        assert (rollout.prompt, rollout.completion, rollout.id) == ("a", "b", 7)

    def test_a_mapped_form_is_the_one_that_counts(self, read):
        fields = {"prompt": "question", "completion": "response"}
        assert read(IDS | {"question": "a", "response": "b", "messages": TRACE}, fields).kind == "text"

    def test_one_field_of_a_pair(self, read):
        assert read({"prompt": "a", "response": "b"}, {"completion": "response"}).completion == "b"

    def test_a_mapped_name_hides_the_column_of_the_field_s_own(self, read):
        assert read({"prompt": "x", "question": "a", "completion": "b"}, {"prompt": "question"}).prompt == "a"

    def test_a_record_without_the_column_names_both(self, read):
        with pytest.raises(FieldError, match="question: expected a column of this name, because `prompt` is"):
            read({"prompt": "a", "completion": "b"}, {"prompt": "question"})

    def test_errors_name_the_column(self, read):
        with pytest.raises(FieldError, match="response: expected text, got an empty text"):
            read({"prompt": "a", "response": ""}, {"completion": "response"})

    def test_the_option(self):
        assert parsed_fields("prompt=question, completion=a=b") == {"prompt": "question", "completion": "a=b"}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "fields: expected some of id, messages, .*, got ''"),
            ("prompts=a", "fields: expected some of id, messages, .*, got 'prompts'"),
            ("prompt", "fields: expected prompt=COLUMN, got '' as its column"),
            ("prompt=a,prompt=b", "fields: expected each field once, got prompt twice"),
        ],
    )
    def test_what_is_no_option(self, text, message):
        with pytest.raises(ValueError, match=message):
            parsed_fields(text)


class TestFromRecords:
    def test_one_at_a_time(self):
        rollouts = from_records(iter([{"prompt": "a", "completion": "b"}, {"prompt": "c"}]))
        assert next(rollouts).prompt == "a"
        with pytest.raises(FieldError, match="record 1: completion: expected the field that goes with `prompt`"):
            next(rollouts)

    def test_fields_are_checked_before_anything_is_read(self):
        with pytest.raises(ValueError, match="fields: expected some of"):
            from_records([], fields={"question": "prompt"})

    def test_what_is_no_mapping(self):
        with pytest.raises(FieldError, match="record 0: record: expected a mapping from names to values, got 'ab'"):
            next(from_records(["ab"]))

    def test_the_records_of_a_data_frame(self):
        """Their lists are arrays of objects."""
        trace = np.empty(len(TRACE), object)
        trace[:] = TRACE
        assert list(next(from_records([{"messages": trace, "tools": None}])).completion) == TRACE[1:]
        assert next(from_records([{name: np.array(ids) for name, ids in IDS.items()}])).completion.tolist() == [3, 4, 5]


def test_parquet_gives_tools_no_members_that_they_had_not(tmp_path):
    """A column of objects has one type, so that each gets the members of all."""
    others = [{"type": "function", "function": {"name": "b", "parameters": {"properties": {"x": {"type": "text"}}}}}]
    table = pa.Table.from_pylist([{"messages": TRACE, "tools": TOOLS}, {"messages": TRACE, "tools": others}])
    pq.write_table(table, tmp_path / "a.parquet")
    first, second = (row.rollout() for row in open_reader(str(tmp_path / "a.parquet")))
    assert (list(first.tools), list(second.tools)) == (TOOLS, others)
    assert list(first.completion) == TRACE[1:]
