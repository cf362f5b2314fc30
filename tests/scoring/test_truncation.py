"""Rollouts that are longer than they may be: refused, or cut at one end, which the scores then say."""

import io
import json

import numpy as np
import pyarrow as pa
import pytest

from tests.scoring.scoring_models import CONTEXT, critic, reference, worst
from vhead import Rollout, Scorer, Scores
from vhead.errors import FieldError, VheadError
from vhead.rollouts.encoding import LengthLimit
from vhead.rollouts.files.jsonl import JsonlReader
from vhead.scoring.fields import FIELDS
from vhead.scoring.files.jsonl import JsonlWriter

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model():
    return critic()


def tokens(count, seed):
    return np.random.default_rng(seed).integers(3, 97, count)


LONG = Rollout(tokens(60, 0), tokens(20, 1), id="long")
SHORT = Rollout(tokens(5, 2), tokens(4, 3), id="short")
KEPT = {
    "prompt": Rollout(LONG.prompt[60 + 20 - CONTEXT :], LONG.completion),
    "completion": Rollout(LONG.prompt, LONG.completion[: CONTEXT - 60]),
}


@pytest.mark.parametrize("truncation", ["prompt", "completion"])
def test_scores_are_those_of_what_is_kept(model, truncation):
    scores = Scorer(model, truncation=truncation).score([LONG, SHORT], FIELDS)
    assert worst(model, [KEPT[truncation], SHORT], scores) < TOLERANCE
    assert scores.truncated.tolist() == [True, False]
    assert [score.truncated for score in scores] == [True, False]
    assert scores.prompt_lengths.tolist() == [len(KEPT[truncation].prompt), 5]
    assert scores.token_counts.tolist() == [len(KEPT[truncation].completion), 4]


def test_the_two_ends_differ(model):
    """The comparison above would see the wrong end."""
    scores = Scorer(model, truncation="prompt").score([LONG], FIELDS)
    wrong = Rollout(LONG.prompt[: CONTEXT - 20], LONG.completion)
    assert np.abs(scores[0].values - reference(model, wrong)["values"]).max() > 100 * TOLERANCE


def test_the_length_can_be_less_than_the_context(model):
    scores = Scorer(model, truncation="prompt", max_length=8).score([SHORT], FIELDS)
    assert worst(model, [Rollout(SHORT.prompt[1:], SHORT.completion)], scores) < TOLERANCE
    with pytest.raises(FieldError, match=r"completion: expected at most 8 tokens together with the prompt, got 5 \+ 4"):
        Scorer(model, max_length=8).score([SHORT])


def test_one_token_of_each_part_may_stay(model):
    record = Rollout(tokens(30, 4), tokens(CONTEXT - 1, 5))
    scores = Scorer(model, truncation="prompt").score([record])
    assert scores.prompt_lengths.tolist() == [1]
    record = Rollout(tokens(CONTEXT - 1, 4), tokens(30, 5))
    assert Scorer(model, truncation="completion").score([record]).token_counts.tolist() == [1]


@pytest.mark.parametrize(
    ("truncation", "lengths", "message"),
    [
        (None, (60, 20), rf"completion: expected at most the model's {CONTEXT} tokens .*got 60 \+ 20 = 80"),
        ("prompt", (60, CONTEXT), "completion: expected at most 63 tokens, because only the prompt is trunc.*got 64"),
        ("completion", (CONTEXT, 5), "prompt: expected at most 63 tokens, because only the completion is .*got 64"),
    ],
)
def test_what_cannot_be_cut_is_named_and_harms_no_other(model, truncation, lengths, message):
    records = [SHORT, Rollout(tokens(lengths[0], 6), tokens(lengths[1], 7), id="bad"), LONG if truncation else SHORT]
    records[2] = Rollout(records[2].prompt, records[2].completion, id="last")
    scorer, errors = Scorer(model, truncation=truncation), []
    with pytest.raises(FieldError, match=rf"^record 1 \(id 'bad'\): {message}"):
        scorer.score(records)
    given = list(scorer.stream(records, on_error=errors.append))
    assert [score.id for score in given] == ["short", "last"]
    assert len(errors) == 1


def test_text_is_cut_by_tokens(critic_folder):
    scorer = Scorer.from_pretrained(critic_folder, device="cpu", truncation="prompt", max_length=6)
    scores = scorer.score([Rollout("abcdef", "xyz")])
    expected = scorer.score([Rollout([byte + 3 for byte in b"def"], [byte + 3 for byte in b"xyz"])])
    np.testing.assert_allclose(scores.values, expected.values, atol=1e-6)
    assert (scores.truncated.tolist(), expected.truncated.tolist()) == ([True], [False])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"truncation": "left"}, ValueError, "truncation: expected None, prompt or completion, got 'left'"),
        ({"max_length": 1}, ValueError, "max_length: expected at least 2"),
        ({"max_length": CONTEXT + 1}, VheadError, f"max_length: expected at most the model's {CONTEXT} tokens, got 65"),
    ],
)
def test_wrong_options(model, options, error, message):
    with pytest.raises(error, match=message):
        Scorer(model, **options)


def test_without_a_limit_nothing_is_cut():
    for truncation in (None, "prompt", "completion"):
        assert LengthLimit(None, truncation).kept(5000, 5000, "") == (0, 10000)


class TestColumn:
    @pytest.fixture
    def scores(self, model):
        return Scorer(model, truncation="completion").score([LONG, SHORT, Rollout(LONG.prompt, LONG.completion)])

    def test_it_is_there_only_where_the_scorer_truncates(self, model, scores):
        plain = Scorer(model).score([SHORT])
        assert plain.truncated is None
        assert plain[0].truncated is False
        assert plain.columns == ("values", "logprobs", "reward")
        assert "truncated" not in plain.to_arrow().column_names
        assert scores.columns == ("values", "logprobs", "reward", "truncated")

    def test_arrow(self, scores):
        column = scores.to_arrow().column("truncated")
        assert column.type == pa.bool_()
        assert column.to_pylist() == [True, False, True]

    def test_slices_and_concatenation_keep_it(self, scores, model):
        assert scores[1:].truncated.tolist() == [False, True]
        assert Scores.concat([scores[2:], scores[:2]]).truncated.tolist() == [True, True, False]
        with pytest.raises(ValueError, match="in each"):
            Scores.concat([scores, Scorer(model).score([SHORT])])

    def test_json(self, scores):
        stream = io.BytesIO()
        rows = list(JsonlReader(io.BytesIO(b'{"prompt": "a", "completion": "b"}\n' * 3)))
        writer = JsonlWriter(stream)
        held, _ = writer.held(rows, skips=False)
        writer.append(held, scores)
        assert [json.loads(line)["truncated"] for line in stream.getvalue().splitlines()] == [True, False, True]
