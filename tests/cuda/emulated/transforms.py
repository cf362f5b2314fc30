"""autograd, `torch.compile`, vmap and the dispatcher over the functions of the CUDA key."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.cuda.emulated import device
from tests.cuda.emulated.conftest import same_bits
from tests.cuda.emulated.device import on_device
from vhead.ops import dispatch, two_layer, value_head
from vhead.ops.dispatch import Operation
from vhead.ops.value_head import _VALUE_HEAD

ORIGINAL, TWO_LAYER = _VALUE_HEAD, two_layer._TWO_LAYER
composed_forward = on_device(two_layer._composed_forward)
composed_backward = on_device(two_layer._composed_backward)


@pytest.fixture(scope="session")
def operation() -> Operation:
    """The value head, registered once more with CPU tensors on the device."""
    of = ORIGINAL._of
    forward, backward = on_device(of.forward), on_device(of.backward)
    return Operation(replace(of, name="value_head_emulated", forward=forward, backward=backward))


def gradients(function: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    values = function(*leaves)
    (values * torch.linspace(-1, 1, values.numel()).reshape(values.shape)).sum().backward()
    return values.detach(), *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_autograd(driver, operation, head, p) -> None:
    case, seed = head(3, 5, 40, outputs=2, dtype=torch.bfloat16), torch.tensor(7) if p else None
    ours = gradients(lambda *tensors: operation(*tensors, p, seed), *case)
    assert any(kernel.startswith("value_head_backward_bfloat16_vector") for kernel in driver.kernels())
    expected = gradients(lambda *tensors: value_head(*tensors, dropout_p=p, seed=seed), *case)
    assert driver.kernels() == []
    assert all(map(same_bits, ours, expected))


def test_a_frozen_trunk(driver, operation, head) -> None:
    hidden, weight, bias = head(5, 40)
    operation(hidden, weight.requires_grad_(), bias.requires_grad_(), 0.0, None).sum().backward()
    assert driver.kernels() == [
        "value_head_float32_vector",
        "value_head_backward_weight_float32_vector",
        "value_head_add_chunks",
        "value_head_add_rows",
    ]


# opcheck itself looks at `.grad` of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_opcheck(operation, head) -> None:
    case = [tensor.requires_grad_() for tensor in head(3, 5, 40, outputs=2, dtype=torch.bfloat16)]
    torch.library.opcheck(operation.operator, (*case, 0.3, torch.tensor(5)))


def test_compile(driver, operation, head) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: operation(*x, 0.3, torch.tensor(9)).sin(), backend="aot_eager", fullgraph=True)
    case = head(6, 40, outputs=2)
    ours = gradients(compiled, *case)
    assert [re.sub("_float32.*", "", k) for k in driver.kernels()] == [
        "value_head",
        "value_head_backward",
        "value_head_add_chunks",
        "value_head_add_rows",
    ]
    assert all(map(same_bits, ours, gradients(lambda *x: value_head(*x, dropout_p=0.3, seed=9).sin(), *case)))


def test_vmap(operation, head) -> None:
    hidden, weight, bias = head(4, 3, 40)
    ours = torch.func.vmap(lambda x: operation(x, weight, bias, 0.0, None))(hidden)
    assert same_bits(ours, value_head(hidden, weight, bias))


def test_a_cuda_tensor_takes_the_kernels_where_they_are(driver, head, monkeypatch) -> None:
    case = head(5, 40)
    grad = torch.randn(5)
    for has, kernels in (
        (
            True,
            [
                "value_head_float32_vector",
                "value_head_backward_float32_vector",
                "value_head_add_chunks",
                "value_head_add_rows",
            ],
        ),
        (False, []),
    ):
        monkeypatch.setattr(dispatch, "has_kernels", lambda _, has=has: has)
        with device.memory():
            values = ORIGINAL.eager(*case, 0.0, None)
            found = ORIGINAL.eager_backward(grad, *case[:2], 0.0, None, (True, True, True))
        assert driver.kernels() == kernels
        torch.testing.assert_close(values, value_head(*case))
        assert [tuple(gradient.shape) for gradient in found] == [(5, 40), (1, 40), (1,)]


@pytest.mark.parametrize("name", ["value_head", "value_head_backward", "value_head_two_layer"])
def test_the_dispatcher_has_an_entry_for_cuda(name) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vhead::{name}", "CUDA")


def test_negative_views_are_resolved(driver, head) -> None:
    hidden, weight, bias = head(5, 40)
    negative = torch._neg_view(hidden)
    found = on_device(ORIGINAL.eager)(negative, weight, bias, 0.0, None)
    assert same_bits(found, value_head(-hidden, weight, bias))
    assert driver.kernels() == ["value_head_float32_vector"]


@pytest.fixture
def layers() -> tuple[Tensor, ...]:
    return torch.randn(3, 5, 40), torch.randn(24, 40), torch.randn(24), torch.randn(2, 24), torch.randn(2)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_two_layers_are_torch_s_product_and_the_kernel(driver, layers, p) -> None:
    of, seed = TWO_LAYER._of, torch.tensor(3) if p else None
    ours, plain = composed_forward(*layers, p, seed), of.plain(*layers, p, seed)
    assert driver.kernels() == ["value_head_float32_vector"]
    torch.testing.assert_close(ours, plain)
    for needed in [(True,) * 5, (False, True, False, False, True), (False, False, False, True, False), (False,) * 5]:
        arguments = (torch.randn(ours.shape), *layers[:4], p, seed, needed)
        for a, b in zip(composed_backward(*arguments), of.plain_backward(*arguments), strict=True):
            torch.testing.assert_close(a, b)
            assert a is None or a.dtype == b.dtype
    assert driver.kernels()


def test_the_second_layer_has_the_kernel_s_bits(layers) -> None:
    hidden, weight1, bias1, weight2, bias2 = layers
    activations = (torch.matmul(hidden, weight1.t()) + bias1).relu()
    expected = value_head(activations, weight2, bias2)
    assert same_bits(composed_forward(*layers, 0.0, None), expected)


def test_the_short_way_is_open_once_the_kernels_are_loaded(head) -> None:
    hidden, weight, bias = head(5, 40)
    found = device.try_value_head(hidden, weight, bias, grad_enabled=True)
    assert same_bits(found, value_head(hidden, weight, bias))
