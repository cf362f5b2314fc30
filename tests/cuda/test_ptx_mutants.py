"""Kernels with one instruction, or one piece of the source, taken away: the PTX tests must turn red for each."""

import numpy as np
import pytest
import torch
from emulation import ptx_images
from emulation.ptx import BarrierError, LaunchError, Module, PtxError, RaceError
from emulation.ptx_kernels import Device, Head, to_numpy

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


def case(columns: int = COLUMNS, outputs: int = 1) -> Head:
    torch.manual_seed(1)
    hidden = torch.randn(3, ROWS // 3, columns + 8).bfloat16()[..., :columns].transpose(0, 1)
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
    many = Head(torch.zeros(300, 8), of.weight[:, :8], None)
    # Large numbers that cancel, so that a digit lost on the way shows in the float32 result.
    grad_values, places = torch.randn(300, 1), torch.randperm(300)
    large = torch.randn(100, 1) * 1e13
    grad_values[places[:100]], grad_values[places[100:200]] = large, -large
    wanted = _native.value_head_backward(grad_values[:, 0], many.hidden, many.weight, 0.0, None, (False, False, True))[
        2
    ]
    device = Device(Limited(module), many)
    found = device.add_rows(device.memory.input("grad_values", grad_values.numpy())).array
    return np.array_equal(found.view(np.uint32), wanted.numpy().view(np.uint32))


KERNELS = {
    "vhead_forward_bfloat16_scalar_dropout": (forward, case()),
    "vhead_forward_rows_bfloat16_dropout": (several_rows, case(1032)),
    "vhead_backward_bfloat16_vector_dropout": (backward, case(520)),
    "vhead_add_chunks": (add_chunks, case()),
    "vhead_add_rows": (add_rows, case()),
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


def executed(module: Module, name: str) -> set[int]:
    """Numbers of the instructions that a kernel's case reaches."""
    reached: set[int] = set()

    class Recording(Module):
        def __init__(self) -> None:
            pass

        def launch(self, *args, **rest):
            launch = module.launch(*args, **rest)
            reached.update(number for number, times in enumerate(launch.executed) if times)
            return launch

    check, of = KERNELS[name]
    assert check(Recording(), of)
    return reached


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


BARRIERS = ["vhead_backward_bfloat16_vector_dropout", "vhead_add_chunks", "vhead_add_rows"]


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
