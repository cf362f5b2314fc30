"""Which tokens of a completion are the model's, and for which ids log-probabilities are wanted."""

import pickle

import numpy as np
import pytest
import torch

from vhead import Rollout
from vhead.errors import FieldError
from vhead.rollouts.encoding import Encoder, LengthLimit

VOCABULARY = 50
MESSAGES = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]


def encode(rollout, **limit):
    return Encoder(None, VOCABULARY, LengthLimit(**({"tokens": None} | limit))).encode(0, rollout, "record 0")


@pytest.mark.parametrize(
    "mask",
    [[True, False, True], (True, False, True), np.array([1, 0, 1], bool), torch.tensor([True, False, True])],
    ids=["list", "tuple", "numpy", "torch"],
)
def test_masks_become_read_only_arrays(mask):
    rollout = Rollout([1], [2, 3, 4], mask=mask)
    assert rollout.mask.dtype == np.bool_
    assert rollout.mask.tolist() == [True, False, True]
    with pytest.raises(ValueError, match="read-only"):
        rollout.mask[0] = False
    assert encode(rollout).mask.tolist() == [True, False, True]


def test_masks_are_copied():
    mask = np.array([True, False])
    rollout = Rollout([1], [2, 3], mask=mask)
    mask[:] = False
    assert rollout.mask.tolist() == [True, False]


def test_without_a_mask_every_token_is_the_model_s():
    assert encode(Rollout([1], [2, 3])).mask is None


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([True], "mask: expected one boolean for each of the completion's 3 tokens, got 1"),
        ([], "mask: expected one boolean for each of the completion's 3 tokens, got 0"),
        ([True] * 4, "mask: expected one boolean for each of the completion's 3 tokens, got 4"),
        ([False] * 3, "mask: expected at least one True, where the model wrote a token, got none"),
        ([1, 0, 1], r"mask: expected a flat list of booleans.* got \[1, 0, 1\] \(list\)"),
        ([True, 0, 1], "mask: expected a flat list of booleans"),
        (np.array([1, 0, 1]), "mask: expected a flat list of booleans"),
        ([True, float("nan"), True], "mask: expected a flat list of booleans"),
        (np.array([1.0, np.nan, 0.0]), "mask: expected a flat list of booleans"),
        ([True, None, True], "mask: expected a flat list of booleans"),
        ([[True, False, True]], "mask: expected a flat list of booleans"),
        ([[True], [False, True], True], "mask: expected a flat list of booleans"),
        (np.ma.MaskedArray([True, False, True]), "mask: expected a flat list of booleans"),
        ("101", "mask: expected a flat list of booleans"),
        (True, "mask: expected a flat list of booleans"),
    ],
    ids=str,
)
def test_what_is_no_mask_of_the_completion(mask, message):
    with pytest.raises(FieldError, match=f"^record 'r': {message}"):
        Rollout([1], [2, 3, 4], id="r", mask=mask)


@pytest.mark.parametrize(
    "candidates",
    [[[4, 5], [6, 7]], ((4, 5), (6, 7)), np.array([[4, 5], [6, 7]], np.uint16), torch.tensor([[4, 5], [6, 7]])],
    ids=["list", "tuple", "numpy", "torch"],
)
def test_candidates_become_read_only_int64(candidates):
    rollout = Rollout([1], [2, 3], candidates=candidates)
    assert rollout.candidates.dtype == np.int64
    assert rollout.candidates.tolist() == [[4, 5], [6, 7]]
    with pytest.raises(ValueError, match="read-only"):
        rollout.candidates[0, 0] = 9
    assert encode(rollout).candidates.tolist() == [[4, 5], [6, 7]]


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        (
            [[1, 2], [3]],
            "candidates: expected as many candidates for every token as for the first, 2, got 1 at ",
        ),
        (
            [[1], [2, 3]],
            "candidates: expected as many candidates for every token as for the first, 1, got 2 at ",
        ),
        ([[1, 2]], r"candidates: expected .* shape \[2, M\] with M >= 1, got shape \[1, 2\]"),
        (np.empty((2, 0), int), r"candidates: expected .* shape \[2, M\] with M >= 1, got shape \[2, 0\]"),
        ([1, 2], r"candidates: expected .* shape \[2, M\] with M >= 1, got shape \[2\]"),
        ([[[1]], [[2]]], r"candidates: expected .* got shape \[2, 1, 1\]"),
        ([], r"candidates: expected .* got shape \[0\]"),
        ([[1, 2], [3, -4]], "candidates: expected token ids >= 0, got -4 at position 1"),
        ([[1, 2], [3, True]], "candidates: expected a list of integer token ids for each"),
        ([[1, 2], [3, 0.5]], "candidates: expected a list of integer token ids for each"),
        ([[1, 2], [3, None]], "candidates: expected a list of integer token ids for each"),
        ([[1, 2], [3, 2**63]], "candidates: expected a list of integer token ids for each"),
        ([[], []], "candidates: expected a list of integer token ids for each"),
        ("12", "candidates: expected a list of integer token ids for each"),
    ],
    ids=str,
)
def test_what_are_no_candidates_of_the_completion(candidates, message):
    with pytest.raises(FieldError, match=f"^record 'r': {message}"):
        Rollout([1], [2, 3], id="r", candidates=candidates)


