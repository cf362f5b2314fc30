"""The head's kernels with one piece of the source broken, executed on the CPU: each must show.

Only a few bfloat16 kernels are compiled, which is quick; other dtypes differ in `elements.cuh` alone.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cuda.emulation.build import build, read_sources
from tests.cuda.emulation.ptx_kernels import Device, Head, to_numpy
from tests.cuda.emulation.shim_kernels import EmulationError, Library, Memory
from vhead import _native
from vhead.ops import value_head

SEED = 2**40 + 12345
SCHEDULES = range(4)
OPTIONS = ("-O0", "-fPIC", "-shared", "-Wno-error")


@dataclass(frozen=True)
class Mutant:
    """`broken` stands in `file` once; `instead` takes its place in the kernels of `unit`."""

    name: str
    unit: str
    file: str
    broken: str
    instead: str


def of_forward(name: str, broken: str, instead: str = "", file: str = "value_head.cu") -> Mutant:
    return Mutant(name, "value_head.cu", file, broken, instead)


def of_backward(name: str, broken: str, instead: str = "", file: str = "value_head_backward.cu") -> Mutant:
    return Mutant(name, "value_head_backward.cu", file, broken, instead)


FORWARD = [
    of_forward("no bias", "bias + 0.0f", "0.0f", "reduce.cuh"),
    of_forward("no scale", "scale(dropout.scale)", "scale(1.0f)", "dropout.cuh"),
    of_forward("octets in another order", "((lanes[0] + lanes[1])", "((lanes[0] + lanes[4])", "reduce.cuh"),
    of_forward(
        "halves in another order",
        "half = WARP / 2; half > 0; half /= 2",
        "half = 1; half < WARP; half *= 2",
        "reduce.cuh",
    ),
    of_forward("half a warp folded", "half = WARP / 2; half > 0", "half = WARP / 4; half > 0", "reduce.cuh"),
    of_forward(
        "a shuffle of half a warp",
        "if (threadIdx.x % WARP == 0) store(values + row",
        "if (threadIdx.x % WARP < 16) (void)fold_halves(1.0f); if (threadIdx.x % WARP == 0) store(values + row",
    ),
    of_forward(
        "two roundings",
        "sums[j] = fmaf(Element::get(hidden, j), mask.keep(bits, j, weights[j]), sums[j])",
        "sums[j] = Element::get(hidden, j) * mask.keep(bits, j, weights[j]) + sums[j]",
    ),
    of_forward(
        "dropped elements skipped",
        "sums[j] = fmaf(Element::get(hidden, j)",
        "if (mask.keep(bits, j, 1.0f) != 0.0f) sums[j] = fmaf(Element::get(hidden, j)",
    ),
    of_forward("a multiplier of Philox", "0xD2511F53", "0xD2511F57", "philox.cuh"),
    of_forward("halves of a word swapped", "(j % 2 ? word : word << 16)", "(j % 2 ? word << 16 : word)", "dropout.cuh"),
    of_forward("a threshold one higher", ">= threshold", "> threshold + 0xffff", "dropout.cuh"),
    of_forward(
        "the seed by value alone",
        "dropout.seed_address ? load(dropout.seed_address) : dropout.seed",
        "dropout.seed",
        "dropout.cuh",
    ),
    of_forward(
        "no test of the last tile", "if (octet < octets) add_octet(octet, 0, false);", "add_octet(octet, 0, false);"
    ),
    of_forward("an octet too many", "current + AHEAD * WARP < octets)", "current + AHEAD * WARP <= octets)"),
    of_forward("no octets ahead", "if (more) fetch(octet + AHEAD * WARP, tile, i);"),
    of_forward("a row too many", "first + i < from.count ? first + i : from.count - 1", "first + i"),
    of_forward("values of rows that are none", " && first + i < hidden.count"),
    of_forward("outputs past the last", "if (output < rest) {", "{"),
    of_forward(
        "outputs of the first group", "values + row * outputs + first + output", "values + row * outputs + output"
    ),
    of_forward("the last group's weights", "static_cast<u64>(first) * hidden.columns", "0"),
    of_forward("a grid of one turn", "row += warps_in_grid()", "row = hidden.count"),
    of_forward("warps that overlap", "blockIdx.x) * FORWARD_WARPS +", "blockIdx.x) +"),
    of_forward(
        "dimensions in falling order",
        "for (u32 i = MOST_DIMENSIONS; i-- > 0;)",
        "for (u32 i = 0; i < MOST_DIMENSIONS; ++i)",
        "rows.cuh",
    ),
    of_forward("elements past a row's end", "if (j < rest) octet.words", "if (true) octet.words", "elements.cuh"),
    of_forward(
        "a vector that is not aligned",
        "load_once(reinterpret_cast<const Quad*>(from) + i)",
        "load_once(reinterpret_cast<const Quad*>(from + 2) + i)",
        "elements.cuh",
    ),
    of_forward(
        "the lower half as the upper",
        "word & 0xffff0000 : word << 16",
        "word << 16 : word & 0xffff0000",
        "elements.cuh",
    ),
]

BACKWARD = [
    of_backward("no barrier after the rows", "gradients, 0);\n    __syncthreads();", "gradients, 0);"),
    of_backward("no barrier before more outputs", "if (first > 0) {\n            __syncthreads();", "if (first > 0) {"),
    of_backward(
        "no barrier after more outputs", "gradients, first);\n            __syncthreads();", "gradients, first);"
    ),
    of_backward(
        "no barrier between slots",
        "        __syncthreads();\n        if (threadIdx.y < half)",
        "        if (threadIdx.y < half)",
    ),
    of_backward("no barrier between octets", "] = sum;\n    __syncthreads();", "] = sum;"),
    of_backward("no scale", "first + k) * mask.scale", "first + k)"),
    of_backward("no scale of more outputs", "load(grad_values + k) * mask.scale", "load(grad_values + k)"),
    of_backward(
        "kept hidden states alone",
        "gradient[j] = scaled * mask.keep(bits, j, weight[j])",
        "gradient[j] = scaled * weight[j]",
    ),
    of_backward(
        "dropped elements without a sign",
        "gradient[j] = scaled * mask.keep(bits, j, weight[j])",
        "gradient[j] = mask.keep(bits, j, scaled * weight[j])",
    ),
    of_backward("dropped rows in the sums", "fmaf(mask.keep(bits, j, scaled),", "fmaf(scaled,"),
    of_backward(
        "dropped elements skipped",
        "sums[k][j] = fmaf(mask.keep",
        "if (mask.keep(bits, j, 1.0f) != 0.0f) sums[k][j] = fmaf(mask.keep",
    ),
    of_backward(
        "more outputs in two roundings",
        "fmaf(scaled, mask.keep(bits, j, weight[j]), gradient[j])",
        "scaled * mask.keep(bits, j, weight[j]) + gradient[j]",
    ),
    of_backward("a row of the mask of its own chunk", "chunk.masks[i] = mask.row(row)", "chunk.masks[i] = mask.row(i)"),
    of_backward("chunks that overlap", "blockIdx.x) * CHUNK", "blockIdx.x) * (CHUNK - 1)"),
    of_backward("a chunk that is too long", "rest < CHUNK ? static_cast<u32>(rest) : CHUNK", "CHUNK"),
    of_backward("a row too early", "fetch(i, row + AHEAD);", "fetch(i, row + AHEAD - 1);"),
    of_backward("octets past the row's end", "const bool inside = octet <", "const bool inside = octet <="),
    of_backward(
        "blocks of columns that overlap", "blockIdx.y * BACKWARD_THREADS", "blockIdx.y * (BACKWARD_THREADS / 2)"
    ),
    of_backward("hidden states' gradient once a group", " && first == 0) {", ") {"),
    of_backward("chunks in the order they come", "chunk += SLOTS) sum", "chunk += 1) sum"),
    of_backward(
        "slots in another order", "u32 half = SLOTS / 2; half > 0; half /= 2", "u32 half = 1; half < SLOTS; half *= 2"
    ),
    of_backward("rows in float32", "double sum = 0.0;", "float sum = 0.0f;"),
    of_backward(
        "lanes that are no octets",
        "distance = 1; distance < OCTET; distance *= 2",
        "distance = 4; distance < WARP; distance *= 2",
    ),
    of_backward("a store past the row's end", "if (j < rest) store", "if (true) store", "elements.cuh"),
]


# The kernels that the checks below run.
UNITS = {
    "value_head.cu": """
