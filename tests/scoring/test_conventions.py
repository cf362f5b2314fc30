"""Each convention against the rule as its framework defines it, on padded batches of that framework's shape."""

import numpy as np
import pytest
import torch

from tests.scoring.scoring_models import critic, reference, trees
from vhead import Rollout, Scorer
from vhead.errors import HeadError, VheadError
from vhead.scoring import Conventions
from vhead.scoring.fields import FIELDS

TOLERANCE = 1e-4
PAD = 0


@pytest.fixture(scope="module")
def model():
    model = critic()
    assert model.config.pad_token_id == PAD
    return model


@pytest.fixture(scope="module")
def records():
    """Some end with padding, some hold it in the middle, one is nothing else."""
    tails = [[], [PAD], [PAD, PAD, PAD], [PAD, 7, 8], [PAD, 9, PAD]]
    ended = [
        Rollout(r.prompt, np.r_[r.completion, t].astype(np.int64)) for r, t in zip(trees(), tails * 3, strict=False)
    ]
    return [*ended, Rollout([PAD, PAD], [PAD])]


@torch.no_grad()
def head_outputs(model, record):
    """The head's output after every token of one rollout alone, float32 `[S]`."""
    return model(torch.from_numpy(np.r_[record.prompt, record.completion])[None]).value[0].numpy()


def test_right_shift(model, records):
    """NeMo-RL: `values[t] = V(state before token t)`, column 0 is 0; log-probabilities are shifted alike."""
    scores = Scorer(model, conventions=Conventions(alignment="right_shift")).score(records, FIELDS)
    for record, score in zip(records, scores, strict=True):
        outputs = head_outputs(model, record)
        shifted = np.zeros_like(outputs)
        shifted[1:] = outputs[:-1]
        np.testing.assert_allclose(score.values, shifted, atol=TOLERANCE)
        whole = np.r_[record.prompt, record.completion]
        expected = reference(model, Rollout(whole[:1], whole[1:]))
        for name in ("logprobs", "entropy"):
            np.testing.assert_allclose(getattr(score, name), np.r_[0.0, expected[name]], atol=TOLERANCE)
        assert score.values[0] == score.logprobs[0] == score.entropy[0] == 0.0


def test_both_alignments_hold_the_same_numbers_for_completion_tokens(model, records):
    shifted = Scorer(model, conventions=Conventions(alignment="right_shift")).score(records, ["values"])
    aligned = Scorer(model).score(records, ["values"])
    assert aligned.token_count < shifted.token_count == sum(len(r.prompt) + len(r.completion) for r in records)
    for record, one, other in zip(records, aligned, shifted, strict=True):
        np.testing.assert_allclose(one.values, other.values[len(record.prompt) :], atol=TOLERANCE)


def sequence_classification(tokens, outputs):
    """transformers' sequence classification: the rightmost token that is not padding, index 0 where all are."""
    places = torch.arange(len(tokens)) * torch.from_numpy(tokens).ne(PAD)
    return outputs[int(places.argmax())]


def get_reward(tokens, outputs, context):
    """TRL's `get_reward`: the token before the first padding after the context."""
    is_pad = tokens[context:] == PAD
    first = int(is_pad.argmax()) if is_pad.any() else len(is_pad)
    return outputs[context + first - 1]


@pytest.mark.parametrize("pooling", ["last", "last_non_pad", "before_pad"])
def test_pooling(model, records, pooling):
    scores = Scorer(model, conventions=Conventions(pooling=pooling)).score(records, ["reward"])
    for record, score in zip(records, scores, strict=True):
        tokens, outputs = np.r_[record.prompt, record.completion], head_outputs(model, record)
        expected = {
            "last": outputs[-1],
            "last_non_pad": sequence_classification(tokens, outputs),
            "before_pad": get_reward(tokens, outputs, len(record.prompt)),
        }
        assert score.reward == pytest.approx(float(expected[pooling]), abs=TOLERANCE)


def test_the_poolings_differ_on_these_records(model, records):
    rewards = [
        Scorer(model, conventions=Conventions(pooling=pooling)).score(records, ["reward"]).reward
        for pooling in ("last", "last_non_pad", "before_pad")
    ]
    for one in range(3):
        for other in range(one):
            assert np.abs(rewards[one] - rewards[other]).max() > 100 * TOLERANCE


def test_padding_that_is_also_the_end_is_read_before(model):
    """The trap of transformers' rule: where `pad == eos` it reads the token before the end."""
    ends = critic(eos_token_id=PAD)
    record = Rollout([5, 6, 7], [8, 9, PAD])
    outputs = head_outputs(ends, record)
    rewards = [
        Scorer(ends, conventions=Conventions(pooling=pooling)).score([record], ["reward"]).reward[0]
        for pooling in ("last", "last_non_pad")
    ]
    np.testing.assert_allclose(rewards, [outputs[-1], outputs[-2]], atol=TOLERANCE)


