"""The backward kernels' PTX, executed: the bits of `rust/core`'s gradients, and the bytes that they move."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.cuda.emulation import ptx_images
from tests.cuda.emulation.ptx_kernels import Device, Head, to_numpy
from vhead import _native

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEED = 0x9E3779B97F4A7C15 - 2**64


@pytest.fixture(scope="module")
def module():
    return ptx_images.module()


def head(hidden: Tensor, outputs: int = 1, **rest) -> Head:
    return Head(hidden, torch.randn(outputs, hidden.shape[-1]), None, **rest)


def gradients_of_values(of: Head) -> Tensor:
    return torch.randn(of.rows, of.outputs)


def expected(of: Head, grad_values: Tensor) -> list[np.ndarray]:
    """The CPU's gradients of hidden states, weight and bias."""
    seed = torch.tensor(of.seed) if of.dropout_p else None
    sizes = of.hidden.shape[:-1] if of.outputs == 1 else (*of.hidden.shape[:-1], of.outputs)
    found = _native.value_head_backward(
        grad_values.reshape(sizes), of.hidden, of.weight, of.dropout_p, seed, (True, True, True)
    )
    return [to_numpy(gradient) for gradient in found]


def same_bits(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Equal as bits; a float32 NaN is a NaN."""
    found, wanted = found.reshape(-1), wanted.reshape(-1)
    if found.dtype == np.float32:
        nan = np.isnan(found) & np.isnan(wanted)
        return bool(np.all(nan | (found.view(np.uint32) == wanted.view(np.uint32))))
    return bool(np.array_equal(found, wanted))


def check(module, of: Head, path: str | None = None) -> None:
    """Every gradient by every kernel that writes it."""
    grad_values = gradients_of_values(of)
    hidden, weight, bias = expected(of, grad_values)
    device = Device(module, of, path)
    both = device.backward(grad_values)
    assert same_bits(both.hidden.array, hidden)
    assert same_bits(device.add_chunks(both.partials).array, weight)
    assert same_bits(device.add_rows(both.grad_values).array, bias)
    frozen = Device(module, of, path)
    only_weight = frozen.backward(grad_values, hidden=False)
    assert same_bits(frozen.add_chunks(only_weight.partials).array, weight)


SIZES = [(8, 3, 1), (512, 5, 1), (520, 130, 1), (1032, 3, 3), (264, 20, 6)]
ODD_SIZES = [(1, 3, 1), (7, 12, 2), (523, 9, 1), (300, 5, 5)]


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_size(module, dtype, dropout_p) -> None:
    for columns, rows, outputs in SIZES + ODD_SIZES:
        check(module, head(torch.randn(rows, columns).to(dtype), outputs, dropout_p=dropout_p, seed=SEED))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layout(module, dtype) -> None:
    x = torch.randn(4, 6, 320).to(dtype)
    for hidden in (
        x[..., :64],
        x.transpose(0, 1)[:, 1:],
        x.reshape(2, 2, 2, 3, 320).permute(3, 1, 2, 0, 4)[..., 8:72],
        x[0, 0].expand(3, 5, 320),
        x.flatten()[1 : 1 + 3 * 256].view(3, 256),
    ):
        check(module, head(hidden, dropout_p=0.25, seed=SEED, seed_on_device=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_scalar_path_gives_the_vector_path_s_bits(module, dtype) -> None:
    check(module, head(torch.randn(5, 1032).to(dtype), dropout_p=0.1, seed=SEED), "scalar")


@pytest.mark.parametrize("chunks", [2, 8, 9, 17])
def test_chunks_are_dealt_to_slots(module, chunks) -> None:
    """Up to the last slot, past it, and with a chunk that is not whole."""
    check(module, head(torch.randn(128 * chunks - 5, 40).bfloat16(), dropout_p=0.1, seed=SEED))


def test_rows_are_added_in_float64(module) -> None:
    """As many rows as lanes, fewer and more; large numbers that cancel, where float32 would lose the small ones."""
    for rows in (1, 255, 256, 1000):
        of = head(torch.randn(rows, 8), 3)
        grad_values = torch.randn(rows, 3) + torch.tensor([1e6, -1e6]).repeat(rows)[:rows, None]
        device = Device(module, of)
        found = device.add_rows(device.memory.input("grad_values", grad_values.numpy())).array
        assert same_bits(found, expected(of, grad_values)[2])


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_are_none(module, dtype, dropout_p) -> None:
    """NaN, infinities and subnormal numbers in the hidden states reach the weight's gradient as on the CPU."""
    hidden = torch.randn(12, 264)
    hidden[range(4), [0, 7, 100, 263]] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e-40])
    of = head(hidden.to(dtype), dropout_p=dropout_p, seed=SEED)
    check(module, of)
    assert not np.isfinite(expected(of, torch.randn(12, 1))[1]).all()


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_backward_moves_little_more_than_it_must(module, dtype, dropout_p) -> None:
    """Hidden states read once and their gradient written once; all that moves is at most 2.05 times the hidden states.

    What the cache holds, the weights and the values' gradients, counts once.
    """
    of = head(torch.randn(512, 1024).to(dtype), dropout_p=dropout_p, seed=SEED)
    device = Device(module, of)
    size = of.hidden.numel() * of.hidden.element_size()
    gradients = device.backward(gradients_of_values(of))
    assert device.hidden.bytes_read == device.hidden.distinct_bytes_read == size
    assert gradients.hidden.bytes_written == gradients.hidden.distinct_bytes_written == size
    grad_weight, grad_bias = device.add_chunks(gradients.partials), device.add_rows(gradients.grad_values)
    assert gradients.partials.bytes_written == gradients.partials.bytes_read == 4 * 4 * of.columns
    small = device.weight.distinct_bytes_read + 2 * gradients.grad_values.distinct_bytes_read
    results = grad_weight.bytes_written + grad_bias.bytes_written
    assert 2 * size + 2 * gradients.partials.bytes_written + small + results <= 2.05 * size


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_frozen_trunk_costs_no_gradient_of_hidden_states(module, dtype) -> None:
    of = head(torch.randn(128, 512).to(dtype))
    device = Device(module, of)
    device.backward(gradients_of_values(of), hidden=False)
    assert device.hidden.bytes_read == of.hidden.numel() * of.hidden.element_size()
    assert device.weight.bytes_read == 0


@pytest.mark.parametrize("outputs", [1, 6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_frozen_head_costs_no_partial_sums(module, dtype, outputs) -> None:
    of = head(torch.randn(130, 264).to(dtype), outputs, dropout_p=0.1, seed=SEED)
    grad_values = gradients_of_values(of)
    gradients = Device(module, of).backward(grad_values, weight=False)
    assert gradients.partials is None
    assert same_bits(gradients.hidden.array, expected(of, grad_values)[0])
