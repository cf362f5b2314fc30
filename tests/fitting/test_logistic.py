"""Linear heads by logistic regression: scikit-learn's numbers for binary rewards and for differences of pairs."""

import numpy as np
import pytest
import torch

import vhead
from tests.fitting.examples import grouped, last_state, paired, relative
from vhead.fitting import logistic
from vhead.fitting.logistic import fit_logistic
from vhead.fitting.metrics import Verdicts, wilson_interval
from vhead.fitting.store import StateStore

linear_model = pytest.importorskip("sklearn.linear_model")

ROWS, WIDTH, FOLDS = 400, 12, 4


def outcomes(seed=0, outputs=1):
    rng = np.random.default_rng(seed)
    states = (rng.normal(size=(ROWS, WIDTH)) + 3.0 * rng.normal(size=WIDTH)).astype(np.float32)
    logits = (states - states.mean(0)) @ rng.normal(size=(WIDTH, outputs)) + 0.5
    targets = (rng.random((ROWS, outputs)) < 1 / (1 + np.exp(-logits))).astype(np.float64)
    return states, targets, rng.integers(0, FOLDS, ROWS)


def stored(folder, states, targets, folds, weights=None, dtype="float32"):
    store = StateStore(folder, states.shape[1], targets.shape[1], dtype, 2**30)
    store.append(states, targets, np.ones(len(states)) if weights is None else weights, folds)
    return store


def twin(states, targets, strength, weights=None, *, intercept=True):
    model = linear_model.LogisticRegression(
        C=1 / strength, fit_intercept=intercept, tol=1e-12, max_iter=1000, solver="newton-cholesky"
    )
    return model.fit(states.astype(np.float64), targets, sample_weight=weights)


@pytest.mark.parametrize("outputs", [1, 2])
def test_coefficients_for_outcomes_are_those_of_scikit_learn(tmp_path, outputs):
    states, targets, folds = outcomes(outputs=outputs)
    solution = fit_logistic(stored(tmp_path, states, targets, folds), is_pairs=False, folds=FOLDS, strengths=(0.7,))
    ((weight, bias),) = solution.layers
    for output in range(outputs):
        model = twin(states, targets[:, output], 0.7)
        assert relative(weight[output], model.coef_) < 1e-6
        assert relative(bias[output], model.intercept_) < 1e-6
        assert relative(weight[output], twin(states, targets[:, output], 0.8).coef_) > 1e-6


def test_weights_of_outcomes_are_those_of_scikit_learn(tmp_path):
    states, targets, folds = outcomes()
    weights = np.random.default_rng(1).uniform(0, 3, ROWS)
    store = stored(tmp_path, states, targets, folds, weights)
    ((weight, _),) = fit_logistic(store, is_pairs=False, folds=FOLDS, strengths=(0.7,)).layers
    assert relative(weight, twin(states, targets[:, 0], 0.7, weights).coef_) < 1e-6


def test_coefficients_for_pairs_are_those_of_differences_without_an_intercept(tmp_path):
    states, _, folds = outcomes()
    true = np.random.default_rng(2).normal(size=WIDTH)
    first, second = states[::2], states[1::2]
    swap = ((first - second) @ true + np.random.default_rng(3).normal(size=len(first)) < 0)[:, None]
    chosen, rejected = np.where(swap, second, first), np.where(swap, first, second)
    states = np.stack([chosen, rejected], axis=1).reshape(-1, WIDTH)
    store = stored(tmp_path, states, np.ones((len(states), 1)), np.repeat(folds[::2], 2))
    solution = fit_logistic(store, is_pairs=True, folds=FOLDS, strengths=(0.7,))
    ((weight, bias),) = solution.layers
    # Scikit-learn needs both classes: each pair once in each order, at half its weight.
    differences = (chosen - rejected).astype(np.float64)
    both, signs = np.concatenate([differences, -differences]), np.repeat([1, 0], len(differences))
    model = twin(both, signs, 0.7, np.full(len(both), 0.5), intercept=False)
    assert bias is None
    assert relative(weight, model.coef_) < 1e-6
    assert solution.figures["accuracy"][0] > 0.75


def test_figures_are_those_of_heads_that_never_saw_the_prompts(tmp_path):
    states, targets, folds = outcomes()
    figures = fit_logistic(
        stored(tmp_path, states, targets, folds), is_pairs=False, folds=FOLDS, strengths=(5.0,)
    ).figures
    probabilities = np.empty(ROWS)
    for fold in range(FOLDS):
        model = twin(states[folds != fold], targets[folds != fold, 0], 5.0)
        probabilities[folds == fold] = model.predict_proba(states[folds == fold].astype(np.float64))[:, 1]
    outcome = targets[:, 0]
    right = (probabilities > 0.5) == (outcome > 0.5)
    loss = -np.log(np.where(outcome > 0.5, probabilities, 1 - probabilities)).mean()
    places = np.minimum((probabilities * 10).astype(int), 9)
    error = sum(abs((probabilities - outcome)[places == place].sum()) for place in range(10)) / ROWS
    assert figures["accuracy"][0] == right.mean()
    assert figures["log_loss"][0] == pytest.approx(loss, abs=1e-7)
    assert figures["calibration_error"][0] == pytest.approx(error, abs=1e-7)
    assert figures["accuracy_interval"][0] == wilson_interval(right.sum(), ROWS)


