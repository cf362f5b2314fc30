"""Linear heads by ridge regression: scikit-learn's numbers on the same states, chosen on held-out prompts."""

import numpy as np
import pytest
import torch

import vhead
from tests.fitting.examples import grouped, last_state, relative, token_states
from tests.scoring.scoring_models import critic
from vhead import Scorer, formats, returns
from vhead.fitting.folds import Folds, prompt_digest
from vhead.fitting.moments import FoldMoments, gram
from vhead.fitting.ridge import fit_ridge, solved
from vhead.scoring import Conventions

Ridge = pytest.importorskip("sklearn.linear_model").Ridge

# Of coefficients, relative to scikit-learn's.
TOLERANCE = 1e-6


def data(rows=3000, width=24, outputs=1, seed=0, condition=1.0):
    """States whose columns differ in size and lie far from 0, targets that depend on them, and groups."""
    rng = np.random.default_rng(seed)
    scales = np.geomspace(1.0, 1.0 / condition, width)
    states = (rng.normal(size=(rows, width)) * scales + 30.0 * rng.normal(size=width)).astype(np.float32)
    true = rng.normal(size=(width, outputs)) / scales[:, None] / np.sqrt(width)
    targets = 5.0 + states.astype(np.float64) @ true + rng.normal(size=(rows, outputs))
    return states, targets, rng.integers(0, 5, rows)


def added(states, targets, folds, weights=None, pieces=1):
    moments = FoldMoments(5, states.shape[1], targets.shape[1], torch.device("cpu"))
    weights = np.ones(len(states)) if weights is None else weights
    for part in np.array_split(np.arange(len(states)), pieces):
        moments.add(states[part], targets[part], weights[part], folds[part])
    return moments


@pytest.mark.parametrize("condition", [1.0, 1e4])
@pytest.mark.parametrize("outputs", [1, 3])
def test_coefficients_are_those_of_scikit_learn(condition, outputs):
    states, targets, folds = data(outputs=outputs, condition=condition)
    solution = fit_ridge(added(states, targets, folds, pieces=7), (0.3,))
    twin = Ridge(0.3).fit(states.astype(np.float64), targets)
    ((weight, bias),) = solution.layers
    assert relative(weight, twin.coef_) < TOLERANCE * 1e-2
    assert relative(bias, twin.intercept_) < TOLERANCE
    other = Ridge(0.4).fit(states.astype(np.float64), targets)
    assert relative(weight, other.coef_) > TOLERANCE


def test_sums_in_float32_would_miss_scikit_learn_s_coefficients():
    states, targets, _ = data(condition=1e4)
    x, y = states - states.mean(0), targets - targets.mean(0)
    weight = solved(torch.from_numpy((x.T @ x).astype(np.float64)), torch.from_numpy(x.T @ y), 0.3)
    assert relative(weight, Ridge(0.3).fit(states.astype(np.float64), targets).coef_) > TOLERANCE


def test_weights_count_like_repeated_rows():
    states, targets, folds = data(rows=800)
    weights = np.random.default_rng(1).integers(0, 4, len(states))
    weighted = fit_ridge(added(states, targets, folds, weights.astype(np.float64)), (2.0, 20.0))
    repeated = [np.repeat(array, weights, axis=0) for array in (states, targets, folds)]
    plain = fit_ridge(added(*repeated), (2.0, 20.0))
    assert relative(weighted.layers[0][0], plain.layers[0][0]) < 1e-9
    assert weighted.figures["explained_variance"] == pytest.approx(plain.figures["explained_variance"], abs=1e-9)
    twin = Ridge(weighted.strengths[0]).fit(states.astype(np.float64), targets, sample_weight=weights)
    assert relative(weighted.layers[0][0], twin.coef_) < TOLERANCE * 1e-2


def test_figures_are_those_of_heads_that_never_saw_the_prompts():
    states, targets, folds = data(rows=400)
    solution = fit_ridge(added(states, targets, folds), (40.0,))
    predictions = np.empty_like(targets)
    for fold in range(5):
        twin = Ridge(40.0).fit(states[folds != fold].astype(np.float64), targets[folds != fold])
        predictions[folds == fold] = twin.predict(states[folds == fold]).reshape(-1, 1)
    errors = targets - predictions
    slope, intercept = np.polyfit(predictions[:, 0], targets[:, 0], 1)
    assert solution.figures["explained_variance"][0] == pytest.approx(1 - errors.var() / targets.var(), abs=1e-9)
    assert solution.figures["mean_squared_error"][0] == pytest.approx((errors**2).mean(), rel=1e-9)
    assert solution.figures["calibration_slope"][0] == pytest.approx(slope, rel=1e-8)
    assert solution.figures["calibration_intercept"][0] == pytest.approx(intercept, abs=1e-6)
    seen = Ridge(40.0).fit(states.astype(np.float64), targets)
    own = targets - seen.predict(states.astype(np.float64)).reshape(-1, 1)
    assert (own**2).mean() < solution.figures["mean_squared_error"][0]


