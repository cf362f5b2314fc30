"""Embeddings and a language-model head that share a weight send back one gradient."""

import pytest
import torch
from torch import nn

from tests.trainers.toy_task import language_model
from tests.training.padded_loop import difference, of_loop, of_pass, rollouts, weights_of
from tests.training.test_gradients import in_double, with_head
from vhead import TrainingPass, VheadError, freeze
from vhead.training.shared_weight import _Shared

TOLERANCE = 2e-5


@pytest.fixture
def given():
    return rollouts()


@pytest.fixture
def weights(given):
    return weights_of(given)


def _ways_to(leaf, tensor):
    """How many steps of autograd send a gradient to a leaf."""
    seen, ways, waiting = set(), 0, [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        for following, _ in node.next_functions:
            if following is None:
                continue
            ways += getattr(following, "variable", None) is leaf
            if following not in seen:
                seen.add(following)
                waiting.append(following)
    return ways


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_one_step_of_autograd_reaches_the_weight(given, tied):
    body = language_model(tied=tied)
    training_pass = TrainingPass(with_head(body))
    (batch, *_) = training_pass.batches(given)
    out = training_pass(batch)
    assert _ways_to(body.lm_head.weight, out.logprobs.sum() + out.values.sum()) == 1
    assert _ways_to(body.get_input_embeddings().weight, out.logprobs.sum() + out.values.sum()) == 1


def test_the_count_sees_two_steps(given):
    body = language_model(tied=True)
    training_pass = TrainingPass(with_head(body))
    training_pass._trained._shared._lm_head = None
    (batch, *_) = training_pass.batches(given)
    assert _ways_to(body.lm_head.weight, training_pass(batch).logprobs.sum()) == 2


def _assert_gradients(model, given, weights):
    _, truth = of_loop(in_double(model), given, weights)
    _, found = of_pass(TrainingPass(model), given, weights)
    assert found.keys() == truth.keys()
    assert max(difference(found, truth).values()) < TOLERANCE


def test_the_row_of_padding_has_only_the_language_model_head_s_gradient(given, weights):
    model = with_head(language_model(tied=True))
    embeddings = model.pretrained_model.get_input_embeddings()
    embeddings.padding_idx = int(given[0].prompt[0])
    _assert_gradients(model, given, weights)


def test_a_weight_that_is_shared_no_longer_has_two_gradients(given, weights):
    model = with_head(language_model(tied=True))
    training_pass = TrainingPass(model)
    body = model.pretrained_model
    body.lm_head.weight = nn.Parameter(body.lm_head.weight.detach() * 1.5)
    _, truth = of_loop(in_double(model), given, weights)
    _, found = of_pass(training_pass, given, weights)
    assert sum(name.endswith(("embed_tokens.weight", "lm_head.weight")) for name in found) == 2
    assert max(difference(found, truth).values()) < TOLERANCE


def test_values_alone_and_frozen_embeddings_have_their_gradients(given):
    model = with_head(language_model(tied=True))
    weight = model.pretrained_model.lm_head.weight
    training_pass = TrainingPass(model, returns=["values"])
    training_pass(training_pass.batches(given)[0]).values.sum().backward()
    assert weight.grad.abs().max() > 0
    weight.grad = None
    freeze(model, "embeddings")
    training_pass(training_pass.batches(given)[0]).values.sum().backward()
    assert weight.grad is None


def test_a_token_that_comes_often_is_summed_in_float32(given):
    body = language_model(tied=True).bfloat16()
    weight = body.lm_head.weight
    token = int(given[0].prompt[0])
    rows = torch.nn.functional.embedding(torch.full((1, 600), token), weight)
    found, _ = _Shared.apply(weight, torch.full((1, 600), token), rows.detach(), None, False)
    found.backward(torch.full_like(found, 1.0078125))
    assert torch.equal(weight.grad[token], torch.full_like(weight.grad[token], 600 * 1.0078125))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_gradients_in_place_are_those_of_autograd(given, weights, dtype, tied):
    model = with_head(language_model(tied=tied).to(dtype))
    _, expected = of_pass(TrainingPass(model), given, weights)
    _, found = of_pass(TrainingPass(model, accumulate_in_place=True), given, weights)
    assert found.keys() == expected.keys()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    assert max(difference(found, expected).values()) < tolerance


def test_in_place_autograd_makes_no_gradient_of_the_vocabulary(given):
    model = with_head(language_model(tied=True))
    weight = model.pretrained_model.lm_head.weight
    training_pass = TrainingPass(model, accumulate_in_place=True)
    out = training_pass(training_pass.batches(given)[0])
    loss = out.logprobs.sum() + out.values.sum()
    assert torch.autograd.grad(loss, [weight], allow_unused=True, retain_graph=True) == (None,)
    weight.grad = None
    loss.backward()
    assert weight.grad.abs().max() > 0


def test_hooks_on_the_weight_are_refused_where_they_would_see_nothing(given):
    model = with_head(language_model(tied=True))
    training_pass = TrainingPass(model, accumulate_in_place=True)
    (batch, *_) = training_pass.batches(given)
    handle = model.pretrained_model.lm_head.weight.register_hook(lambda gradient: gradient)
    with pytest.raises(VheadError, match="accumulate_in_place: expected False with hooks"):
        training_pass(batch)
    handle.remove()
    training_pass(batch)
