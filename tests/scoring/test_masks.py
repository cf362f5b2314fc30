"""Rollouts of which the model wrote some tokens only, heads with several outputs, and what is read besides."""

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.scoring.scoring_models import VOCABULARY, critic, reference
from vhead import AutoModelForCausalLMWithValueHead, Rollout, Scorer, Scores, ValueHead
from vhead.errors import FieldError, VheadError
from vhead.scoring import Conventions

TOLERANCE = 1e-4
TURN = 90


def merging_tokenizer():
    """Words, and a full stop with two line breaks behind it as a part of the word's token."""
    words = ["[UNK]", "One", " ", "is.\n\n", "Then", "two", "\n\n", "end", "Go."]
    tokenizer = Tokenizer(models.WordLevel(dict(zip(words, range(3, 3 + len(words)), strict=True)), unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[A-Za-z]+\.\n\n|[A-Za-z.]+|\n\n| "), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


@pytest.fixture(scope="module")
def model():
    return critic()


def traces(count=7, seed=0, candidates=None):
    """Rollouts of token ids whose completions are partly observations, some of them with a common beginning."""
    rng = np.random.default_rng(seed)
    prompt = rng.integers(3, TURN, 12)
    records = []
    for at in range(count):
        completion = rng.integers(3, TURN, int(rng.integers(2, 25)))
        completion[-1 if at % 2 else 0] = TURN
        mask = rng.random(len(completion)) < 0.5
        mask[int(rng.integers(len(mask)))] = True
        given = None if candidates is None else rng.integers(0, VOCABULARY, (len(completion), candidates))
        records.append(Rollout(prompt[: 12 - at % 3], completion, f"r{at}", mask=mask, candidates=given))
    return records


def test_observations_cost_no_logits_and_have_values(model):
    records = traces()
    seen = []
    scorer = Scorer(model, token_budget=100)
    assert scorer._engine.selects_rows
    statistics = scorer._engine._rule.lm_head.register_forward_hook(lambda _m, args, _o: seen.append(len(args[0])))
    scores = scorer.score(records, ["values", "logprobs", "entropy"])
    statistics.remove()
    assert sum(seen) == sum(int(record.mask.sum()) for record in records) < scores.token_count
    for record, score in zip(records, scores, strict=True):
        expected = reference(model, record)
        np.testing.assert_array_equal(score.mask, record.mask)
        np.testing.assert_allclose(score.values, expected["values"], atol=TOLERANCE)
        for name in ("logprobs", "entropy"):
            got = getattr(score, name)
            np.testing.assert_allclose(got[record.mask], expected[name][record.mask], atol=TOLERANCE)
            assert not got[~record.mask].any()


def test_a_trace_of_twenty_turns_in_one_pass_equals_turn_by_turn():
    model = critic(max_position_embeddings=512)
    rng = np.random.default_rng(6)
    prompt, turns = rng.integers(3, VOCABULARY, 11), rng.integers(3, VOCABULARY, (20, 2, 9))
    written = np.array([True] * 9 + [False] * 9)
    whole = Rollout(prompt, turns.reshape(-1), mask=np.tile(written, 20))
    scorer = Scorer(model)
    (score,) = scorer.score([whole], ["values", "logprobs", "entropy"])
    for at, (turn, observation) in enumerate(turns):
        before = np.concatenate([prompt, turns[:at].reshape(-1)])
        (alone,) = scorer.score([Rollout(before, turn)], ["values", "logprobs", "entropy"])
        for name in ("values", "logprobs", "entropy"):
            got = getattr(score, name)[18 * at : 18 * (at + 1)]
            np.testing.assert_allclose(got[written], getattr(alone, name), rtol=0, atol=1e-5)
        (read,) = scorer.score([Rollout(np.concatenate([before, turn]), observation)], ["values"])
        np.testing.assert_allclose(score.values[18 * at + 9 : 18 * (at + 1)], read.values, rtol=0, atol=1e-5)


def test_the_reward_is_read_at_the_last_token_that_the_model_wrote(model):
    record = Rollout([5, 6, 7], [8, 9, 10, 11, 12], mask=[True, False, True, False, False])
    (score,) = Scorer(model).score([record], ["reward", "bootstrap", "prompt_value", "values"])
    value = model(torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])).value[0].detach().numpy()
    assert score.reward == pytest.approx(value[5], abs=TOLERANCE)
    assert score.bootstrap == pytest.approx(value[7], abs=TOLERANCE)
    assert score.prompt_value == pytest.approx(value[2], abs=TOLERANCE)
    assert abs(value[5] - value[7]) > 100 * TOLERANCE


