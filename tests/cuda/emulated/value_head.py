"""torch, Rust, cudarc, driver, kernel: values and gradients have the CPU's bits, by the CUDA key's functions."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.cuda.emulated import device
from tests.cuda.emulated.conftest import DTYPES, same_bits
from vhead import _native

ALL = [True, True, True]
SHAPES = [((5, 64), 1), ((3, 7, 520), 1), ((131, 37), 3), ((4, 896), 5), ((2, 1), 1), ((1, 4096), 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sizes", "outputs"), SHAPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_same_bits_as_the_cpu(head, dtype, sizes, outputs, p) -> None:
    hidden, weight, bias = head(*sizes, outputs=outputs, dtype=dtype)
    seed = torch.tensor(-77) if p else None
    values = device.value_head(hidden, weight, bias, p, seed)
    assert same_bits(values, _native.value_head(hidden, weight, bias, p, seed))
    grad = torch.randn(values.shape)
    ours = device.value_head_backward(grad, hidden, weight, p, seed, ALL)
    for a, b in zip(ours, _native.value_head_backward(grad, hidden, weight, p, seed, ALL), strict=True):
        assert same_bits(a, b)


def test_the_comparison_can_fail(head) -> None:
    hidden, weight, bias = head(5, 64)
    values = device.value_head(hidden, weight, bias, 0.3, 1)
    assert not same_bits(values, _native.value_head(hidden, weight, bias, 0.3, torch.tensor(2)))
    assert not same_bits(values, torch.nextafter(values, torch.zeros(())))


def test_nothing_finite_is_needed(head) -> None:
    hidden, weight, bias = head(6, 64)
    hidden[0, 3], hidden[1, 5], hidden[2, 7] = float("nan"), float("inf"), -float("inf")
    for p in (0.0, 0.9):
        ours = device.value_head(hidden, weight, bias, p, 3)
        assert same_bits(ours, _native.value_head(hidden, weight, bias, p, torch.tensor(3)))
        assert ours[0].isnan()


LAYOUTS = {
    "batch after time": (lambda x: x.transpose(0, 1), "vector", 2),
    "expanded rows": (lambda x: x[:1].expand(4, -1, -1), "vector", 2),
    "first columns": (lambda x: x[..., :40], "vector", 1),
    "shifted columns": (lambda x: x[..., 1:41], "scalar", 1),
    "every second column": (lambda x: x[..., ::2], "vector", 1),
    "one row": (lambda x: x[1, 2], "vector", 0),
    "odd width": (lambda x: x[..., :39], "scalar", 1),
    "every second row": (lambda x: x[:, ::2], "vector", 2),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(driver, dtype, layout) -> None:
    view, path, dimensions = LAYOUTS[layout]
    hidden = view(torch.randn(4, 5, 80).to(dtype))
    weight, bias = torch.randn(2, hidden.shape[-1]), torch.randn(2)
    values = device.value_head(hidden, weight, bias)
    assert same_bits(values, _native.value_head(hidden, weight, bias))
    [line] = driver.launches()
    assert f"_{path} " in line
    assert f"dimensions={dimensions} " in line
    grad = torch.randn(values.shape)
    ours = device.value_head_backward(grad, hidden, weight, 0.2, 9, ALL)
    for a, b in zip(ours, _native.value_head_backward(grad, hidden, weight, 0.2, torch.tensor(9), ALL), strict=True):
        assert same_bits(a, b)


def test_five_dimensions_that_do_not_merge_are_copied(driver) -> None:
    hidden = torch.randn(4, 4, 4, 4, 4, 8)[::2, ::2, ::2, ::2, ::2]
    weight, bias = torch.randn(1, 8), torch.randn(1)
    assert same_bits(device.value_head(hidden, weight, bias), _native.value_head(hidden, weight, bias))
    assert "dimensions=1 " in driver.launches()[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_share_a_warp(driver, head, dtype) -> None:
    hidden, weight, bias = head(8195, 8, dtype=dtype)
    assert same_bits(device.value_head(hidden, weight, bias), _native.value_head(hidden, weight, bias))
    ours = device.value_head(hidden[:8191], weight, bias)
    assert same_bits(ours, _native.value_head(hidden[:8191], weight, bias))
    name = str(dtype).removeprefix("torch.")
    assert driver.kernels() == [f"value_head_rows_{name}", f"value_head_{name}_vector"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_upcast_where_they_are_halves(head, dtype) -> None:
    hidden, weight, bias = head(3, 64, dtype=torch.bfloat16)
    weight, bias = weight.to(dtype), bias.to(dtype)
    assert same_bits(device.value_head(hidden, weight, bias), _native.value_head(hidden, weight, bias))


def test_weights_anywhere(driver, head) -> None:
    hidden, _, _ = head(3, 64)
    flat = torch.randn(65)
    for weight, path in ((flat[1:], "scalar"), (flat[:64], "vector"), (torch.randn(64, 2).t(), "vector")):
        assert same_bits(device.value_head(hidden, weight), _native.value_head(hidden, weight))
        assert f"_{path} " in driver.launches()[0]


def test_gradients_that_are_not_needed_are_not_computed(driver, head) -> None:
    hidden, weight, _ = head(5, 64)
    grad = torch.randn(5)
    whole = device.value_head_backward(grad, hidden, weight, 0.0, None, ALL)
    assert driver.kernels() == ["value_head_backward_float32_vector", "value_head_add_chunks", "value_head_add_rows"]
    kernels = {
        (True, False, False): ["value_head_backward_float32_vector"],
        (False, True, False): ["value_head_backward_weight_float32_vector", "value_head_add_chunks"],
        (False, False, True): ["value_head_add_rows"],
        (True, False, True): ["value_head_backward_float32_vector", "value_head_add_rows"],
        (False, False, False): [],
    }
    for needed, expected in kernels.items():
        some = device.value_head_backward(grad, hidden, weight, 0.0, None, needed)
        assert driver.kernels() == expected
        for gradient, of_whole, need in zip(some, whole, needed, strict=True):
            assert same_bits(gradient, of_whole if need else None)


def test_a_frozen_trunk_has_null_where_its_gradient_would_go(driver, head) -> None:
    hidden, weight, _ = head(5, 64)
    device.value_head_backward(torch.randn(5), hidden, weight, 0.0, None, [True, False, False])
    assert driver.launches()[0].endswith("pointer pointer null")


def test_upstream_gradients_of_any_strides(head) -> None:
    hidden, weight, _ = head(300, 40, outputs=2)
    for grad in (torch.ones(()).expand(300, 2), torch.randn(2, 300).t()):
        ours = device.value_head_backward(grad, hidden, weight, 0.0, None, ALL)
        for a, b in zip(ours, _native.value_head_backward(grad, hidden, weight, 0.0, None, ALL), strict=True):
            assert same_bits(a, b)


def test_no_rows(driver, head) -> None:
    hidden, weight, bias = head(0, 3, 16, outputs=2)
    assert device.value_head(hidden, weight, bias).shape == (0, 3, 2)
    grad_hidden, grad_weight, grad_bias = device.value_head_backward(
        torch.randn(0, 3, 2), hidden, weight, 0.0, None, ALL
    )
    assert grad_hidden.shape == hidden.shape
    assert same_bits(grad_weight, torch.zeros(2, 16))
    assert same_bits(grad_bias, torch.zeros(2))
    assert not any(kernel.startswith("value_head") for kernel in driver.kernels())


def test_seeds_are_read_where_they_are(driver, head) -> None:
    hidden, weight, bias = head(4, 64)
    seed = torch.tensor([5, -(2**63) + 11])
    on_device = device.value_head(hidden, weight, bias, 0.5, seed[1])
    assert "seed=address" in driver.launches()[0]
    by_value = device.value_head(hidden, weight, bias, 0.5, -(2**63) + 11)
    assert "seed=value" in driver.launches()[0]
    assert same_bits(on_device, by_value)
    seed[1] += 1  # a captured launch would read the new one
    assert not same_bits(on_device, device.value_head(hidden, weight, bias, 0.5, seed[1]))


def test_the_mask_is_the_cpu_s() -> None:
    hidden, weight = torch.eye(40), torch.ones(40)
    mask = _native.apply_dropout(torch.ones(40, 40), 0.25, 6, 0)
    values = device.value_head(hidden, weight, None, 0.25, 6)
    assert torch.equal(values != 0, mask.diagonal() != 0)
    grad_hidden, _, _ = device.value_head_backward(torch.ones(40), hidden, weight, 0.25, 6, [True, False, False])
    assert torch.equal(grad_hidden != 0, mask != 0)


def test_python_threads_side_by_side(head) -> None:
    hidden, weight, bias = head(200, 64, dtype=torch.bfloat16)
    expected = _native.value_head(hidden, weight, bias)
    with ThreadPoolExecutor(4) as pool:
        for values in pool.map(lambda _: device.value_head(hidden, weight, bias), range(12)):
            assert same_bits(values, expected)