def test_without_a_padding_token_the_last_token_is_read():
    model = critic(pad_token_id=None)
    scorer = Scorer(model, conventions=Conventions(pooling="last_non_pad"))
    assert scorer.score([Rollout([5], [6, PAD])], ["reward"]).reward[0] == pytest.approx(
        float(head_outputs(model, Rollout([5], [6, PAD]))[-1]), abs=TOLERANCE
    )


def test_normalised_rewards(model, records):
    """OpenRLHF: `reward = (reward - mean) / std`; values stay as they are."""
    plain = Scorer(model).score(records, ["values", "reward"])
    scores = Scorer(model, conventions=Conventions(reward_mean=0.7, reward_std=2.5)).score(
        records, ["values", "reward"]
    )
    np.testing.assert_allclose(scores.reward, (plain.reward - 0.7) / 2.5, rtol=1e-6)
    np.testing.assert_array_equal(scores.values, plain.values)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"alignment": "left_shift"}, "alignment: expected completion or right_shift, got 'left_shift'"),
        ({"pooling": "mean"}, "pooling: expected last or last_non_pad or before_pad, got 'mean'"),
        ({"reward_std": 0.0}, "reward_std: expected a positive number, got 0.0"),
        ({"reward_mean": float("nan")}, "reward_mean: expected a finite number, got nan"),
    ],
)
def test_wrong_conventions(wrong, message):
    with pytest.raises(ValueError, match=message):
        Conventions(**wrong)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_numbers_are_those_of_padded_batches_of_either_side(model, side):
    """What a trainer gets from one padded batch, sliced by its mask, is what the scorer gives."""
    records = trees()
    width = max(len(r.prompt) + len(r.completion) for r in records)
    tokens = torch.full((len(records), width), PAD)
    mask = torch.zeros_like(tokens)
    for row, record in enumerate(records):
        length = len(record.prompt) + len(record.completion)
        place = slice(width - length, width) if side == "left" else slice(0, length)
        tokens[row, place] = torch.from_numpy(np.r_[record.prompt, record.completion])
        mask[row, place] = 1
    values = model.values(tokens, attention_mask=mask)
    for row, (record, score) in enumerate(zip(records, Scorer(model).score(records, ["values"]), strict=True)):
        own = values[row][mask[row].bool()].numpy()
        np.testing.assert_allclose(score.values, own[len(record.prompt) - 1 : -1], atol=TOLERANCE)


class TestFromPretrained:
    def test_statistics_of_the_checkpoint(self, critic_folder, tmp_path):
        """OpenRLHF writes `mean` and `std` into the configuration."""
        model = critic(vocab_size=259, max_position_embeddings=128)
        model.config.mean, model.config.std = 1.25, 0.5
        model.config.value_head_prefix = "score"
        folder = tmp_path / "reward"
        model.pretrained_model.save_pretrained(folder)
        _write_score_head(folder, model)
        records = [Rollout([5, 6], [7, 8])]
        plain = Scorer.from_pretrained(folder, device="cpu").score(records, ["reward"]).reward
        normalised = Scorer.from_pretrained(folder, device="cpu", normalize_rewards=True)
        np.testing.assert_allclose(normalised.score(records, ["reward"]).reward, (plain - 1.25) / 0.5, rtol=1e-5)

    def test_a_checkpoint_without_statistics(self, critic_folder):
        with pytest.raises(HeadError, match="normalize_rewards needs the mean and std of rewards"):
            Scorer.from_pretrained(critic_folder, device="cpu", normalize_rewards=True)


def _write_score_head(folder, model):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["score.weight"] = model.v_head.summary.weight.detach().clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_by_default_a_checkpoint_without_a_language_model_head_gives_what_it_can_and_says_so_once(caplog):
    partial = critic(tie_word_embeddings=False)
    assert Scorer(partial).score(trees()).fields == ("values", "logprobs", "reward")
    assert caplog.messages == []
    partial.untrained = frozenset({"lm_head.weight"})
    scorer = Scorer(partial)
    assert scorer.default_returns == ("values", "reward")
    assert scorer.score(trees()).fields == next(scorer.chunks(trees())).fields == ("values", "reward")
    assert caplog.messages == ["the checkpoint holds no lm_head.weight, so the scores are only values, reward"]


def test_a_checkpoint_without_a_language_model_head_gives_values_and_rewards_only():
    partial = critic(tie_word_embeddings=False)
    partial.untrained = frozenset({"lm_head.weight"})
    scorer = Scorer(partial)
    assert scorer.score(trees(), ["values", "reward"]).fields == ("values", "reward")
    for fields in (["logprobs"], ["values", "entropy"]):
        with pytest.raises(VheadError, match=r"expected only what the head gives, .* holds no lm_head\.weight"):
            scorer.score(trees(), fields)
    partial.untrained = frozenset({"model.norm.weight"})
    assert Scorer(partial).score(trees(), ["logprobs"]).fields == ("logprobs",)
