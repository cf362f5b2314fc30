"""The forward kernels' source, executed on the CPU: the bits of `rust/core` under every schedule."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.cuda.emulation.build import build
from tests.cuda.emulation.ptx_kernels import Device, Head
from tests.cuda.emulation.shim_kernels import Library, Memory
from vhead.ops import value_head

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEED = 0x9E3779B97F4A7C15 - 2**64
# (N, H, K): tiles that are whole or not, a row below one octet, outputs on both sides of four.
SIZES = [
    (3, 1, 1), (5, 7, 2), (4, 8, 1), (6, 64, 4), (3, 255, 1), (7, 256, 5), (3, 257, 1), (9, 896, 1), (2, 1024, 3),
    (2, 2048, 9), (2, 2050, 1), (5, 4096, 1), (2, 5120, 2),
]  # fmt: skip


@pytest.fixture(scope="module")
def library():
    return build()


def expected(of: Head) -> np.ndarray:
    """What the CPU gives, `[N, K]`."""
    seed = of.seed if of.dropout_p else None
    values = value_head(of.hidden, of.weight, of.bias, dropout_p=of.dropout_p, seed=seed)
    return values.reshape(of.rows, of.outputs).numpy()


def same_bits(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Equal as bits; a NaN is a NaN."""
    nan = np.isnan(found) & np.isnan(wanted)
    return found.shape == wanted.shape and bool(np.all(nan | (found.view(np.uint32) == wanted.view(np.uint32))))


def head(hidden: Tensor, outputs: int = 1, **rest) -> Head:
    return Head(hidden, torch.randn(outputs, hidden.shape[-1]), torch.randn(outputs), **rest)


def run(library, of: Head, *, seed: int = 0, path: str | None = None, **rest) -> np.ndarray:
    device = Device(Library(library, seed), of, path, Memory())
    return device.forward(**rest)[0].array


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_size(library, dtype, dropout_p) -> None:
    for rows, columns, outputs in SIZES:
        of = head(torch.randn(rows, columns).to(dtype), outputs, dropout_p=dropout_p, seed=SEED)
        assert same_bits(run(library, of, seed=columns), expected(of)), (rows, columns, outputs)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_rows_a_warp(library, dtype, dropout_p) -> None:
    for rows, columns in [(1, 8), (5, 264), (9, 896), (16, 2048), (7, 4096), (4, 8192)]:
        of = head(torch.randn(rows, columns).to(dtype), dropout_p=dropout_p, seed=SEED)
        assert same_bits(run(library, of, several_rows=True), expected(of)), (rows, columns)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layout(library, dtype) -> None:
    x = torch.randn(4, 6, 320).to(dtype)
    for hidden in (
        x[..., :64],
        x.transpose(0, 1),
        x.reshape(2, 2, 2, 3, 320).permute(3, 1, 2, 0, 4)[..., 8:72],
        x[0, 0].expand(3, 5, 320),
        x.flatten()[1 : 1 + 3 * 256].view(3, 256),
        x.flatten()[: 4 * 257].view(4, 257)[:, :256],
    ):
        of = head(hidden, 2, dropout_p=0.25, seed=SEED, seed_on_device=True)
        assert same_bits(run(library, of), expected(of)), (hidden.shape, hidden.stride())


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("several_rows", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_are_none(library, dtype, several_rows, dropout_p) -> None:
    """NaN and infinities reach the value of their row, through dropped elements as well."""
    hidden = torch.randn(8, 264)
    hidden[range(4), [0, 7, 100, 263]] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e-40])
    of = head(hidden.to(dtype), dropout_p=dropout_p, seed=SEED)
    values = run(library, of, several_rows=several_rows)
    assert same_bits(values, expected(of))
    assert not np.isfinite(values[:3]).any()


@pytest.mark.parametrize("several_rows", [False, True])
def test_neither_grid_nor_schedule_changes_a_bit(library, several_rows) -> None:
    of = head(torch.randn(23, 520).bfloat16(), dropout_p=0.1, seed=SEED)
    for blocks, seed in [(1, 0), (2, 1), (5, 2), (40, 3)]:
        assert same_bits(run(library, of, blocks=blocks, seed=seed, several_rows=several_rows), expected(of))


def test_the_comparison_can_fail(library) -> None:
    """Negative control: one bit of one element, one row's place in the mask, and the seed are all seen."""
    of = head(torch.randn(6, 264).bfloat16(), dropout_p=0.1, seed=SEED)
    values = run(library, of)
    changed = of.hidden.clone()
    changed.view(torch.int16)[3, 17] ^= 1
    assert not same_bits(values, run(library, Head(changed, of.weight, of.bias, 0.1, SEED)))
    assert not same_bits(values, run(library, Head(of.hidden, of.weight, of.bias, 0.1, SEED ^ 1)))
    shifted = Head(of.hidden[1:], of.weight, of.bias, 0.1, SEED)
    assert not same_bits(values[1:], run(library, shifted))
    assert same_bits(run(library, shifted), expected(shifted))


@pytest.mark.parametrize("several_rows", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_hidden_states_are_read_once(library, dtype, dropout_p, several_rows) -> None:
    """Also by four outputs, and twice by five."""
    for outputs, times in [(1, 1)] if several_rows else [(1, 1), (4, 1), (5, 2)]:
        of = head(torch.randn(16, 1024).to(dtype), outputs, dropout_p=dropout_p, seed=SEED)
        device = Device(Library(library), of, None, Memory())
        values, _ = device.forward(several_rows=several_rows)
        assert device.hidden.bytes_read == times * of.hidden.numel() * of.hidden.element_size()
        assert values.bytes_written == 16 * outputs * 4
