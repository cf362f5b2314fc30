"""What cannot be fitted is named in plain words: the record, the field, what was expected and what came."""

import pickle

import numpy as np
import pytest
import torch
from torch import nn

import vhead
from tests.fitting.examples import grouped, paired
from vhead import Rollout
from vhead.errors import FieldError, FitError, HeadError, RecordError
from vhead.fitting import fitting
from vhead.fitting.moments import FoldMoments
from vhead.fitting.ridge import fit_ridge


def rewards(count, seed=0):
    return np.random.default_rng(seed).normal(size=count).tolist()


def test_missing_targets(scorer):
    with pytest.raises(FitError, match=r"targets: expected one for each rollout with target='returns', got none"):
        vhead.fit(scorer, grouped())
    with pytest.raises(FieldError, match=r"record 1: targets: expected a return for each token .* got nothing"):
        vhead.fit(scorer, grouped(), [1.0, None, *rewards(54)])


@pytest.mark.parametrize("count", [0, 55, 57])
def test_targets_of_another_count_than_rollouts(scorer, count):
    with pytest.raises(FitError, match=r"targets: expected one for each of the rollouts, got"):
        vhead.fit(scorer, grouped(), rewards(count))


def test_returns_of_all_tokens_in_one_array(scorer):
    rollouts = grouped()
    returns = np.random.default_rng(0).normal(size=sum(len(rollout.completion) for rollout in rollouts))
    message = rf"got {len(returns):,} for 56 rollouts; what is said about tokens goes in one array a rollout"
    with pytest.raises(FitError, match=message):
        vhead.fit(scorer, rollouts, returns)


def test_weights_of_another_count_than_rollouts(scorer):
    with pytest.raises(FitError, match=r"weights: expected one for each of the rollouts, got only 3"):
        vhead.fit(scorer, grouped(), rewards(56), weights=[1.0] * 3)


@pytest.mark.parametrize("target", ["returns", "reward"])
def test_constant_targets(scorer, target):
    rollouts = grouped()
    with pytest.raises(FitError, match=r"targets: expected numbers that vary, got 0.25 everywhere"):
        vhead.fit(scorer, rollouts, [0.25] * len(rollouts), target=target)
    two = np.stack([rewards(56), np.full(56, 3.0)], axis=1)
    with pytest.raises(FitError, match=r"got 3 everywhere in output 1"):
        vhead.fit(scorer, rollouts, two, target="reward")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_targets_that_are_not_finite(scorer, bad):
    rollouts, values = grouped(), rewards(56)
    values[7] = bad
    with pytest.raises(
        FieldError, match=f"record 7: targets: expected finite numbers that float32 can hold, got {bad}"
    ):
        vhead.fit(scorer, rollouts, values)
    tokens = [np.zeros(len(rollout.completion)) for rollout in rollouts]
    tokens[3][1] = bad
    with pytest.raises(FieldError, match=f"record 3: targets: .* got {bad} at completion token 1"):
        vhead.fit(scorer, rollouts, tokens)


@pytest.mark.parametrize("target", ["returns", "reward"])
def test_targets_that_no_head_could_say(scorer, target):
    values, told = rewards(56), []
    values[7] = -1e39
    with pytest.raises(FieldError, match=r"record 7: targets: expected finite numbers that float32 can hold, got -1e"):
        vhead.fit(scorer, grouped(), values, target=target)
    vhead.fit(scorer, grouped(), values, target=target, on_error=told.append)
    assert len(told) == 1


def test_states_that_do_not_vary(scorer):
    rollouts = [Rollout([5, 6, 7 + place], [9]) for place in range(6)]
    expected = "rollouts: expected hidden states that vary, .*, got"
    with pytest.raises(FitError, match=f"{expected} both sides of each pair with the same ones"):
        vhead.fit(scorer, [(each, each) for each in rollouts], target="pairs")
    equal = np.ones((12, 4), np.float32)
    moments = FoldMoments(2, 4, 1, torch.device("cpu"))
    moments.add(equal, np.arange(12.0)[:, None], np.ones(12), np.arange(12) % 2)
    with pytest.raises(FitError, match=f"{expected} the same ones everywhere"):
        fit_ridge(moments, None)


def test_targets_of_another_length_than_the_completion(scorer):
    rollouts = grouped()
    tokens = [np.arange(len(rollout.completion) + (place == 5)) for place, rollout in enumerate(rollouts)]
    length = len(rollouts[5].completion)
    with pytest.raises(FieldError, match=f"record 5: targets: .* {length} tokens, got {length + 1}"):
        vhead.fit(scorer, rollouts, tokens)


