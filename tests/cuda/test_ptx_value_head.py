"""The forward kernels' PTX, executed: the bits of `rust/core`, every access inside, hidden states read once."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.cuda.emulation import ptx_images
from tests.cuda.emulation.ptx_kernels import Device, Head
from vhead.ops import value_head

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEED = 0x9E3779B97F4A7C15 - 2**64  # every bit of both words counts


@pytest.fixture(scope="module")
def module():
    return ptx_images.module()


def head(hidden: Tensor, outputs: int = 1, *, bias: bool = True, **rest) -> Head:
    columns = hidden.shape[-1]
    return Head(hidden, torch.randn(outputs, columns), torch.randn(outputs) if bias else None, **rest)


def expected(of: Head) -> np.ndarray:
    """What the CPU gives, `[N, K]`."""
    seed = of.seed if of.dropout_p else None
    values = value_head(of.hidden, of.weight, of.bias, dropout_p=of.dropout_p, seed=seed)
    return values.reshape(of.rows, of.outputs).numpy()


def same_bits(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Equal as bits; a NaN is a NaN."""
    bits = found.view(np.uint32) == wanted.view(np.uint32)
    return found.shape == wanted.shape and bool(np.all(bits | (np.isnan(found) & np.isnan(wanted))))


# (H, N, K): whole and partial tiles, fewer columns than a warp has threads, and outputs on both sides of four.
SIZES = [(8, 3, 1), (256, 2, 1), (264, 5, 2), (1024, 3, 4), (1536, 2, 5), (2056, 2, 1), (4096, 2, 1)]
ODD_SIZES = [(1, 3, 1), (7, 2, 1), (255, 2, 3), (1003, 3, 1), (1030, 2, 6)]


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_size(module, dtype, dropout_p) -> None:
    for columns, rows, outputs in SIZES + ODD_SIZES:
        one = head(torch.randn(rows, columns).to(dtype), outputs, dropout_p=dropout_p, seed=SEED)
        device = Device(module, one)
        values, _ = device.forward()
        assert device.path == ("vector" if columns % 8 == 0 else "scalar")
        assert same_bits(values.array, expected(one)), (columns, rows, outputs)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_rows_a_warp(module, dtype, dropout_p) -> None:
    """The kernel for many rows: whole groups of rows, and a last group that is not whole."""
    for columns, rows in [(8, 1), (520, 5), (1024, 16), (3072, 7), (8192, 4)]:
        one = head(torch.randn(rows, columns).to(dtype), dropout_p=dropout_p, seed=SEED)
        values, _ = Device(module, one).forward(several_rows=True)
        assert same_bits(values.array, expected(one)), (columns, rows)


def strided(dtype: torch.dtype) -> dict[str, Tensor]:
    """Hidden states that lie in memory in every way that a kernel must follow."""
    x = torch.randn(4, 6, 320).to(dtype)
    return {
        "rows with space between": x[..., :64],
        "outer dimensions swapped": x.transpose(0, 1),
        "three outer dimensions": x.reshape(4, 2, 3, 320).permute(2, 0, 1, 3)[:, 1:],
        "four outer dimensions": x.reshape(2, 2, 2, 3, 320).permute(3, 1, 2, 0, 4)[..., 8:72],
        "one row for all": x[0, 0].expand(3, 5, 320),
        "every other row": x[1:, ::2, 16:],
        "one row": x[2, 3],
        "off by one element": x.flatten()[1 : 1 + 3 * 256].view(3, 256),
        "an odd stride": x.flatten()[: 4 * 257].view(4, 257)[:, :256],
    }


LAYOUTS = sorted(strided(torch.float32))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layout(module, dtype, layout) -> None:
    one = head(strided(dtype)[layout], dropout_p=0.25, seed=SEED)
    device = Device(module, one)
    values, _ = device.forward()
    assert device.path == ("scalar" if layout in {"off by one element", "an odd stride"} else "vector")
    assert same_bits(values.array, expected(one))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_scalar_path_gives_the_vector_path_s_bits(module, dtype) -> None:
    one = head(torch.randn(5, 1288).to(dtype), dropout_p=0.1, seed=SEED)
    by_path = [Device(module, one, path).forward()[0].array for path in ("vector", "scalar")]
    assert same_bits(*by_path)
    assert same_bits(by_path[0], expected(one))


