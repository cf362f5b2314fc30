import pickle

import numpy as np
import pytest
import torch

from vhead import Rollout
from vhead.errors import FieldError

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
    copy = pickle.loads(pickle.dumps(caught.value))  # noqa: S301, our own bytes
    assert (str(copy), copy.expected, copy.got) == (str(caught.value), "text", "an empty text")


@pytest.mark.parametrize("name", [True, 1.5, [1]])
def test_ids_are_text_or_integers(name):
    with pytest.raises(FieldError, match="id: expected text, an integer or None"):
        Rollout("a", "b", id=name)


def test_messages():
    rollout = Rollout.from_messages(MESSAGES, id=4)
    assert rollout.kind == "messages"
    assert (rollout.prompt, rollout.completion, rollout.id) == ((MESSAGES[0],), (MESSAGES[1],), 4)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (MESSAGES[:1], "messages: expected a list of two messages or more"),
        ("text", "messages: expected a list of two messages or more"),
        (MESSAGES[::-1], "messages: expected the assistant's as the last message, got role 'user'"),
        ([*MESSAGES, {"role": "assistant"}], r"messages: expected messages with a text `role`.*at position 2"),
        ([MESSAGES[0], "Because."], r"messages: expected messages with a text `role`.*at position 1"),
    ],
)
def test_bad_messages_are_named(messages, message):
    with pytest.raises(FieldError, match=message):
        Rollout.from_messages(messages, id="chat")


def test_a_rollout_survives_pickling():
    copy = pickle.loads(pickle.dumps(Rollout([1, 2], [3], id=9)))  # noqa: S301, our own bytes
    assert (copy.prompt.tolist(), copy.completion.tolist(), copy.id) == ([1, 2], [3], 9)