def test_padded_and_torch_forms_line_up_with_the_mask(model):
    scores = Scorer(model).score(traces(), ["values", "logprobs", "reward"])
    values, mask = scores.padded("values"), scores.padded("mask")
    assert values.shape == mask.shape == (len(scores), scores.token_counts.max())
    for row, written, score in zip(values, mask, scores, strict=True):
        np.testing.assert_array_equal(row[: len(score.values)], score.values)
        assert not row[len(score.values) :].any()
        np.testing.assert_array_equal(written[: len(score.mask)], score.mask)
    tensors = scores.to_torch()
    assert tensors["values"].data_ptr() == scores.values.ctypes.data
    assert tensors["mask"].dtype == torch.bool
    np.testing.assert_array_equal(scores.padded("reward"), scores.reward)


def test_slices_and_concat_keep_masks_and_steps(model):
    scores = Scorer(model).score(traces(), ["values", "steps"])
    again = Scores.concat([scores[:2], scores[2:2], scores[2:]])
    for name in ("mask", "offsets", "step_offsets"):
        np.testing.assert_array_equal(getattr(again, name), getattr(scores, name))
    for one, other in zip(again, scores, strict=True):
        np.testing.assert_array_equal(one.steps, other.steps)
        np.testing.assert_array_equal(one.step_positions, other.step_positions)


class TestSteps:
    def test_a_step_is_a_turn_where_there_is_no_separator(self, model):
        record = Rollout([5, 6], [7, 8, 9, 10, 11, 12], mask=[True, True, False, True, False, True])
        (score,) = Scorer(model).score([record], ["steps", "values", "bootstrap"])
        assert score.step_positions.tolist() == [1, 3, 5]
        assert score.steps.shape == (3, 1)
        after = np.append(score.values[1:], score.bootstrap)
        np.testing.assert_allclose(score.steps[:, 0], after[[1, 3, 5]], atol=1e-6)

    @pytest.mark.parametrize(("separator", "places"), [(9, [1, 4]), ((9, 10), [2]), ([10], [2])])
    def test_steps_end_at_the_separator_s_last_token(self, model, separator, places):
        conventions = Conventions(step_separator=separator)
        (score,) = Scorer(model, conventions=conventions).score([Rollout([9, 6], [7, 9, 10, 12, 9, 14])], ["steps"])
        assert score.step_positions.tolist() == places

    def test_a_separator_in_what_the_model_read_ends_no_step(self, model):
        rollout = Rollout([1], [4, 7, 5, 7, 7, 9], mask=[True, True, False, False, True, True])
        scorer = Scorer(model, conventions=Conventions(step_separator=7))
        (score,) = scorer.score([rollout], ["steps"])
        assert score.step_positions.tolist() == [1, 4]
        read_alone = Rollout([1], [4, 7], "read", mask=[True, False])
        with pytest.raises(FieldError, match="at least once among what the model wrote"):
            scorer.score([read_alone], ["steps"])

    def test_a_separator_of_text_is_found_in_longer_tokens(self, model):
        scorer = Scorer(model, tokenizer=merging_tokenizer(), conventions=Conventions(step_separator="\n\n"))
        rollout = Rollout("Go. ", "One is.\n\nThen two\n\nend")
        (score,) = scorer.score([rollout], ["steps", "tokens"])
        ends = [stop for _, stop in score.token_offsets[score.step_positions].tolist()]
        assert ends == [len("One is.\n\n"), len("One is.\n\nThen two\n\n")]
        assert len(set(score.token_ids[score.step_positions].tolist())) == 2

    def test_a_separator_that_never_occurs_is_that_record_s_error(self, model):
        scorer = Scorer(model, conventions=Conventions(step_separator=60))
        good, bad = Rollout([5], [60, 7], "good"), Rollout([60], [6, 7], "bad")
        with pytest.raises(
            FieldError, match=r"id 'bad'.*completion: expected the separator of steps, the tokens \[60\]"
        ):
            scorer.score([good, bad], ["steps"])
        errors = []
        assert [score.id for score in scorer.stream([bad, good], ["steps"], on_error=errors.append)] == ["good"]
        assert len(errors) == 1

    def test_a_separator_of_text_needs_a_tokenizer(self, model):
        with pytest.raises(VheadError, match="step_separator: expected token ids, because the scorer has no tokenizer"):
            Scorer(model, conventions=Conventions(step_separator="<extra_0>"))

    @pytest.mark.parametrize("separator", ["", [], -1, True, 1.5, [3, "x"]])
    def test_what_is_no_separator(self, separator):
        with pytest.raises(ValueError, match="step_separator: expected text, a token id, or several of them"):
            Conventions(step_separator=separator)

    def test_a_classifier_s_steps_are_probabilities(self, model):
        head = ValueHead(model.pretrained_model.config, num_outputs=2, activation="softmax", summary_dropout_prob=0.0)
        wide = AutoModelForCausalLMWithValueHead(model.pretrained_model)
        wide.v_head = head
        (score,) = Scorer(wide.eval()).score([Rollout([5, 6], [7, 8, 9])], ["steps", "bootstrap"])
        expected = torch.from_numpy(score.bootstrap).softmax(-1)
        np.testing.assert_allclose(score.steps[0], expected, atol=1e-6)
        assert abs(score.bootstrap.sum() - 1) > 1e-3