FORWARD(vhead_value_head_bfloat16_vector_dropout, BFloat16, true, true)
FORWARD(vhead_value_head_bfloat16_scalar_dropout, BFloat16, false, true)
FORWARD_ROWS(vhead_value_head_rows_bfloat16, BFloat16, false)
FORWARD_ROWS(vhead_value_head_rows_bfloat16_dropout, BFloat16, true)
""",
    "value_head_backward.cu": """
BACKWARD(vhead_value_head_backward_bfloat16_vector_dropout, BFloat16, true, true, true)
BACKWARD(vhead_value_head_backward_bfloat16_scalar_dropout, BFloat16, false, true, true)
""",
}


def library(unit: str, mutant: Mutant | None = None) -> Path:
    """The kernels of a unit, of which one piece may be broken."""
    files = read_sources()
    if mutant:
        assert files[mutant.file].count(mutant.broken) == 1, "a mutant's text has to stand in its file once"
        files[mutant.file] = files[mutant.file].replace(mutant.broken, mutant.instead)
    files[unit], removed = re.subn(r"\n\w+_OF_DTYPE\(\w+, \w+\)(?=\n)", "", files[unit])
    assert removed == 3
    files[unit] += UNITS[unit]
    return build(files, unit=unit, options=OPTIONS)


def same(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Equal as bits; a NaN is a NaN."""
    found, wanted = found.reshape(-1), wanted.reshape(-1)
    if found.dtype == np.float32:
        nan = np.isnan(found) & np.isnan(wanted)
        return bool(np.all(nan | (found.view(np.uint32) == wanted.view(np.uint32))))
    nan = ((found & 0x7FFF) > 0x7F80) & ((wanted & 0x7FFF) > 0x7F80)
    return bool(np.all(nan | (found == wanted)))


