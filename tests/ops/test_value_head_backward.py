"""Backward: gradients, what is kept for them, and what does not change their bits."""

import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.ops.conftest import DTYPES, HALVES, Case, rms, same_bits
from vhead.ops import value_head, value_head_plain


def differentiate(head, c: Case, **arguments) -> Case:
    c = c.leaves()
    head(*c.tensors, **arguments).sin().sum().backward()
    return c


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_as_exact_as_the_twin_s(case, dtype, outputs, p) -> None:
    c = case(40, 9, 130, outputs=outputs, dtype=dtype)
    upstream = torch.randn(value_head(*c.tensors).shape)

    def gradients(head, c: Case) -> tuple[torch.Tensor, ...]:
        leaves = c.leaves().tensors
        values = head(*leaves, dropout_p=p, seed=4)
        return torch.autograd.grad(values, leaves, upstream.to(values.dtype))

    ours, plain, exact = (
        gradients(value_head, c),
        gradients(value_head_plain, c),
        gradients(value_head_plain, c.double()),
    )
    for mine, twin, true in zip(ours, plain, exact, strict=True):
        assert mine.dtype == twin.dtype
        assert mine.shape == true.shape
        assert rms(mine - true) <= 1.5 * rms(twin - true) + 2e-7 * rms(true)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_weights_get_half_precision_gradients(case, dtype) -> None:
    c = case(8, 33, dtype=dtype)
    halves = differentiate(value_head, Case(c.hidden, c.weight.to(dtype), c.bias.to(dtype)))
    floats = differentiate(value_head, Case(c.hidden, c.weight.to(dtype).float(), c.bias.to(dtype).float()))
    for half, full in zip(halves.gradients(), floats.gradients(), strict=True):
        assert half.dtype == dtype
        assert same_bits(half, full.to(dtype))


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=3)))
def test_only_what_is_needed_is_computed(case, needed) -> None:
    c = case(6, 40, outputs=2)
    every = differentiate(value_head, c, dropout_p=0.2, seed=1)
    some = c.leaves()
    for tensor, need in zip(some.tensors, needed, strict=True):
        tensor.requires_grad_(need)
    values = value_head(*some.tensors, dropout_p=0.2, seed=1)
    assert values.requires_grad == any(needed)
    if any(needed):
        values.sin().sum().backward()
    for tensor, full, need in zip(some.tensors, every.gradients(), needed, strict=True):
        assert same_bits(tensor.grad, full) if need else tensor.grad is None


def test_without_a_bias(case) -> None:
    c = case(6, 40).leaves()
    value_head(c.hidden, c.weight).sum().backward()
    torch.testing.assert_close(c.weight.grad[0], c.hidden.detach().sum(0))
    torch.testing.assert_close(c.hidden.grad, c.weight.detach().expand(6, 40))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradients_do_not_depend_on_strides_or_threads(case, p, two_threads) -> None:
    c = case(600, 3, 200, outputs=2, dtype=torch.bfloat16)
    many = differentiate(value_head, c, dropout_p=p, seed=2)
    torch.set_num_threads(1)
    one = differentiate(value_head, c, dropout_p=p, seed=2)
    leaves = c.leaves()
    strided = leaves.hidden.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    value_head(strided, leaves.weight, leaves.bias, dropout_p=p, seed=2).sin().sum().backward()
    other = differentiate(value_head, c, dropout_p=p, seed=3)
    for a, b, d in zip(one.gradients(), many.gradients(), (strided.grad, *leaves.gradients()[1:]), strict=True):
        assert same_bits(a, b)
        assert same_bits(a.contiguous(), d.contiguous())
    assert not same_bits(other.weight.grad, one.weight.grad) or p == 0


@pytest.mark.parametrize("sizes", [(0, 5), (2, 0, 5)])
def test_no_rows(case, sizes) -> None:
    c = differentiate(value_head, case(*sizes), dropout_p=0.5, seed=1)
    assert c.hidden.grad.shape == sizes
    assert torch.equal(c.weight.grad, torch.zeros(1, 5))
    assert torch.equal(c.bias.grad, torch.zeros(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_backward_keeps_hidden_weight_and_seed_only(case, dtype, p) -> None:
    c = case(64, 32, dtype=dtype).leaves()
    seed = torch.tensor(6)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        value_head(*c.tensors, dropout_p=p, seed=seed)
    addresses = {c.hidden.data_ptr(), c.weight.data_ptr(), *([seed.data_ptr()] if p else [])}
    assert {tensor.data_ptr() for tensor in kept} == addresses
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        value_head_plain(*c.tensors, dropout_p=0.5, seed=seed)
    assert {tensor.data_ptr() for tensor in kept} > addresses, "the check can fail"


def test_changing_what_is_kept_is_an_error(case) -> None:
    c = case(4, 8).leaves()
    values = value_head(*c.tensors)
    with torch.no_grad():
        c.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        values.sum().backward()


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_float64_gradients_by_finite_differences(case, p) -> None:
    c = case(2, 3, 9, outputs=2).double().leaves()

    def head(*tensors):
        return value_head(*tensors, dropout_p=p, seed=1)

    assert torch.autograd.gradcheck(head, c.tensors)
    assert torch.autograd.gradgradcheck(head, c.tensors)


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_double_backward_is_the_twin_s(case, outputs, p) -> None:
    def twice(head, c: Case) -> Case:
        c = c.leaves()
        values = head(*c.tensors, dropout_p=p, seed=2).sin()
        gradients = torch.autograd.grad(values.sum(), c.tensors[:2], create_graph=True)
        sum(gradient.square().mean() for gradient in gradients).backward()
        return c

    c = case(5, 30, outputs=outputs)
    ours, exact = twice(value_head, c), twice(value_head_plain, c.double())
    for mine, true in zip(ours.gradients(), exact.gradients(), strict=True):
        torch.testing.assert_close(mine, true.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_draws_the_same_mask_again(case, reentrant) -> None:
    c = case(30, 64)

    def run(*, checkpointed: bool, preserve: bool = True) -> Case:
        leaves = c.leaves()

        def layer(hidden):
            return value_head(hidden * 2, leaves.weight, leaves.bias, dropout_p=0.4)

        torch.manual_seed(3)
        if checkpointed:
            values = checkpoint(layer, leaves.hidden, use_reentrant=reentrant, preserve_rng_state=preserve)
        else:
            values = layer(leaves.hidden)
        values.sin().sum().backward()
        return leaves

    plain, again = run(checkpointed=False), run(checkpointed=True)
    forgetful = run(checkpointed=True, preserve=False)
    for a, b in zip(plain.gradients(), again.gradients(), strict=True):
        assert same_bits(a, b)
    assert not same_bits(forgetful.weight.grad, plain.weight.grad), "the check can fail"