def test_candidates_beyond_the_vocabulary_name_the_position():
    rollout = Rollout([1], [2, 3], candidates=[[4, 49], [50, 6]])
    expected = "candidates: expected token ids below the vocabulary's 50, got 50 at position 1"
    with pytest.raises(FieldError, match=expected):
        encode(rollout)


@pytest.mark.parametrize("parts", [("a", "b"), (MESSAGES[:1], MESSAGES[1:])], ids=["text", "messages"])
@pytest.mark.parametrize("name", ["mask", "candidates"])
def test_they_go_with_token_ids_only(parts, name):
    with pytest.raises(FieldError, match=f"{name}: expected none, as it goes with token ids, got one beside"):
        Rollout(*parts, **{name: [[1]] if name == "candidates" else [True]})


@pytest.mark.parametrize("parts", [("a", "b"), ([1], [2])], ids=["text", "token ids"])
def test_tools_go_with_messages_only(parts):
    with pytest.raises(FieldError, match="tools: expected none, as it goes with messages, got one beside"):
        Rollout(*parts, tools=[{"type": "function"}])


@pytest.mark.parametrize("tools", ["[]", {"type": "function"}, ["add"], 3], ids=str)
def test_what_are_no_tools(tools):
    with pytest.raises(FieldError, match="tools: expected a list of function schemas"):
        Rollout(MESSAGES[:1], MESSAGES[1:], tools=tools)


def test_half_a_surrogate_pair_among_the_tools():
    with pytest.raises(FieldError, match="tools: expected text that Unicode can hold"):
        Rollout(MESSAGES[:1], MESSAGES[1:], tools=[{"name": "\ud800"}])


class TestTruncated:
    ROLLOUT = Rollout([1, 2, 3], [4, 5, 6, 7], mask=[False, True, False, True], candidates=[[8], [9], [10], [11]])

    def test_a_shorter_prompt_leaves_them(self):
        encoded = encode(self.ROLLOUT, tokens=5, truncation="prompt")
        assert encoded.tokens.tolist() == [3, 4, 5, 6, 7]
        assert encoded.mask.tolist() == [False, True, False, True]
        assert encoded.candidates.tolist() == [[8], [9], [10], [11]]

    def test_a_shorter_completion_cuts_them_alike(self):
        encoded = encode(self.ROLLOUT, tokens=5, truncation="completion")
        assert encoded.tokens.tolist() == [1, 2, 3, 4, 5]
        assert encoded.mask.tolist() == [False, True]
        assert encoded.candidates.tolist() == [[8], [9]]

    def test_none_of_the_model_s_tokens_left_is_an_error(self):
        with pytest.raises(FieldError, match="completion: expected a token of the model's among the 1 that stay when"):
            encode(self.ROLLOUT, tokens=4, truncation="completion")


def test_they_survive_pickling():
    copy = pickle.loads(pickle.dumps(Rollout([1], [2, 3], mask=[True, False], candidates=[[4], [5]])))
    assert copy.mask.tolist() == [True, False]
    assert copy.candidates.tolist() == [[4], [5]]
