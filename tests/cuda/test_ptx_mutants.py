"""Kernels with one instruction, or one piece of the source, taken away: the PTX tests must turn red for each."""

import re

import numpy as np
import pytest
import torch

from tests.cuda.emulation import ptx_images
from tests.cuda.emulation.ptx import BarrierError, LaunchError, Module, PtxError, RaceError
from tests.cuda.emulation.ptx_kernels import Device, Head, to_numpy
from vhead import _native
from vhead.ops import value_head

SEED = 2**40 + 1
COLUMNS, ROWS, DROPOUT = 523, 9, 0.3
# What computes, stores or orders. Branches and bounds are taken away in the sources below.
CARRIES = {
    "fma",
    "add.rn.f32",
    "add.rn.f64",
    "mul.rn.f32",
    "mul.wide.u32",
    "xor.b32",
    "shfl",
    "redux",
    "st",
    "cvt.rn.bf16x2.f32",
}
SAMPLED = 16
MOST_INSTRUCTIONS = 100_000


class Limited:
    """A module whose kernels may not run for ever."""

    def __init__(self, module: Module) -> None:
        self._module = module

    def launch(self, *args, **rest):
        return self._module.launch(*args, **rest, most_instructions=MOST_INSTRUCTIONS)


def case(columns: int = COLUMNS, outputs: int = 1, *, between: int = 8) -> Head:
    """Rows in two dimensions, with elements `between` them; with none, reading past the last row leaves the memory."""
    torch.manual_seed(1)
    hidden = torch.randn(3, ROWS // 3, columns + between).bfloat16()[..., :columns].transpose(0, 1)
    return Head(hidden, torch.randn(outputs, columns), torch.randn(outputs), DROPOUT, SEED, seed_on_device=True)


def forward(module: Module, of: Head) -> bool:
    """Whether the forward kernel gives the CPU's bits."""
    values, _ = Device(Limited(module), of).forward(blocks=2)
    wanted = value_head(of.hidden, of.weight, of.bias, dropout_p=of.dropout_p, seed=of.seed)
    return np.array_equal(values.array.view(np.uint32).ravel(), wanted.numpy().view(np.uint32).ravel())


def several_rows(module: Module, of: Head) -> bool:
    """The same of the kernel for many rows."""
    values, _ = Device(Limited(module), of).forward(blocks=2, several_rows=True)
    wanted = value_head(of.hidden, of.weight, of.bias, dropout_p=of.dropout_p, seed=of.seed)
    return np.array_equal(values.array.view(np.uint32).ravel(), wanted.numpy().view(np.uint32).ravel())


def backward(module: Module, of: Head) -> bool:
    """Whether the backward kernel gives the CPU's gradients, the weight's added up here: there is one chunk."""
    grad_values = torch.randn(of.rows, of.outputs, generator=torch.Generator().manual_seed(2))
    gradients = Device(Limited(module), of).backward(grad_values)
    sizes = of.hidden.shape[:-1] if of.outputs == 1 else (*of.hidden.shape[:-1], of.outputs)
    needed, seed = (True, True, False), torch.tensor(of.seed)
    hidden, weight, _ = _native.value_head_backward(
        grad_values.reshape(sizes), of.hidden, of.weight, of.dropout_p, seed, needed
    )
    same_weight = np.array_equal((gradients.partials.array[0] + 0.0).view(np.uint32), to_numpy(weight).view(np.uint32))
    return same_weight and np.array_equal(gradients.hidden.array.ravel(), to_numpy(hidden).ravel())


def add_chunks(module: Module, of: Head) -> bool:
    """Whether chunks of partial sums are added as slots."""
    partials = torch.randn(11, 1, of.columns).numpy()
    device = Device(Limited(module), of)
    slots = np.zeros((8, of.columns), np.float32)
    for chunk, partial in enumerate(partials[:, 0]):
        slots[chunk % 8] += partial
    for half in (4, 2, 1):
        slots[:half] += slots[half : 2 * half]
    found = device.add_chunks(device.memory.input("partials", partials)).array
    return np.array_equal(found[0].view(np.uint32), slots[0].view(np.uint32))


def add_rows(module: Module, of: Head) -> bool:
    """Whether a column is added in float64, lane by lane."""
    many = Head(torch.zeros(4500, 8), of.weight[:, :8], None)
    # Large numbers that cancel, so that a digit lost on the way shows in the float32 result.
    grad_values, places = torch.randn(4500, 1), torch.randperm(4500)
    large = torch.randn(1500, 1) * 1e13
    grad_values[places[:1500]], grad_values[places[1500:3000]] = large, -large
    wanted = _native.value_head_backward(grad_values[:, 0], many.hidden, many.weight, 0.0, None, (False, False, True))[
        2
    ]
    device = Device(Limited(module), many)
    found = device.add_rows(device.memory.input("grad_values", grad_values.numpy())).array
    return np.array_equal(found.view(np.uint32), wanted.numpy().view(np.uint32))


KERNELS = {
    "vhead_value_head_bfloat16_scalar_dropout": (forward, case()),
    "vhead_value_head_rows_bfloat16_dropout": (several_rows, case(1032)),
    "vhead_value_head_backward_bfloat16_vector_dropout": (backward, case(520)),
    "vhead_value_head_add_chunks": (add_chunks, case()),
    "vhead_value_head_add_rows": (add_rows, case()),
}


@pytest.fixture(scope="module")
def module() -> Module:
    return ptx_images.module()


def carrying(module: Module, name: str) -> list[int]:
    """Numbers of the instructions that compute, store or order."""
    return [
        number
        for number, instruction in enumerate(module.kernels[name].instructions)
        if instruction.opcode in CARRIES or ".".join((instruction.opcode, *instruction.modifiers)) in CARRIES
    ]


class Recording:
    """A module that notes which instructions its launches reach."""

    def __init__(self, module: Module) -> None:
        self._module, self.reached = module, set()

    def launch(self, *args, **rest):
        launch = self._module.launch(*args, **rest)
        self.reached.update(number for number, times in enumerate(launch.executed) if times)
        return launch


def executed(module: Module, name: str) -> set[int]:
    """Numbers of the instructions that a kernel's case reaches; the kernel must be right with all of them."""
    check, of = KERNELS[name]
    recording = Recording(module)
    assert check(recording, of)
    return recording.reached


def survives(check, mutant: Module, of: Head) -> bool:
    try:
        return check(mutant, of)
    except LaunchError:
        raise
    except PtxError:
        return False


@pytest.mark.parametrize("name", KERNELS)
def test_every_instruction_counts(module, name) -> None:
    check, of = KERNELS[name]
    reached = executed(module, name)
    numbers = [number for number in carrying(module, name) if number in reached]
    sample = np.random.default_rng(0).permutation(numbers)[:SAMPLED].tolist()
    survivors = [n for n in sample if survives(check, module.without(name, n), of)]
    assert [module.kernels[name].instructions[n].text for n in survivors] == []


BARRIERS = [
    "vhead_value_head_backward_bfloat16_vector_dropout",
    "vhead_value_head_add_chunks",
    "vhead_value_head_add_rows",
]


@pytest.mark.parametrize("name", BARRIERS)
def test_every_barrier_counts(module, name) -> None:
    """Each is a race without it, whatever the scheduler happens to do; none is there for nothing."""
    check, of = KERNELS[name]
    several = case(520, outputs=9) if check is backward else of
    instructions = module.kernels[name].instructions
    barriers = sorted(
        executed(module, name) & {n for n, i in enumerate(instructions) if i.opcode in {"bar", "barrier"}}
    )
    assert barriers
    for number in barriers:
        with pytest.raises((RaceError, BarrierError)):
            check(module.without(name, number), several)


# File, what is taken away, what is put there, and the check that must turn red.
TIGHT = case(between=0)
SOURCES = {
    "a bounds test of hidden states": ("elements.cuh", "if (j < rest) octet.words", "octet.words", forward, TIGHT),
    "a bounds test of weights": ("elements.cuh", "j < rest ? load(from + j) : 0.0f", "load(from + j)", forward, TIGHT),
    "a bounds test of a gradient": ("elements.cuh", "if (j < rest) store(elements", "store(elements", backward, TIGHT),
    "a bounds test of values": ("value_head.cu", " && first + i < hidden.count", "", several_rows, case(1032)),
    "a bounds test of sums": (
        "value_head_backward.cu",
        "threadIdx.y == 0 && column < length",
        "threadIdx.y == 0",
        add_chunks,
        TIGHT,
    ),
    "the bias": ("reduce.cuh", "bias + 0.0f", "0.0f", forward, TIGHT),
    "the scale": ("reduce.cuh", "fmaf(sum, scale,", "fmaf(sum, 1.0f,", forward, TIGHT),
    "the scale of gradients": ("value_head_backward.cu", "first + k) * mask.scale", "first + k)", backward, TIGHT),
    "the mask": ("dropout.cuh", ">= threshold ? value : 0.0f", ">= 0 ? value : 0.0f", forward, TIGHT),
    "half of the mask": ("dropout.cuh", "(j % 2 ? word : word << 16)", "(word << 16)", forward, TIGHT),
    "an inner dimension": ("rows.cuh", "outer % size", "outer", forward, TIGHT),
    "a shuffle": ("reduce.cuh", "half = WARP / 2", "half = WARP / 4", forward, TIGHT),
    "the order of octets": (
        "reduce.cuh",
        "((lanes[0] + lanes[1]) + (lanes[2] + lanes[3]))",
        "(((lanes[0] + lanes[1]) + lanes[2]) + lanes[3])",
        forward,
        TIGHT,
    ),
    "a fused multiply-add": ("value_head.cu", "sums[j] = fmaf(", "sums[j] = unfused(", forward, TIGHT),
}
UNFUSED = b"__device__ __forceinline__ float unfused(float a, float b, float c) { return a * b + c; }\n"
# One kernel of each kind is enough, and seconds faster to compile.
KINDS = {
    "value_head.cu": b"FORWARD(vhead_value_head_bfloat16_scalar_dropout, BFloat16, false, true)\n"
    b"FORWARD_ROWS(vhead_value_head_rows_bfloat16_dropout, BFloat16, true)\n",
    "value_head_backward.cu": b"BACKWARD(vhead_value_head_backward_bfloat16_scalar_dropout, "
    b"BFloat16, false, true, true)\n",
}
UNITS = {
    forward: "value_head.cu",
    several_rows: "value_head.cu",
    backward: "value_head_backward.cu",
    add_chunks: "value_head_backward.cu",
}


def fewer_kernels(sources: dict[str, bytes], unit: str) -> dict[str, bytes]:
    """The sources with `unit` alone compiled, for one dtype."""
    text = re.sub(rb"(?m)^(FORWARD|BACKWARD)_OF_DTYPE\(bfloat16, BFloat16\)\n", KINDS[unit], sources[unit])
    text = re.sub(rb"(?m)^(FORWARD|BACKWARD)_OF_DTYPE\(float\d\d, Float\d\d\)\n", b"", text)
    return {**sources, unit: text, "vhead.cu": UNFUSED + f'#include "{unit}"\n'.encode()}


def compiled(sources: dict[str, bytes], unit: str) -> Module:
    return Module(ptx_images.compiled(fewer_kernels(sources, unit), ptx_images.ARCHITECTURE).decode())


@pytest.fixture(scope="module")
def sources() -> dict[str, bytes]:
    return ptx_images.tool("cuda_images").read_sources()


@ptx_images.needs_compiler
@pytest.mark.parametrize("what", SOURCES)
def test_what_the_source_lacks_is_seen(sources, what) -> None:
    file, old, new, check, of = SOURCES[what]
    assert sources[file].count(old.encode()) == 1
    broken = {**sources, file: sources[file].replace(old.encode(), new.encode())}
    assert not survives(check, compiled(broken, UNITS[check]), of)


@ptx_images.needs_compiler
@pytest.mark.parametrize("check", UNITS)
def test_nothing_else_about_them_is_red(sources, check) -> None:
    of = case(1032) if check is several_rows else TIGHT
    assert check(compiled(sources, UNITS[check]), of)
