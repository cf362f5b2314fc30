"""Heads of two projections: what they learn that a linear head cannot, and that they are judged on held-out prompts."""

import numpy as np
import pytest
import torch

import vhead
from tests.fitting.examples import grouped, last_state, paired, relative
from vhead import ValueHead, formats
from vhead.fitting.store import StateStore
from vhead.fitting.two_layer import fit_two_layer

ROWS, WIDTH, FOLDS = 600, 6, 3


def stored(folder, states, targets, folds):
    store = StateStore(folder, states.shape[1], targets.shape[1], "float32", 2**30)
    store.append(states, targets, np.ones(len(states)), folds)
    return store


def bent(seed=0):
    """States of several sizes far from 0, and targets that no linear head gives."""
    rng = np.random.default_rng(seed)
    states = (rng.normal(size=(ROWS, WIDTH)) * np.geomspace(1, 50, WIDTH) + 20).astype(np.float32)
    scaled = (states - states.mean(0)) / states.std(0)
    targets = 100 + 30 * np.abs(scaled @ rng.normal(size=(WIDTH, 2)))
    return states, targets, rng.integers(0, FOLDS, ROWS)


def outputs(layers, states):
    (first, first_bias), (second, second_bias) = layers
    hidden = (torch.from_numpy(states).double() @ first.T + first_bias).relu()
    return (hidden @ second.T + (0 if second_bias is None else second_bias)).numpy()


def fitted_to(store, loss="squared", *, is_pairs=False, strengths=(1e-4,), iterations=60):
    return fit_two_layer(
        store,
        loss=loss,
        is_pairs=is_pairs,
        folds=FOLDS,
        strengths=strengths,
        intermediate_size=16,
        max_iterations=iterations,
    )


def test_what_is_no_line_is_learnt(tmp_path):
    states, targets, folds = bent()
    solution = fitted_to(stored(tmp_path, states, targets, folds))
    assert min(solution.figures["explained_variance"]) > 0.9
    errors = outputs(solution.layers, states) - targets
    assert (errors.var(0) / targets.var(0)).max() < 0.05
    assert np.abs(errors.mean(0)).max() < 2.0
    scaled = (states - states.mean(0)) / states.std(0)
    line = scaled @ np.linalg.lstsq(scaled, targets - targets.mean(0), rcond=None)[0]
    assert (np.var(targets - line, axis=0) / targets.var(0)).min() > 0.5


def test_noise_is_not_explained_on_held_out_prompts(tmp_path):
    states, _, folds = bent()
    noise = np.random.default_rng(5).normal(size=(ROWS, 1))
    solution = fitted_to(stored(tmp_path, states, noise, folds))
    assert solution.figures["explained_variance"][0] < 0.05
    own = noise - outputs(solution.layers, states)
    assert 1 - own.var() / noise.var() > 0.1


def test_a_strength_that_is_too_large_is_not_chosen(tmp_path):
    states, targets, folds = bent()
    assert fitted_to(stored(tmp_path, states, targets, folds), strengths=(10.0, 1e-4)).strengths == (1e-4, 1e-4)


def test_the_same_rows_give_the_same_bits(tmp_path):
    states, targets, folds = bent()
    store = stored(tmp_path, states, targets, folds)
    torch.manual_seed(1)
    one = fitted_to(store, iterations=5)
    torch.manual_seed(2)
    other = fitted_to(store, iterations=5)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one.layers, other.layers, strict=True))


def test_outcomes_are_learnt_as_log_odds(tmp_path):
    states, targets, folds = bent()
    outcome = (targets[:, :1] > np.median(targets[:, 0])).astype(np.float64)
    solution = fitted_to(stored(tmp_path, states, outcome, folds), "logistic", strengths=(1e-3,))
    assert solution.figures["accuracy"][0] > 0.85
    right = (outputs(solution.layers, states) > 0) == (outcome > 0.5)
    assert right.mean() > 0.9


def test_pairs_are_learnt_without_a_last_bias(tmp_path):
    states, targets, folds = bent()
    first, second = np.arange(0, ROWS, 2), np.arange(1, ROWS, 2)
    better = targets[first, 0] > targets[second, 0]
    order = np.column_stack([np.where(better, first, second), np.where(better, second, first)]).ravel()
    store = stored(tmp_path, states[order], np.ones((ROWS, 1)), np.repeat(folds[::2], 2))
    solution = fitted_to(store, "logistic", is_pairs=True, strengths=(1e-3,))
    assert solution.layers[1][1] is None
    assert solution.figures["accuracy"][0] > 0.8
    scores = outputs(solution.layers, states[order])
    assert (scores[::2] > scores[1::2]).mean() > 0.9


@pytest.mark.parametrize("target", ["returns", "reward", "pairs"])
def test_rollouts_make_a_head_that_can_be_saved(scorer, tmp_path, target):
    rollouts = paired() if target == "pairs" else grouped()
    targets = None if target == "pairs" else [float(np.mean(rollout.completion)) for rollout in rollouts]
    fitted = vhead.fit(
        scorer, rollouts, targets, target=target, intermediate_size=8, max_iterations=10, folds=2, strengths=1e-2
    )
    assert fitted.head.intermediate_size == 8
    path = formats.save(fitted.head, tmp_path / "head.safetensors", "vhead")
    head = ValueHead.like(formats.load(path), scorer.model.pretrained_model.config)
    states = torch.from_numpy(np.stack([last_state(scorer.model, r) for r in paired()[0]])).float()
    layers = [(layer.weight.double(), layer.bias_or_zeros.double()) for layer in fitted.head.layers]
    assert relative(head.eval()(states).detach(), outputs(layers, states.numpy())) < 1e-5