class TestSeveralOutputs:
    def heads(self, model, *outputs):
        config = model.pretrained_model.config
        return [
            ValueHead(config, num_outputs=count, summary_dropout_prob=0.0, v_head_init_strategy="normal").eval()
            for count in outputs
        ]

    def test_values_and_rewards_have_a_column_for_each(self, model):
        wide = AutoModelForCausalLMWithValueHead(model.pretrained_model)
        (wide.v_head,) = self.heads(model, 3)
        records = traces()
        scores = Scorer(wide.eval(), token_budget=64).score(records)
        assert scores.values.shape == (scores.token_count, 3)
        assert scores.reward.shape == (len(records), 3)
        for record, score in zip(records, scores, strict=True):
            tokens = torch.from_numpy(np.concatenate([record.prompt, record.completion]))[None]
            hidden = model.pretrained_model.model(tokens).last_hidden_state
            expected = wide.v_head(hidden)[0].detach().numpy()
            start = len(record.prompt)
            np.testing.assert_allclose(score.values, expected[start - 1 : -1], atol=TOLERANCE)
            last = start + np.flatnonzero(record.mask)[-1]
            np.testing.assert_allclose(score.reward, expected[last], atol=TOLERANCE)

    def test_several_heads_read_one_pass_and_each_gives_its_own_bits(self, model):
        one, two = self.heads(model, 1, 2)
        records = traces()
        together = Scorer(model, heads={"one": one, "two": two}).score(
            records, ["values", "reward", "logprobs", "steps"]
        )
        assert together.values.shape == (together.token_count, 3)
        assert together.heads == ("one", "two", "two")
        for name, head in (("one", one), ("two", two)):
            own = AutoModelForCausalLMWithValueHead(model.pretrained_model)
            own.v_head = head
            alone = Scorer(own.eval()).score(records, ["values", "reward", "logprobs", "steps"])
            for field in ("values", "reward", "logprobs", "steps"):
                np.testing.assert_array_equal(getattr(together.of(name), field), getattr(alone, field))
        with pytest.raises(ValueError, match="expected one of one, two, two, got 'three'"):
            together.of("three")

    def test_a_language_model_without_a_head_takes_some(self, model):
        (head,) = self.heads(model, 1)
        scores = Scorer(model.pretrained_model, heads={"only": head}).score(traces(2))
        assert scores.values.ndim == 1
        assert scores.heads == ("only",)
