"""Records of the forms that data sets have, from any source of mappings, from JSON Lines and from Parquet."""

import io
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vhead import Rollout
from vhead.errors import FieldError
from vhead.rollouts import from_records
from vhead.rollouts.fields import parsed_fields
from vhead.rollouts.files.jsonl import JsonlReader
from vhead.rollouts.files.opening import open_reader

ASK = {"role": "user", "content": "2 and 2?"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]}
TOLD = {"role": "tool", "content": "4"}
OTHER_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "say", "arguments": {"text": "x"}}}],
}
SAY = {"role": "assistant", "content": "four"}
TRACE = [ASK, CALL, TOLD, SAY]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"required": ["a"]}}}]
IDS = {"prompt_ids": [1, 2], "completion_ids": [3, 4, 5]}
MORE = {"role": "assistant", "content": "5"}
PAIR_OF_IDS = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]}


def from_mappings(record, fields, folder):
    return tuple(from_records([record], fields=fields))


def from_jsonl(record, fields, folder):
    (row,) = JsonlReader(io.BytesIO(json.dumps(record).encode() + b"\n"), fields=fields)
    return row.rollouts()


def from_parquet(record, fields, folder):
    pq.write_table(pa.Table.from_pylist([record]), folder / "a.parquet")
    (row,) = open_reader(str(folder / "a.parquet"), fields=fields)
    return row.rollouts()


@pytest.fixture(params=[from_mappings, from_jsonl, from_parquet], ids=["mappings", "jsonl", "parquet"])
def read_all(request, tmp_path):
    """All rollouts of a record."""
    return lambda record, fields=None: request.param(record, fields, tmp_path)


@pytest.fixture
def read(read_all):
    """The rollout of a record that is one."""

    def read(record, fields=None):
        (rollout,) = read_all(record, fields)
        return rollout

    return read


def test_what_a_data_set_fills_up_with_null_is_not_there():
    """Arrow gives every object all members that any has, and data sets give them back."""
    records = [{"messages": [ASK, CALL, TOLD, SAY], "tools": TOOLS}, {"messages": [ASK, OTHER_CALL], "tools": None}]
    filled = pa.Table.from_pylist(records).to_pylist()
    assert filled[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"a": 2, "text": None}
    for record in (filled[0], json.loads(json.dumps(filled[0]))):
        (rollout,) = from_records([record])
        assert [*rollout.prompt, *rollout.completion] == TRACE
        assert list(rollout.tools) == TOOLS
    straight = Rollout.from_messages(filled[0]["messages"], tools=filled[0]["tools"])
    assert ([*straight.prompt, *straight.completion], list(straight.tools)) == (TRACE, TOOLS)


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