def test_the_strength_is_the_one_with_the_least_held_out_loss(tmp_path):
    states, targets, folds = outcomes()
    strengths = (1e-3, 1e-1, 10.0, 1e3, 1e5)

    def loss(strength):
        total = 0.0
        for fold in range(FOLDS):
            model = twin(states[folds != fold], targets[folds != fold, 0], strength)
            found = model.predict_proba(states[folds == fold].astype(np.float64))[:, 1]
            total -= np.log(np.where(targets[folds == fold, 0] > 0.5, found, 1 - found)).sum()
        return total

    best = min(strengths, key=loss)
    solution = fit_logistic(stored(tmp_path, states, targets, folds), is_pairs=False, folds=FOLDS, strengths=strengths)
    assert solution.strengths == (best,)
    assert best not in (strengths[0], strengths[-1])


def test_outcomes_that_a_plane_separates_have_a_solution(tmp_path):
    states, _, folds = outcomes()
    targets = (states[:, :1] > np.median(states[:, 0])).astype(np.float64)
    solution = fit_logistic(stored(tmp_path, states, targets, folds), is_pairs=False, folds=FOLDS, strengths=(1e-6,))
    assert solution.layers[0][0].isfinite().all()
    assert solution.figures["accuracy"][0] > 0.95


def test_states_are_read_in_blocks(tmp_path, monkeypatch):
    states, targets, folds = outcomes()
    store = stored(tmp_path, states, targets, folds)
    whole = fit_logistic(store, is_pairs=False, folds=FOLDS, strengths=(0.7,))
    monkeypatch.setattr("vhead.fitting.store._BLOCK_BYTES", 8 * WIDTH * 7)
    assert len(list(store.blocks())) == -(-ROWS // 7)
    pieces = fit_logistic(store, is_pairs=False, folds=FOLDS, strengths=(0.7,))
    assert relative(pieces.layers[0][0], whole.layers[0][0]) < 1e-9
    assert {len(block.states) % 2 for block in list(store.blocks(multiple=2))} == {0}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_states_are_kept_as_the_model_gives_them(tmp_path, dtype):
    states = torch.randn(30, WIDTH).to(getattr(torch, dtype)).float().numpy()
    store = stored(tmp_path, states, np.ones((30, 1)), np.zeros(30, np.int64), dtype=dtype)
    (block,) = store.blocks()
    assert np.array_equal(block.states.numpy(), states)
    assert (tmp_path / "states").stat().st_size == 30 * WIDTH * getattr(torch, dtype).itemsize


def test_binary_rewards_are_fitted_as_outcomes(model, scorer):
    rollouts = grouped()
    rewards = [int(np.mean(rollout.completion) > 50) for rollout in rollouts]
    fitted = vhead.fit(scorer, rollouts, rewards, target="reward", strengths=0.5)
    states = np.stack([last_state(model, rollout) for rollout in rollouts])
    assert fitted.loss == "logistic"
    assert relative(fitted.head.weight, twin(states, rewards, 0.5).coef_) < 1e-4
    squared = vhead.fit(scorer, rollouts, rewards, target="reward", strengths=0.5, loss="squared")
    assert squared.loss == "squared"
    assert relative(squared.head.weight, fitted.head.weight) > 1e-2


def test_rewards_that_are_binary_only_at_first_are_fitted_as_numbers(scorer):
    rollouts = grouped()
    rewards = [float(place % 2) for place in range(len(rollouts))]
    rewards[-1] = 0.25
    fitted = vhead.fit(scorer, rollouts, rewards, target="reward", strengths=0.5)
    assert fitted.loss == "squared"
    same = vhead.fit(scorer, rollouts, rewards, target="reward", strengths=0.5, loss="squared")
    assert torch.equal(fitted.head.weight, same.head.weight)


def test_pairs_are_fitted_as_tuples_and_one_after_the_other(model, scorer):
    pairs = paired()
    fitted = vhead.fit(scorer, pairs, target="pairs", strengths=2.0)
    flat = vhead.fit(scorer, [side for pair in pairs for side in pair], target="pairs", strengths=2.0)
    assert torch.equal(fitted.head.weight, flat.head.weight)
    assert fitted.head.layers[0].bias is None
    differences = np.stack([last_state(model, chosen) - last_state(model, rejected) for chosen, rejected in pairs])
    both = np.concatenate([differences, -differences])
    model = twin(both, np.repeat([1, 0], len(pairs)), 2.0, np.full(len(both), 0.5), intercept=False)
    assert relative(fitted.head.weight, model.coef_) < 1e-4
    assert fitted.rollouts == 2 * len(pairs)
    swapped = vhead.fit(scorer, [pair[::-1] for pair in pairs], target="pairs", strengths=2.0)
    assert relative(-swapped.head.weight, fitted.head.weight) < 1e-6


def test_newton_goes_on_from_a_start_that_overshoots(tmp_path):
    states, targets, folds = outcomes()
    rows = logistic.Rows.of(stored(tmp_path, states, targets, folds), is_pairs=False)
    start = 40 * torch.randn(WIDTH + 1, dtype=torch.float64)
    near = logistic._newton(rows, 0, -1, 0.7, None)
    assert relative(logistic._newton(rows, 0, -1, 0.7, start), near) < 1e-7


def test_wilson_s_interval_is_the_published_one():
    # Wilson 1927, as computed by statsmodels' proportion_confint(8, 10, method="wilson").
    assert wilson_interval(8, 10) == pytest.approx((0.4901624, 0.9433178), abs=1e-6)
    assert wilson_interval(0, 5)[0] == 0.0
    assert wilson_interval(5, 5)[1] == 1.0


def test_even_odds_are_half_right():
    verdicts = Verdicts.of(torch.zeros(4, 1), torch.ones(4, 1), torch.ones(4), is_pair=True)
    assert verdicts.figures()["accuracy"] == [0.5]