def head(rows: int, columns: int, outputs: int = 1, *, dropout_p: float = 0.3) -> Head:
    """Rows that lie apart in three dimensions, with an infinity among them."""
    generator = torch.Generator().manual_seed(columns)
    hidden = torch.randn(rows, 3, columns + 8, generator=generator).bfloat16()[:, :, :columns].transpose(0, 1)
    hidden[1, rows // 2, columns // 3 : columns // 3 + 4] = torch.inf
    weight, bias = (torch.randn(outputs, n, generator=generator) for n in (columns, 1))
    return Head(hidden, weight, bias[:, 0], dropout_p, SEED, seed_on_device=columns % 16 == 0)


def forward_is_right(path: Path, seed: int) -> Iterator[bool]:
    cases = [(head(3, 520), False), (head(2, 1040, 6), False), (head(3, 1301, 2), False), (head(3, 776), True)]
    more = [(head(3, 40), True), (head(3, 1040, dropout_p=0.0), True)]
    # Enough elements for some of them to have just the threshold's bits.
    many = [(head(10, 8192), True)] if seed == 0 else []
    for of, several in [*cases, *more, *many]:
        device = Device(Library(path, seed), of, None, Memory())
        values, _ = device.forward(blocks=2, several_rows=several)
        seed_of_mask = of.seed if of.dropout_p else None
        wanted = value_head(of.hidden, of.weight, of.bias, dropout_p=of.dropout_p, seed=seed_of_mask)
        yield same(values.array, wanted.numpy())
        rows = -(-of.rows // 4) * 4 if several else of.rows * -(-of.outputs // 4)
        yield device.hidden.bytes_read == rows * of.columns * 2


def backward_is_right(path: Path, seed: int) -> Iterator[bool]:
    for of in (head(45, 520), head(2, 1040, 6), head(3, 301, 2), head(400, 8, 9)):
        grad_values = torch.randn(of.rows, of.outputs, generator=torch.Generator().manual_seed(1))
        # Large numbers that cancel: float32 would lose the digits of the others.
        grad_values[: of.rows // 4] *= 1e12
        grad_values[of.rows // 4 : of.rows // 4 * 2] = -grad_values[: of.rows // 4]
        sizes = of.hidden.shape[:-1] if of.outputs == 1 else (*of.hidden.shape[:-1], of.outputs)
        wanted = _native.value_head_backward(
            grad_values.reshape(sizes), of.hidden, of.weight, of.dropout_p, torch.tensor(of.seed), (True, True, True)
        )
        device = Device(Library(path, seed), of, None, Memory())
        both = device.backward(grad_values)
        found = [both.hidden, device.add_chunks(both.partials), device.add_rows(both.grad_values)]
        yield from (same(a.array, to_numpy(b)) for a, b in zip(found, wanted, strict=True))
        yield both.hidden.bytes_written == both.hidden.array.nbytes


def survives(check: Callable[[Path, int], Iterator[bool]], path: Path) -> bool:
    """Whether no schedule shows anything."""
    try:
        return all(all(check(path, seed)) for seed in SCHEDULES)
    except EmulationError:
        return False


def names(mutants: list[Mutant]) -> list[str]:
    return [mutant.name for mutant in mutants]


def test_whole_kernels_survive() -> None:
    assert survives(forward_is_right, library("value_head.cu"))
    assert survives(backward_is_right, library("value_head_backward.cu"))


@pytest.mark.parametrize("mutant", FORWARD, ids=names(FORWARD))
def test_mutants_of_the_forward_kernels_are_caught(mutant) -> None:
    assert not survives(forward_is_right, library("value_head.cu", mutant))


@pytest.mark.parametrize("mutant", BACKWARD, ids=names(BACKWARD))
def test_mutants_of_the_backward_kernels_are_caught(mutant) -> None:
    assert not survives(backward_is_right, library("value_head_backward.cu", mutant))