def test_the_strength_is_the_one_that_does_best_on_held_out_prompts():
    states, targets, folds = data(rows=60, width=40)
    strengths = (1e-6, 1.0, 10.0, 100.0, 1e7)

    def error(strength):
        total = 0.0
        for fold in range(5):
            twin = Ridge(strength).fit(states[folds != fold].astype(np.float64), targets[folds != fold])
            total += ((targets[folds == fold] - twin.predict(states[folds == fold]).reshape(-1, 1)) ** 2).sum()
        return total

    best = min(strengths, key=error)
    assert fit_ridge(added(states, targets, folds), strengths).strengths == (best,)
    assert best not in (strengths[0], strengths[-1])


def test_the_default_strengths_do_not_depend_on_the_unit_of_the_states():
    states, targets, folds = data(rows=300)
    one = fit_ridge(added(states, targets, folds), None)
    other = fit_ridge(added(states * 64, targets, folds), None)
    assert relative(one.layers[0][0], other.layers[0][0] * 64) < 1e-9


@pytest.mark.parametrize("noise", [0.01, 3.0, 100.0, 1e5])
def test_the_default_strength_is_the_best_of_the_whole_range(noise):
    rng = np.random.default_rng(7)
    states, targets, folds = data(rows=80, width=40, condition=1e3, outputs=2)
    targets = targets + noise * rng.normal(size=targets.shape)
    moments = added(states, targets, folds)
    scale = moments.total().centred()[0].diagonal().mean().item()
    everywhere = fit_ridge(moments, [scale * 10.0**exponent for exponent in range(-9, 3)])
    assert fit_ridge(moments, None).strengths == everywhere.strengths


def test_the_gram_matrix_is_a_whole_one():
    rows = torch.randn(50, 9, dtype=torch.float64)
    assert torch.allclose(gram(rows), rows.T @ rows, rtol=1e-13)


@pytest.mark.parametrize("masked", [False, True])
def test_returns_of_the_model_s_tokens_are_fitted(model, scorer, masked):
    rollouts = grouped(masked=masked)
    rng = np.random.default_rng(3)
    given = [rng.normal(size=len(rollout.completion)) for rollout in rollouts]
    fitted = vhead.fit(scorer, rollouts, given, target="returns", strengths=0.5)
    states = np.concatenate([token_states(model, rollout) for rollout in rollouts])
    own = [t if r.mask is None else t[r.mask] for t, r in zip(given, rollouts, strict=True)]
    twin = Ridge(0.5).fit(states, np.concatenate(own))
    assert fitted.tokens == len(states)
    # The states themselves differ by what batching does to float32.
    assert relative(fitted.head.weight, twin.coef_) < 1e-5
    assert fitted.head.bias.item() == pytest.approx(twin.intercept_, abs=1e-5)
    if masked:
        everywhere = np.concatenate([token_states(model, vhead.Rollout(r.prompt, r.completion)) for r in rollouts])
        assert relative(fitted.head.weight, Ridge(0.5).fit(everywhere, np.concatenate(given)).coef_) > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_targets_of_any_dtype_are_read(scorer, dtype):
    rollouts, generator = grouped(), torch.Generator().manual_seed(2)
    targets = [torch.randn(len(each.completion), generator=generator).to(dtype) for each in rollouts]
    found = vhead.fit(scorer, rollouts, [target.requires_grad_() for target in targets])
    expected = vhead.fit(scorer, rollouts, [target.detach().double().numpy() for target in targets])
    assert torch.equal(found.head.weight, expected.head.weight)


def test_what_a_target_says_of_observations_is_not_read(scorer):
    rollouts = grouped(masked=True)
    rng = np.random.default_rng(3)
    given = [rng.normal(size=len(rollout.completion)) for rollout in rollouts]
    blank = [np.where(r.mask, t, np.nan) for t, r in zip(given, rollouts, strict=True)]
    one, other = (vhead.fit(scorer, rollouts, each, strengths=0.5) for each in (given, blank))
    assert torch.equal(one.head.weight, other.head.weight)


def test_a_reward_becomes_discounted_returns(scorer):
    rollouts = grouped(masked=True)
    rewards = np.random.default_rng(4).normal(size=len(rollouts))
    given = []
    for rollout, reward in zip(rollouts, rewards, strict=True):
        placed = returns.token_rewards(np.float32([reward]), mask=rollout.mask[None])
        given.append(returns.discounted(placed, gamma=0.9, mask=rollout.mask[None])[0])
    by_reward = vhead.fit(scorer, rollouts, rewards, gamma=0.9, strengths=0.5)
    assert "strength=0.5" in repr(by_reward)
    assert "tensor" not in repr(by_reward)
    by_token = vhead.fit(scorer, rollouts, given, strengths=0.5)
    assert torch.equal(by_reward.head.weight, by_token.head.weight)
    assert not torch.equal(by_reward.head.weight, vhead.fit(scorer, rollouts, rewards, strengths=0.5).head.weight)


