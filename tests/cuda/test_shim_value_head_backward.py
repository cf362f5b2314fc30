"""The backward kernels' source, executed on the CPU: the bits of `rust/core`'s gradients under every schedule."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.cuda.emulation.build import build
from tests.cuda.emulation.ptx_kernels import Device, Head, to_numpy
from tests.cuda.emulation.shim_kernels import Library, Memory
from vhead import _native

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEED = 0x9E3779B97F4A7C15 - 2**64
# (N, H, K): chunks, blocks of columns, octets and groups of outputs that are whole or not.
SIZES = [
    (3, 1, 1), (130, 7, 2), (3, 8, 1), (129, 64, 4), (5, 255, 1), (20, 257, 5), (140, 520, 1), (3, 896, 1),
    (2, 2050, 3), (3, 4096, 1), (2, 5120, 9),
]  # fmt: skip


@pytest.fixture(scope="module")
def library():
    return build()


def head(hidden: Tensor, outputs: int = 1, **rest) -> Head:
    return Head(hidden, torch.randn(outputs, hidden.shape[-1]), None, **rest)


def expected(of: Head, grad_values: Tensor) -> list[np.ndarray]:
    """The CPU's gradients of hidden states, weight and bias."""
    seed = torch.tensor(of.seed) if of.dropout_p else None
    sizes = of.hidden.shape[:-1] if of.outputs == 1 else (*of.hidden.shape[:-1], of.outputs)
    found = _native.value_head_backward(
        grad_values.reshape(sizes), of.hidden, of.weight, of.dropout_p, seed, (True, True, True)
    )
    return [to_numpy(gradient) for gradient in found]


def is_nan(bits: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Which elements of a half-precision array's bits are NaN."""
    return (bits & 0x7FFF) > {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}[dtype]


def same_bits(found: np.ndarray, wanted: np.ndarray, dtype: torch.dtype = torch.float32) -> bool:
    """Equal as bits; a NaN is a NaN."""
    found, wanted = found.reshape(-1), wanted.reshape(-1)
    if found.dtype == np.float32:
        nan = np.isnan(found) & np.isnan(wanted)
        return bool(np.all(nan | (found.view(np.uint32) == wanted.view(np.uint32))))
    return bool(np.all((found == wanted) | (is_nan(found, dtype) & is_nan(wanted, dtype))))


def check(library, of: Head, *, seed: int = 0, path: str | None = None, grad_values: Tensor | None = None) -> None:
    """Every gradient by every kernel that writes it."""
    grad_values = torch.randn(of.rows, of.outputs) if grad_values is None else grad_values
    hidden, weight, bias = expected(of, grad_values)
    device = Device(Library(library, seed), of, path, Memory())
    both = device.backward(grad_values)
    assert same_bits(both.hidden.array, hidden, of.hidden.dtype)
    assert same_bits(device.add_chunks(both.partials).array, weight)
    assert same_bits(device.add_rows(both.grad_values).array, bias)
    frozen = Device(Library(library, seed), of, path, Memory())
    assert same_bits(frozen.add_chunks(frozen.backward(grad_values, hidden=False).partials).array, weight)
    only_hidden = Device(Library(library, seed), of, path, Memory()).backward(grad_values, weight=False)
    assert same_bits(only_hidden.hidden.array, hidden, of.hidden.dtype)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_size(library, dtype, dropout_p) -> None:
    for rows, columns, outputs in SIZES:
        of = head(torch.randn(rows, columns).to(dtype), outputs, dropout_p=dropout_p, seed=SEED)
        check(library, of, seed=columns)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layout(library, dtype) -> None:
    x = torch.randn(4, 6, 320).to(dtype)
    for hidden in (
        x[..., :64],
        x.transpose(0, 1)[:, 1:],
        x.reshape(2, 2, 2, 3, 320).permute(3, 1, 2, 0, 4)[..., 8:72],
        x[0, 0].expand(3, 5, 320),
        x.flatten()[1 : 1 + 3 * 256].view(3, 256),
    ):
        check(library, head(hidden, 2, dropout_p=0.25, seed=SEED, seed_on_device=True))


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_are_none(library, dtype, dropout_p) -> None:
    """NaN and infinities in hidden states, and in the values' gradients, where the CPU has them."""
    hidden = torch.randn(12, 264)
    hidden[range(4), [0, 7, 100, 263]] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e-40])
    grad_values = torch.randn(12, 2)
    check(library, head(hidden.to(dtype), 2, dropout_p=dropout_p, seed=SEED), grad_values=grad_values)
    grad_values[3], grad_values[5, 1] = torch.inf, torch.nan
    check(library, head(torch.randn(12, 264).to(dtype), 2, dropout_p=dropout_p, seed=SEED), grad_values=grad_values)


@pytest.mark.parametrize("chunks", [1, 8, 9, 17])
def test_chunks_are_dealt_to_slots(library, chunks) -> None:
    for seed in (0, 1, 2):
        check(library, head(torch.randn(128 * chunks - 5, 40).bfloat16(), dropout_p=0.1, seed=SEED), seed=seed)


def test_rows_are_added_in_float64(library) -> None:
    """Fewer rows than lanes, as many and more; large numbers that cancel, where float32 would lose the small ones."""
    for rows, seed in [(1, 0), (255, 1), (256, 2), (1000, 3)]:
        of = head(torch.randn(rows, 8), 3)
        grad_values = torch.randn(rows, 3) + torch.tensor([1e6, -1e6]).repeat(rows)[:rows, None]
        device = Device(Library(library, seed), of, None, Memory())
        found = device.add_rows(device.memory.input("grad_values", grad_values.numpy())).array
        assert same_bits(found, expected(of, grad_values)[2])


def test_the_comparison_can_fail(library) -> None:
    """Negative control: the sign of a zero and the last bit of a gradient are seen."""
    of = head(torch.randn(5, 264).bfloat16(), dropout_p=0.5, seed=SEED)
    hidden, weight, _ = expected(of, torch.randn(5, 1))
    zeros = np.flatnonzero((hidden.reshape(-1) & 0x7FFF) == 0)
    assert len(zeros) > 0
    changed = hidden.copy().reshape(-1)
    changed[zeros[0]] ^= 0x8000
    assert not same_bits(changed, hidden, torch.bfloat16)
    assert not same_bits(np.nextafter(weight, np.float32(np.inf)), weight)