def test_another_number_of_outputs_than_at_first(scorer):
    targets = [[1.0, 2.0], [1.0, 2.0, 3.0], *[[1.0, 2.0]] * 54]
    with pytest.raises(FieldError, match=r"record 1: targets: expected 2 numbers, as the first target has, got 3"):
        vhead.fit(scorer, grouped(), targets, target="reward")


@pytest.mark.parametrize("bad", ["high", [["a"]], {"reward": 1}, [[[1.0]]], []])
def test_targets_that_are_no_numbers(scorer, bad):
    with pytest.raises(FieldError, match=r"record 0: targets: expected a return for each token"):
        vhead.fit(scorer, grouped(), [bad, *rewards(55)])


@pytest.mark.parametrize("bad", [-1.0, float("nan"), "much", [1.0, -2.0]])
def test_weights_that_are_none(scorer, bad):
    with pytest.raises(FieldError, match=r"record 0: weights: expected a number, 0 or more"):
        vhead.fit(scorer, grouped(), rewards(56), weights=[bad, *[1.0] * 55])


def test_weights_of_zero_everywhere(scorer):
    for options in ({"target": "returns"}, {"target": "reward", "loss": "logistic"}, {"intermediate_size": 4}):
        outcomes = [float(place % 2) for place in range(56)]
        with pytest.raises(FitError, match=r"weights: expected some above 0 in each fold"):
            vhead.fit(scorer, grouped(), outcomes, weights=[0.0] * 56, **options)


def test_fewer_prompts_than_folds(scorer):
    with pytest.raises(FitError, match=r"at least 5 prompts, one for each fold, got 3 different prompts"):
        vhead.fit(scorer, grouped(3, 6), rewards(18))
    assert vhead.fit(scorer, grouped(3, 6), rewards(18), folds=3).rollouts == 18


def test_folds_that_rollouts_or_memory_are_too_few_for_are_refused_before_any_are_read(scorer):
    rollouts = grouped()
    message = "folds: expected rollouts of at least 1,000,000 prompts, one for each fold, got at most 56 different"
    with pytest.raises(FitError, match=message):
        vhead.fit(scorer, rollouts, rewards(56), folds=10**6)
    unread = iter(rollouts)
    message = r"folds: expected at most [\d,]+, for whose sums of [\d,]+ bytes each .* have room, got 1,000,000,000,000"
    for target in ("returns", "pairs"):
        with pytest.raises(FitError, match=message):
            vhead.fit(scorer, unread, None if target == "pairs" else rewards(56), target=target, folds=10**12)
    assert next(unread) is rollouts[0]


def test_as_many_folds_as_there_is_memory_for(scorer, monkeypatch):
    size = scorer.model.v_head.hidden_size
    monkeypatch.setattr(fitting, "_memory", lambda _device: 8 * size**2 * (3 + 4))
    assert vhead.fit(scorer, grouped(), rewards(56), folds=3).rollouts == 56
    with pytest.raises(FitError, match=f"folds: expected at most 3, for whose sums of {8 * size**2:,} bytes each"):
        vhead.fit(scorer, grouped(), rewards(56), folds=4)
    # Outcomes are fitted to from states on the disk, without sums.
    assert vhead.fit(scorer, paired(), target="pairs", folds=4).rollouts == 80


def test_a_pair_without_a_partner(scorer):
    flat = [side for pair in paired(8) for side in pair]
    with pytest.raises(FitError, match=r"expected pairs, .* got a last one without partner"):
        vhead.fit(scorer, flat[:-1], target="pairs")
    with pytest.raises(FieldError, match=r"record 0: rejected: expected a pair, .* got one rollout alone"):
        vhead.fit(scorer, [(flat[0],)], target="pairs")
    with pytest.raises(FieldError, match=r"record 0: rollout: expected a Rollout, got NoneType"):
        vhead.fit(scorer, [(flat[0], None)], target="pairs")


def test_a_pair_whose_sides_have_different_prompts(scorer):
    flat = [side for pair in paired(8) for side in pair]
    with pytest.raises(FieldError, match=r"record 2, rejected: prompt: expected the prompt of the chosen side"):
        vhead.fit(scorer, flat[:5] + flat[6:], target="pairs")


def test_targets_for_pairs(scorer):
    with pytest.raises(FitError, match=r"targets: expected none for pairs"):
        vhead.fit(scorer, paired(8), [1.0] * 8, target="pairs")