class TestPairs:
    def test_text(self, read_all):
        chosen, rejected = read_all({"prompt": "a", "chosen": "b", "rejected": "c", "id": "r"})
        assert (chosen.prompt, chosen.completion, chosen.id) == ("a", "b", "r")
        assert (rejected.prompt, rejected.completion, rejected.id) == ("a", "c", "r")

    def test_messages_after_a_prompt(self, read_all):
        sides = read_all({"prompt": [ASK], "chosen": [SAY], "rejected": [MORE], "tools": TOOLS})
        assert [(list(side.prompt), list(side.completion)) for side in sides] == [([ASK], [SAY]), ([ASK], [MORE])]
        assert [list(side.tools) for side in sides] == [TOOLS, TOOLS]

    @pytest.mark.parametrize("prompt", [None, [ASK], ASK["content"]], ids=["none", "messages", "text"])
    def test_whole_conversations_have_their_common_beginning_as_the_prompt(self, read_all, prompt):
        sides = read_all({"prompt": prompt, "chosen": [ASK, SAY], "rejected": [ASK, MORE]})
        assert [(list(side.prompt), list(side.completion)) for side in sides] == [([ASK], [SAY]), ([ASK], [MORE])]

    def test_the_common_beginning_goes_as_far_as_it_can_and_leaves_each_side_a_message(self, read_all):
        sides = read_all({"chosen": [ASK, SAY, ASK, MORE], "rejected": [ASK, SAY, ASK, SAY]})
        assert [len(side.prompt) for side in sides] == [3, 3]
        sides = read_all({"chosen": [ASK, SAY], "rejected": [ASK, SAY]})
        assert [(len(side.prompt), len(side.completion)) for side in sides] == [(1, 1), (1, 1)]

    def test_token_ids(self, read_all):
        sides = read_all(PAIR_OF_IDS)
        assert [side.completion.tolist() for side in sides] == [[3], [4, 5]]
        assert [side.prompt.tolist() for side in sides] == [[1, 2], [1, 2]]

    def test_a_completion_makes_a_record_one_rollout(self, read_all):
        (rollout,) = read_all({"prompt": "a", "completion": "b", "chosen": "c", "rejected": "d"})
        assert rollout.completion == "b"

    def test_a_pair_counts_before_messages_and_one_side_beside_messages_does_not(self, read_all):
        assert len(read_all({"messages": [ASK, SAY], "chosen": [ASK, SAY], "rejected": [ASK, MORE]})) == 2
        (rollout,) = read_all({"messages": [ASK, SAY], "rejected": False})
        assert list(rollout.completion) == [SAY]

    def test_columns_of_other_names(self, read_all):
        fields = {"prompt": "question", "chosen": "better"}
        sides = read_all({"question": "a", "better": "b", "rejected": "c", "messages": [ASK, SAY]}, fields)
        assert [(side.prompt, side.completion) for side in sides] == [("a", "b"), ("a", "c")]

    @pytest.mark.parametrize(
        ("record", "message"),
        [
            ({"prompt": "a", "chosen": "b"}, "rejected: expected the field that goes with `chosen`, got nothing"),
            ({"prompt": "a", "rejected": "b"}, "chosen: expected the field that goes with `rejected`, got nothing"),
            ({"chosen": "ab", "rejected": "ac"}, "prompt: expected the text before `chosen` and `rejected`, because"),
            ({"chosen": [SAY, SAY], "rejected": [MORE, SAY]}, "prompt: expected the messages before `chosen`"),
            (
                {"prompt": "else", "chosen": [ASK, SAY], "rejected": [ASK, MORE]},
                "prompt: expected messages, as `chosen` and `rejected` are, or the text of one with which both begin",
            ),
            ({"prompt": "a", "chosen": "", "rejected": "b"}, "chosen: expected text, got an empty text"),
            ({"prompt": "a", "chosen": "b", "rejected": [1]}, "rejected: expected text or a list of messages"),
            ({"prompt": "a", "chosen": "b", "rejected": [SAY]}, "rejected: expected text, as the prompt is"),
            (PAIR_OF_IDS | {"rejected_ids": None}, "rejected_ids: expected the field that goes with `chosen_ids`"),
            (PAIR_OF_IDS | {"prompt_ids": None}, "prompt_ids: expected the field that goes with `chosen_ids`"),
            (PAIR_OF_IDS | {"rejected_ids": []}, "rejected_ids: expected"),
            (PAIR_OF_IDS | {"completion_mask": [1]}, "completion_mask: expected none beside `chosen_ids`"),
            (PAIR_OF_IDS | {"candidates": [[1]]}, "candidates: expected none beside `chosen_ids`"),
        ],
    )
    def test_what_is_no_pair_names_the_field(self, read_all, record, message):
        with pytest.raises(FieldError, match=re.escape(message)):
            read_all(record)


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
    first, second = (row.rollouts()[0] for row in open_reader(str(tmp_path / "a.parquet")))
    assert (list(first.tools), list(second.tools)) == (TOOLS, others)
    assert list(first.completion) == TRACE[1:]
