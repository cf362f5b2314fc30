"""Layers that keep less have the gradients of the model's own, and are left alone where they cannot be."""

import copy

import pytest
import torch

from tests.scoring.scoring_models import critic
from vhead import TrainingPass
from vhead.packing import products
from vhead.packing.gates import Fused, is_gated
from vhead.training import layers
from vhead.training.layers import keeping_less


def _model(dtype=torch.float32):
    body = critic("llama").pretrained_model.to(dtype)
    generator = torch.Generator().manual_seed(5)
    for parameter in body.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return body


def _gradients(module, states, upstream):
    states = states.clone().requires_grad_()
    output = module(states)
    found = torch.autograd.grad(output, [states, *module.parameters()], upstream.to(output.dtype))
    return output.detach(), found


def _modules(model):
    fused = Fused.of(model)
    assert fused.gates
    assert fused.norms
    return [fused.gates[0], fused.norms[0]]


@pytest.mark.parametrize("block", [1, 2**17], ids=["a row at a time", "all rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_as_close_to_float64_as_the_module_s_own(monkeypatch, dtype, block):
    monkeypatch.setattr(layers, "_BLOCK", block)
    model = _model(dtype)
    generator = torch.Generator().manual_seed(1)
    states, upstream = (torch.randn(2, 7, 32, generator=generator).to(dtype) for _ in range(2))
    for module in _modules(model):
        truth = _gradients(copy.deepcopy(module).double(), states.double(), upstream.double())[1]
        own_output, own = _gradients(module, states, upstream)
        with keeping_less(model, Fused.of(model)):
            assert "forward" in vars(module)
            output, found = _gradients(module, states, upstream)
        assert "forward" not in vars(module)
        assert torch.allclose(output.float(), own_output.float(), rtol=2**-7 if dtype != torch.float32 else 1e-6)
        for one, usual, exact in zip(found, own, truth, strict=True):
            error, allowed = ((x.double() - exact).abs().max() for x in (one, usual))
            assert one.dtype == usual.dtype
            assert error <= 1.5 * allowed + 1e-6 * exact.abs().max()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_layers_in_float32_have_gradients_as_close_to_float64(monkeypatch, dtype, bias):
    monkeypatch.setattr(products, "suits_matrix_unit", lambda _weight: False)
    monkeypatch.setattr(products, "is_float32_faster", lambda _dtype: True)
    generator = torch.Generator().manual_seed(2)
    linear = torch.nn.Linear(12, 20, bias=bias).to(dtype)
    model = torch.nn.Sequential(linear)
    states, upstream = (torch.randn(3, 50, n, generator=generator).to(dtype) for n in (12, 20))
    truth = _gradients(copy.deepcopy(linear).double(), states.double(), upstream.double())[1]
    own = _gradients(linear, states, upstream)[1]
    with keeping_less(model, Fused.of(model)):
        assert "forward" in vars(linear)
        output, found = _gradients(linear, states, upstream)
    for one, usual, exact in zip(found, own, truth, strict=True):
        error, allowed = ((x.double() - exact).abs().max() for x in (one, usual))
        assert one.dtype == usual.dtype == dtype
        assert error <= 1.5 * allowed + 1e-6 * exact.abs().max()
    assert torch.allclose(output.float(), linear(states).float(), rtol=2**-7, atol=1e-3)
    linear.weight.requires_grad = False
    with keeping_less(model, Fused.of(model)):
        (of_states,) = torch.autograd.grad(linear(states.requires_grad_()), states, upstream)
    assert torch.equal(of_states, found[0])


def test_less_is_kept():
    model = _model()
    kept = {}
    for name, fused in (("own", Fused()), ("less", Fused.of(model))):
        sizes = {}
        with (
            torch.autograd.graph.saved_tensors_hooks(
                lambda x, sizes=sizes: (sizes.__setitem__(x.data_ptr(), x.numel()), x)[1], lambda x: x
            ),
            keeping_less(model, fused),
        ):
            output = model(torch.arange(40)[None])
        kept[name] = sum(sizes.values()) - sum(p.numel() for p in model.parameters())
        del output
    assert kept["less"] < 0.8 * kept["own"]


@pytest.mark.parametrize("change", ["hook", "backward hook", "backward pre-hook", "no gradients", "autocast"])
def test_modules_are_left_alone(change):
    model = _model()
    fused = Fused.of(model)
    if change == "hook":
        for module in (*fused.gates, *fused.norms):
            module.register_forward_hook(lambda *_: None)
    if change.startswith("backward"):
        register = "register_full_backward_hook" if change.endswith(" hook") else "register_full_backward_pre_hook"
        for module in (*fused.norms, *(gate.down_proj for gate in fused.gates)):
            getattr(module, register)(lambda *_: None)
    with (
        torch.set_grad_enabled(change != "no gradients"),
        torch.autocast("cpu", enabled=change == "autocast"),
        keeping_less(model, fused),
    ):
        assert all("forward" not in vars(module) for module in model.modules())


def test_a_layer_whose_gradients_differ_keeps_its_own(monkeypatch):
    own = layers._GatedProduct.backward

    def wrong(ctx, grad_output):
        of_gate, *others = own(ctx, grad_output)
        return (2.0 * of_gate, *others)

    model = critic("llama")
    assert TrainingPass(model)._trained._layers.gates
    monkeypatch.setattr(layers._GatedProduct, "backward", staticmethod(wrong))
    training_pass = TrainingPass(model)
    assert not training_pass._trained._layers
    assert training_pass.plan.packing.attention is not None
    assert "as their gradients differed" in str(training_pass.plan)


def test_frozen_projections_get_no_gradients():
    model = _model()
    layer = next(module for module in model.modules() if is_gated(module))
    layer.requires_grad_(requires_grad=False)
    states = torch.randn(1, 3, 32, requires_grad=True)
    with keeping_less(model, Fused.of(model)):
        layer(states).sum().backward()
    assert states.grad is not None
    assert all(parameter.grad is None for parameter in layer.parameters())
