"""Gated layers that work in place: the same bits, and the model's own afterwards."""

import pytest
import torch
from torch import nn

from tests.scoring.scoring_models import critic, trees, worst
from vhead import Scorer
from vhead.packing import gates, norms
from vhead.scoring.fields import FIELDS


@torch.no_grad()
def test_the_same_bits():
    layers = [module for module in critic("llama").modules() if gates.is_gated(module)]
    assert len(layers) == 2
    states = torch.randn(5, 7, 32)
    for layer in layers:
        expected = layer(states)
        with gates.Fused.of(layer).running():
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
    assert not scorer._engine._body.fused.gates
    assert scorer._engine._body.fused.norms
    monkeypatch.setattr(type(layer), "forward", own)
    assert Scorer(model)._engine._body.fused.gates


def test_the_model_s_own_forward_is_back_after_scoring():
    model = critic("llama")
    scorer = Scorer(model)
    assert scorer._engine._body.fused
    assert worst(model, trees(), scorer.score(trees(), FIELDS)) < 1e-4
    assert all("forward" not in module.__dict__ for module in model.modules())


def norms_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if norms.looks_like_norm(module)]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_norm_by_the_kernel_rounds_as_the_model_s_own(dtype):
    norm = norms_of(critic("llama"))[0].to(dtype)
    norm.weight.normal_()
    states = (torch.randn(5, 7, 32) * torch.logspace(-3, 2, 7)[:, None]).to(dtype)
    expected = norm(states)
    with gates.Fused.of(norm).running():
        assert norm.__dict__["forward"].func is norms.forward
        found = norm(states)
    assert "forward" not in norm.__dict__
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=2 * norms._LAST_PLACE[dtype], atol=0.0)
    norm.variance_epsilon *= 4
    assert not torch.allclose(norm(states), expected, rtol=2 * norms._LAST_PLACE[dtype], atol=0.0)


@pytest.mark.parametrize(
    "change",
    ["class", "module", "epsilon is added elsewhere", "bias", "no epsilon", "hook", "pre-hook", "forward", "dtype"],
)
def test_a_norm_that_only_looks_like_one_is_left_alone(change, monkeypatch):
    model = critic("llama")
    norm = norms_of(model)[0]
    assert norm in gates.Fused.of(model).norms
    kind = type(norm)
    if change == "class":
        norm.__class__ = type("GemmaRMSNorm", (kind,), {"__module__": kind.__module__})
    if change == "module":
        norm.__class__ = type(kind.__name__, (kind,), {"__module__": "remote.code"})
    if change == "epsilon is added elsewhere":
        monkeypatch.setattr(kind, "forward", lambda self, x: self.weight * x / (x.pow(2).mean(-1, True).sqrt() + 1e-3))
    if change == "bias":
        norm.bias = nn.Parameter(torch.randn(32))
    if change == "no epsilon":
        del norm.variance_epsilon
    if change == "hook":
        norm.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    if change == "pre-hook":
        norm.register_forward_pre_hook(lambda _module, inputs: (2 * inputs[0],))
    if change == "forward":
        norm.forward = lambda states: states
    if change == "dtype":
        norm.double()
    assert norm not in gates.Fused.of(model).norms


@pytest.mark.parametrize("part", ["", "gate_proj", "up_proj", "down_proj", "act_fn"])
def test_a_gated_layer_with_a_hook_is_left_alone(part):
    layer = next(module for module in critic("llama").modules() if gates.is_gated(module))
    layer.get_submodule(part).register_forward_hook(lambda _module, _inputs, output: 2 * output)
    assert not gates.is_gated(layer)


def test_hooks_that_come_after_the_scorer_are_heard():
    model = critic("llama")
    scorer = Scorer(model)
    before = scorer.score(trees(), FIELDS)
    hooked = [norms_of(model)[0], next(module for module in model.modules() if gates.is_gated(module)).up_proj]
    calls = []
    handles = [module.register_forward_hook(lambda *_: calls.append(1)) for module in hooked]
    scorer.score(trees(), FIELDS)
    assert calls
    for handle in handles:
        handle.remove()
    assert (scorer.score(trees(), FIELDS).values == before.values).all()


def test_the_plan_counts_what_is_left_alone():
    model = critic("llama")
    norms_of(model)[0].register_forward_hook(lambda _module, _inputs, output: output)
    assert "own kernels: 2 of 2 gated layers, 4 of 5 norms" in str(Scorer(model).plan)


def test_one_kind_that_differs_does_not_cost_the_other(monkeypatch):
    monkeypatch.setattr(norms, "forward", lambda module, states: 2 * type(module).forward(module, states))
    fused = Scorer(critic("llama"))._engine._body.fused
    assert fused.gates
    assert not fused.norms


def test_a_norm_under_autocast_is_the_model_s_own():
    norm = norms_of(critic("llama"))[0]
    states = torch.randn(3, 32).bfloat16()
    assert torch.equal(norms.forward(norm, states), norm(states))