@pytest.mark.parametrize("several_rows", [False, True])
def test_a_row_s_bits_depend_on_no_grid(module, several_rows) -> None:
    one = head(torch.randn(23, 512).bfloat16(), dropout_p=0.1, seed=SEED)
    results = [Device(module, one).forward(blocks=n, several_rows=several_rows)[0].array for n in (1, 2, 5, 40)]
    assert all(same_bits(result, expected(one)) for result in results)


@pytest.mark.parametrize("seed", [0, 1, 2**63, -1, SEED])
def test_the_seed_comes_by_value_or_from_device_memory(module, seed) -> None:
    hidden, weight = torch.randn(3, 512), torch.randn(1, 512)
    heads = [Head(hidden, weight, None, 0.5, seed, on_device) for on_device in (False, True)]
    devices = [Device(module, one) for one in heads]
    values = [device.forward()[0].array for device in devices]
    assert all(same_bits(value, expected(heads[0])) for value in values)
    assert devices[1].seed.distinct_bytes_read == 8
    assert not same_bits(values[0], expected(Head(hidden, weight, None, 0.5, seed ^ 1)))


@pytest.mark.parametrize("dropout_p", [2**-16, 0.484375, 0.5, 1 - 2**-16])
def test_every_probability(module, dropout_p) -> None:
    one = head(torch.randn(3, 1024).half(), dropout_p=dropout_p, seed=SEED)
    assert same_bits(Device(module, one).forward()[0].array, expected(one))


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_are_none(module, dtype, dropout_p) -> None:
    """NaN and infinities reach the value of their row, through dropped elements as well; subnormal numbers are kept."""
    hidden = torch.randn(12, 264)
    hidden[range(4), [0, 7, 100, 263]] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e-40])
    hidden[4] = 1e-40
    one = head(hidden.to(dtype), dropout_p=dropout_p, seed=SEED)
    values = Device(module, one).forward()[0].array
    assert same_bits(values, expected(one))
    assert not np.isfinite(values[:3]).any()
    assert np.isfinite(values[4:]).all()


def test_a_bias_of_minus_zero_is_zero(module) -> None:
    one = Head(torch.zeros(2, 64), torch.randn(1, 64), torch.tensor([-0.0]))
    values = Device(module, one).forward()[0].array
    assert same_bits(values, expected(one))
    assert not np.signbit(values).any()


@pytest.mark.parametrize("several_rows", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_hidden_states_are_read_once(module, dtype, dropout_p, several_rows) -> None:
    """All that moves is at most 1.02 times the hidden states, the weights counted once since the cache holds them."""
    one = head(torch.randn(256, 768).to(dtype), dropout_p=dropout_p, seed=SEED)
    device = Device(module, one)
    values, launch = device.forward(several_rows=several_rows)
    size = one.hidden.numel() * one.hidden.element_size()
    assert device.hidden.bytes_read == device.hidden.distinct_bytes_read == size
    assert values.bytes_written == values.distinct_bytes_written == 4 * one.rows
    assert device.weight.distinct_bytes_read == 4 * one.columns
    assert size + 4 * one.columns + 4 + 4 * one.rows <= 1.02 * size
    assert launch.instructions["ld.global.nc.L1.no_allocate.v4.u32"] > 0


def test_reading_twice_would_be_seen(module) -> None:
    """More than four outputs read the hidden states again for each further four."""
    one = head(torch.randn(4, 512), 9)
    device = Device(module, one)
    device.forward()
    assert device.hidden.bytes_read == 3 * device.hidden.distinct_bytes_read


def test_nothing_is_written_past_the_values(module) -> None:
    """A grid far too large, on rows that are no multiple of anything."""
    one = head(torch.randn(3, 136))
    values, _ = Device(module, one).forward(blocks=64)
    assert values.bytes_written == 12


def test_every_kernel_is_understood(module) -> None:
    """Nothing that rounds in a way of its own, no atomic, in any kernel."""
    module.decode()
    assert len(module.kernels) >= 18
    assert not any(
        instruction.opcode in {"atom", "red"} for k in module.kernels.values() for instruction in k.instructions
    )