def test_pairs_where_one_completion_is_expected(scorer):
    with pytest.raises(FieldError, match=r"record 0: .* expected a Rollout, got tuple"):
        vhead.fit(scorer, paired(8), rewards(8), target="reward")


@pytest.mark.parametrize("target", ["returns", "reward", "pairs"])
def test_no_rollouts(scorer, target):
    with pytest.raises(FitError, match=r"rollouts: expected at least one to fit to, got none"):
        vhead.fit(scorer, [], None if target == "pairs" else [], target=target)


def test_outcomes_other_than_0_and_1(scorer):
    with pytest.raises(FitError, match=r"targets: expected 0 and 1 for the logistic loss, got 0.5"):
        vhead.fit(scorer, grouped(), [0.0, 1.0, 0.5, *[1.0] * 53], target="reward", loss="logistic")


def test_states_for_which_there_is_no_room(scorer):
    with pytest.raises(FitError, match=r"cache_bytes: expected at most 1,000 bytes .* \(--cache-gb\)"):
        vhead.fit(scorer, grouped(), rewards(56), intermediate_size=4, cache_bytes=1000)


def test_a_strength_of_0_for_states_that_depend_on_each_other(scorer):
    rollouts = grouped(6, 1)
    with pytest.raises(FitError, match=r"strengths: expected one that is large enough for hidden states that depend"):
        vhead.fit(scorer, rollouts, rewards(6), target="reward", strengths=0.0)


OPTIONS = {
    "target": ({"target": "values"}, "target: expected one of returns, reward, pairs, got 'values'"),
    "gamma": ({"gamma": 1.5}, "gamma: expected a number in"),
    "gamma of rewards": ({"target": "reward", "gamma": 0.9}, "gamma: expected none with target='reward', as only"),
    "loss": ({"target": "reward", "loss": "hinge"}, "loss: expected None, squared or logistic, got 'hinge'"),
    "loss of returns": ({"loss": "logistic"}, "loss: expected squared for target='returns', got logistic"),
    "folds": ({"folds": 1}, "folds: expected a whole number from 2 on, got 1"),
    "size": ({"intermediate_size": 0}, "intermediate_size: expected a whole number from 1 on, got 0"),
    "strengths": ({"strengths": [1.0, -1.0]}, "strengths: expected finite numbers, 0 or more"),
    "no strengths": ({"strengths": []}, "strengths: expected finite numbers, 0 or more"),
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_options_out_of_range(scorer, kind):
    options, message = OPTIONS[kind]
    with pytest.raises(ValueError, match=message):
        vhead.fit(scorer, grouped(), rewards(56), **options)


@pytest.mark.parametrize("model", [nn.Linear(3, 3), "critic", None])
def test_something_else_than_a_model(model):
    with pytest.raises(HeadError, match=r"scorer_or_model: expected a Scorer or a language model, got a"):
        vhead.fit(model, grouped(), rewards(56))


def test_what_cannot_be_used_is_left_out_when_somebody_is_told(scorer):
    rollouts, values = grouped(), [np.random.default_rng(8).normal(size=len(r.completion)) for r in grouped()]
    bad = {4: None, 9: np.zeros(99), 20: np.full(len(rollouts[20].completion), np.nan)}
    told: list[RecordError] = []
    given = [bad.get(place, value) for place, value in enumerate(values)]
    fitted = vhead.fit(scorer, rollouts, given, strengths=0.5, on_error=told.append)
    assert sorted(str(error).split(":")[0] for error in told) == ["record 20", "record 4", "record 9"]
    good = [place for place in range(56) if place not in bad]
    alone = vhead.fit(scorer, [rollouts[at] for at in good], [values[at] for at in good], strengths=0.5)
    assert fitted.rollouts == 53
    assert torch.allclose(fitted.head.weight, alone.head.weight, rtol=1e-4, atol=1e-6)


def test_states_that_are_not_finite_are_named_by_their_rollout(model):
    rollouts = grouped()
    weight = model.pretrained_model.get_input_embeddings().weight
    kept = weight[2].clone()
    try:
        with torch.no_grad():
            weight[2] = torch.nan
        rollouts[6] = Rollout(rollouts[6].prompt, [2, *rollouts[6].completion])
        with pytest.raises(FieldError, match=r"record 6: values: expected finite numbers from the model"):
            vhead.fit(model, rollouts, rewards(56))
    finally:
        with torch.no_grad():
            weight[2] = kept


def test_the_error_can_be_pickled():
    assert str(pickle.loads(pickle.dumps(FitError("folds: expected more")))) == "folds: expected more"
