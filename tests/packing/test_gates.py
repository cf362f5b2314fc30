"""Gated layers that work in place: the same bits, and the model's own afterwards."""

import pytest
import torch
from torch import nn

from tests.scoring.scoring_models import critic, trees, worst
from vhead import Scorer
from vhead.packing import gates
from vhead.scoring.fields import FIELDS


@torch.no_grad()
def test_the_same_bits():
    layers = [module for module in critic("llama").modules() if gates.is_gated(module)]
    assert len(layers) == 2
    states = torch.randn(5, 7, 32)
    for layer in layers:
        expected = layer(states)
        with gates.in_place_gates(layer):
            assert layer.__dict__["forward"].func is gates._forward
            assert torch.equal(layer(states), expected)
        assert "forward" not in layer.__dict__


@pytest.mark.parametrize("change", ["projection", "activation", "child", "forward"])
def test_other_layers_are_left_alone(change):
    layer = next(module for module in critic("llama").modules() if gates.is_gated(module))
    if change == "projection":
        layer.up_proj = nn.Sequential(layer.up_proj)
    if change == "activation":
        layer.act_fn = nn.GELU()
    if change == "child":
        layer.dropout = nn.Dropout(0.1)
    if change == "forward":
        layer.forward = lambda states: states
    assert not gates.is_gated(layer)


def test_a_layer_that_only_looks_like_one_is_noticed(monkeypatch):
    model = critic("llama")
    layer = next(module for module in model.modules() if gates.is_gated(module))
    own = type(layer).forward
    monkeypatch.setattr(type(layer), "forward", lambda self, states: 2.0 * own(self, states))
    scorer = Scorer(model)
    assert not scorer._engine._body.in_place
    monkeypatch.setattr(type(layer), "forward", own)
    assert Scorer(model)._engine._body.in_place


def test_the_model_s_own_forward_is_back_after_scoring():
    model = critic("llama")
    scorer = Scorer(model)
    assert scorer._engine._body.in_place
    assert worst(model, trees(), scorer.score(trees(), FIELDS)) < 1e-4
    assert all("forward" not in module.__dict__ for module in model.modules())