def test_rewards_are_fitted_at_the_last_token_of_the_model_s(model, scorer):
    rollouts = grouped(masked=True)
    rewards = np.random.default_rng(5).normal(size=(len(rollouts), 2))
    fitted = vhead.fit(scorer, rollouts, rewards, target="reward", strengths=0.5)
    states = np.stack([last_state(model, rollout) for rollout in rollouts])
    twin = Ridge(0.5).fit(states, rewards)
    assert fitted.loss == "squared"
    assert relative(fitted.head.weight, twin.coef_) < 1e-5
    assert len(fitted.metrics["explained_variance"]) == len(fitted.strength) == 2


def test_a_fitted_head_gives_its_predictions_when_it_scores(model, scorer, tmp_path):
    rollouts = grouped()
    rewards = [float(np.mean(rollout.completion)) for rollout in rollouts]
    fitted = vhead.fit(scorer, rollouts, rewards, target="reward", strengths=1e-3)
    path = formats.save(fitted.head, tmp_path / "head.safetensors")
    critic_with_it = critic()
    critic_with_it.v_head.load(formats.load(path))
    found = Scorer(critic_with_it).score(rollouts, ("reward",)).reward
    states = np.stack([last_state(model, rollout) for rollout in rollouts])
    twin = Ridge(1e-3).fit(states, rewards)
    assert np.abs(found - twin.predict(states)).max() < 1e-2 * np.std(rewards)


def test_a_model_alone_is_enough_and_stays_as_it_is(model, scorer):
    rollouts, before = grouped(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rewards = np.random.default_rng(6).normal(size=len(rollouts))
    by_scorer = vhead.fit(scorer, rollouts, rewards, strengths=0.5)
    for other in (model, model.pretrained_model):
        assert torch.equal(vhead.fit(other, rollouts, rewards, strengths=0.5).head.weight, by_scorer.head.weight)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_neither_the_old_head_nor_logits_are_computed(model, scorer):
    calls = []
    handles = [
        module.register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
        for module in (model.v_head, model.pretrained_model.get_output_embeddings())
    ]
    try:
        vhead.fit(scorer, grouped(), [1.0, 2.0] * 28)
        assert calls == []
        scorer.score(grouped()[:2], ("values",))
        assert calls == ["ValueHead"]
    finally:
        for handle in handles:
            handle.remove()


def test_conventions_of_alignment_and_normalisation_do_not_bend_the_states(model, scorer):
    rollouts, rewards = grouped(), np.random.default_rng(6).normal(size=56)
    conventions = Conventions(alignment="right_shift", reward_mean=3.0, reward_std=7.0)
    other = Scorer(model, conventions=conventions)
    for target in ("returns", "reward"):
        one, same = (vhead.fit(each, rollouts, rewards, target=target, strengths=0.5) for each in (scorer, other))
        assert torch.equal(one.head.weight, same.head.weight)


def test_all_rollouts_of_a_prompt_are_in_one_fold():
    rollouts = grouped(40, 3)
    folds = Folds(5)
    found = [(prompt_digest(rollout), folds.fold(prompt_digest(rollout))) for rollout in rollouts]
    assert len(set(found)) == len({digest for digest, _ in found}) == 40
    assert {fold for _, fold in found} == set(range(5))
    again = Folds(5, folds.first)
    assert [again.fold(digest) for digest, _ in found] == [fold for _, fold in found]


def test_digests_of_prompts_are_the_same_on_every_machine():
    assert prompt_digest(vhead.Rollout([1, 2], [3])) == "5ffd8db4ee46b2cc"
    assert prompt_digest(vhead.Rollout("[1, 2]", "c")) != prompt_digest(vhead.Rollout([1, 2], [3]))


def test_prompts_that_are_torn_apart_look_better_than_they_are(scorer, monkeypatch):
    # Targets that say which prompt it is, and nothing else; what follows it is one token.
    rollouts = [vhead.Rollout(r.prompt, r.completion[:1]) for r in grouped(12, 8)]
    numbers = {}
    for rollout in rollouts:
        numbers.setdefault(prompt_digest(rollout), np.random.default_rng(len(numbers)).normal())
    targets = [numbers[prompt_digest(rollout)] for rollout in rollouts]
    whole = vhead.fit(scorer, rollouts, targets).metrics["explained_variance"]
    places = iter(range(len(rollouts)))
    keep = Folds.fold
    monkeypatch.setattr(Folds, "fold", lambda folds, digest: (keep(folds, digest), next(places) % 5)[1])
    torn = vhead.fit(scorer, rollouts, targets).metrics["explained_variance"]
    assert whole < 0.2
    assert torn > 0.9


def test_solving_leaves_the_sums_as_they_were():
    rows = torch.randn(40, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    xx, xy = rows.T @ rows, rows.T @ rows[:, :1]
    before = xx.clone()
    # The second is no positive matrix, and has no solution.
    for strength in (0.3, -1e3):
        found = solved(xx, xy, strength)
        assert torch.equal(xx, before)
        assert (found is None) == (strength < 0)
    torch.testing.assert_close(solved(xx, xy, 0.3), torch.linalg.solve(xx + 0.3 * torch.eye(7, dtype=xx.dtype), xy))
