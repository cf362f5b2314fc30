import pickle

import numpy as np
import pytest
import torch

from vhead import Rollout
from vhead.errors import FieldError
from vhead.rollouts.wording import named, shown

MESSAGES = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]


@pytest.mark.parametrize(
    "ids",
    [
        [3, 1, 2],
        (3, 1, 2),
        np.array([3, 1, 2], np.int32),
        np.array([3, 1, 2], np.uint16),
        torch.tensor([3, 1, 2]),
        torch.tensor([3, 9, 1, 9, 2], dtype=torch.int32)[::2],
    ],
    ids=["list", "tuple", "int32", "uint16", "torch", "strided"],
)
def test_token_ids_become_read_only_int64(ids):
    rollout = Rollout(ids, [5])
    assert rollout.prompt.tolist() == [3, 1, 2]
    assert rollout.prompt.dtype == np.int64
    assert rollout.kind == "token ids"
    with pytest.raises(ValueError, match="read-only"):
        rollout.prompt[0] = 1


def test_token_ids_are_copied():
    ids = np.array([3, 1, 2])
    rollout = Rollout(ids, ids)
    ids[0] = 77
    assert rollout.prompt[0] == 3


@pytest.mark.parametrize(
    ("prompt", "completion", "message"),
    [
        ("", "b", "prompt: expected text, got an empty text"),
        ("a", "", "completion: expected text, got an empty text"),
        ([], [1], "prompt: expected at least one token, got none"),
        ([1], np.empty(0, np.int64), "completion: expected at least one token, got none"),
        ([1], [[2, 3]], r"completion: expected token ids of shape \[N\], got shape \[1, 2\]"),
        ([1], [[2, 3], [4]], "completion: expected text or a flat list of integer token ids"),
        ([1, -4], [2], "prompt: expected token ids >= 0, got -4 at position 1"),
        ([1.0, 2.0], [2], r"prompt: expected text or a flat list .* got \[1.0, 2.0\] \(list\)"),
        ([True], [2], "prompt: expected text or a flat list"),
        ([2**70], [2], "prompt: expected text or a flat list"),
        (torch.tensor([0.5]), [2], "prompt: expected text or a flat list"),
        (None, "b", "prompt: expected text or a flat list of integer token ids, got nothing"),
        (b"ab", b"c", r"prompt: expected .* got b'ab' \(bytes\)"),
        ("a", [1], "completion: expected text, as the prompt is, got token ids"),
        ([1], "a", "completion: expected token ids, as the prompt is, got text"),
    ],
)
def test_bad_parts_are_named(prompt, completion, message):
    with pytest.raises(FieldError, match=message):
        Rollout(prompt, completion)


def test_errors_name_the_record():
    with pytest.raises(FieldError, match=r"^record 'r7': completion: expected") as caught:
        Rollout("a", "", id="r7")
    assert (caught.value.record, caught.value.field) == ("record 'r7'", "completion")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.expected, copy.got) == (str(caught.value), "text", "an empty text")


@pytest.mark.parametrize("name", ["a", 1, True, 1.5, None])
def test_ids_are_data(name):
    assert Rollout("a", "b", id=name).id is name


@pytest.mark.parametrize("name", [[1], b"a", {"a": 1}])
def test_what_cannot_be_an_id(name):
    with pytest.raises(FieldError, match="id: expected text, a number, a boolean or None"):
        Rollout("a", "b", id=name)


@pytest.mark.parametrize("ids", [[1, True], (False, 2), [np.bool_(1)], np.array([True]), torch.tensor([True])], ids=str)
def test_true_is_no_token_id(ids):
    with pytest.raises(FieldError, match="prompt: expected text or a flat list of integer token ids"):
        Rollout(ids, [1])


@pytest.mark.parametrize("ids", [[2**63], np.array([2**63], np.uint64), [2**70]], ids=str)
def test_a_token_id_beyond_63_bits_becomes_no_other(ids):
    with pytest.raises(FieldError, match="prompt: expected text or a flat list of integer token ids"):
        Rollout(ids, [1])


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("\ud800", "b"),
        ("a", "b\udfff"),
        ([{"role": "\ud800", "content": "a"}], [{"role": "assistant", "content": "b"}]),
        ([{"role": "user", "content": "a", "more": [{"\udc00": 1}]}], [{"role": "assistant", "content": "b"}]),
    ],
    ids=ascii,
)
def test_half_a_surrogate_pair_is_no_text(prompt, completion):
    with pytest.raises(FieldError, match="expected text that Unicode can hold, got half of a surrogate pair"):
        Rollout(prompt, completion)


def test_an_error_shows_the_beginning_of_what_is_large_or_deep():
    deep = 1
    for _ in range(5000):
        deep = [deep]
    for value in (deep, "a" * 10**7, [{"a": "b" * 10**6}] * 10**5, {str(i): i for i in range(10**5)}):
        assert len(shown(value)) < 100
    assert len(named("line 1", "a" * 10**7)) < 120


def test_messages():
    rollout = Rollout.from_messages(MESSAGES, id=4)
    assert rollout.kind == "messages"
    assert (rollout.prompt, rollout.completion, rollout.id) == ((MESSAGES[0],), (MESSAGES[1],), 4)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (MESSAGES[:1], "messages: expected a list of two messages or more"),
        ("text", "messages: expected a list of two messages or more"),
        (MESSAGES[::-1], "messages: expected a message for the assistant to answer before its first one, got none"),
        ([MESSAGES[0]] * 2, "messages: expected a message of the assistant's, got the roles 'user'"),
        ([*MESSAGES, {"role": "assistant"}], r"messages: expected messages with a text `role`.*at position 2"),
        ([MESSAGES[0], "Because."], r"messages: expected messages with a text `role`.*at position 1"),
    ],
)
def test_bad_messages_are_named(messages, message):
    with pytest.raises(FieldError, match=message):
        Rollout.from_messages(messages, id="chat")


def test_a_rollout_survives_pickling():
    copy = pickle.loads(pickle.dumps(Rollout([1, 2], [3], id=9)))
    assert (copy.prompt.tolist(), copy.completion.tolist(), copy.id) == ([1, 2], [3], 9)
