"""Initialisation: the distribution, and where the numbers come from."""

import math

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from tests.ops.conftest import same_bits
from vhead.ops import init_linear_, init_normal_


def linear(columns: int = 4096, outputs: int = 5, dtype: torch.dtype = torch.float32) -> nn.Linear:
    return nn.Linear(columns, outputs, dtype=dtype)


def normal_(weight, bias) -> None:
    init_normal_(weight, bias, 0.2)


def test_default_is_nn_linear_s_distribution() -> None:
    layer = linear()
    init_linear_(layer.weight, layer.bias)
    bound = 1 / math.sqrt(4096)
    numbers = layer.weight.detach().double().flatten() / bound
    assert -1 <= numbers.min() < -0.999
    assert 0.999 < numbers.max() < 1
    error = numbers.numel() ** -0.5
    assert abs(numbers.mean()) < 5 * error
    assert abs(numbers.square().mean() - 1 / 3) < 5 * error
    assert layer.bias.abs().max() <= bound
    assert layer.bias.unique().numel() == 5


def test_normal() -> None:
    layer = linear()
    init_normal_(layer.weight, layer.bias, 0.2)
    numbers = layer.weight.detach().double().flatten() / 0.2
    error = numbers.numel() ** -0.5
    assert abs(numbers.mean()) < 5 * error
    assert abs(numbers.var() - 1) < 10 * error
    assert abs(numbers.pow(4).mean() - 3) < 60 * error
    assert numbers.abs().max() > 3.5
    assert torch.equal(layer.bias, torch.zeros(5))


@pytest.mark.parametrize("init_", [init_linear_, normal_])
def test_numbers_are_a_function_of_torch_s_seed(init_, two_threads) -> None:
    first, again, other = linear(), linear(), linear()
    torch.manual_seed(7)
    init_(first.weight, first.bias)
    torch.set_num_threads(1)
    torch.manual_seed(7)
    init_(again.weight, again.bias)
    init_(other.weight, other.bias)
    assert same_bits(first.weight, again.weight)
    assert same_bits(first.bias, again.bias)
    assert not same_bits(first.weight, other.weight)


@pytest.mark.parametrize("init_", [init_linear_, normal_])
def test_one_draw_whatever_the_size(init_) -> None:
    states = []
    for columns in (3, 5000):
        layer = linear(columns, 1)
        torch.manual_seed(7)
        init_(layer.weight, layer.bias)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("init_", [init_linear_, normal_])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_float32_s_numbers_rounded(init_, dtype) -> None:
    full, other = linear(), linear(dtype=dtype)
    torch.manual_seed(7)
    init_(full.weight, full.bias)
    torch.manual_seed(7)
    init_(other.weight, other.bias)
    assert torch.equal(other.weight, full.weight.to(dtype))


@pytest.mark.parametrize("init_", [init_linear_, normal_])
def test_any_strides_and_no_bias(init_) -> None:
    straight, columns = torch.zeros(6, 40), torch.zeros(40, 6).t()
    torch.manual_seed(7)
    init_(straight, None)
    torch.manual_seed(7)
    init_(columns, None)
    assert torch.equal(columns, straight)
    assert straight.count_nonzero() == 240


@pytest.mark.parametrize("init_", [init_linear_, normal_])
def test_parameters_without_data_are_left_alone(init_) -> None:
    meta = linear().to("meta")
    with FakeTensorMode():
        fake = linear()
    before = torch.get_rng_state()
    for layer in (meta, fake):
        init_(layer.weight, layer.bias)
    assert meta.weight.is_meta
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("init_", [init_linear_, normal_])
def test_autograd_notices(init_) -> None:
    layer = linear(8, 1)
    kept = layer(torch.ones(2, 8, requires_grad=True)).sum()
    init_(layer.weight, layer.bias)
    assert layer.weight.grad_fn is None
    assert layer.weight.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()
