"""A PTX module and its launches."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.cuda.emulation.ptx.errors import LaunchError
from tests.cuda.emulation.ptx.lanes import Blocks, Lanes, Parameters, Shape
from tests.cuda.emulation.ptx.machine import Machine, Program
from tests.cuda.emulation.ptx.memory import Allocation, Memory
from tests.cuda.emulation.ptx.syntax import Kernel, parse

_LARGEST_GRID = (2**31 - 1, 65535, 65535)
_LARGEST_BLOCK = (1024, 1024, 64)
_MOST_THREADS = 1024
_MOST_SHARED = 48 << 10
# Lanes that run side by side: enough to forget numpy's cost of a call, few enough to stay in the cache.
_SIDE_BY_SIDE = 1 << 14


@dataclass(frozen=True)
class Launch:
    """What a launch executed, each instruction once for all lanes that ran it together.

    `instructions` counts by opcode, `executed` by the instruction's number in the kernel.
    """

    instructions: Counter[str]
    executed: tuple[int, ...]


class Module:
    """Kernels of a PTX text, ready to launch."""

    def __init__(self, text: str) -> None:
        self._programs = {name: Program(kernel) for name, kernel in parse(text).items()}

    def without(self, name: str, number: int) -> "Module":
        """A module of one kernel of this one, instruction `number` of it left out: for tests of the tests."""
        module = Module.__new__(Module)
        module._programs = {name: Program(self.kernels[name].without(number))}
        return module

    @property
    def kernels(self) -> dict[str, Kernel]:
        """The kernels by name."""
        return {name: program.kernel for name, program in self._programs.items()}

    def decode(self) -> None:
        """Raises where any kernel has an instruction that is not known."""
        for program in self._programs.values():
            _ = program.steps, program.predicates

    def launch(
        self,
        name: str,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: list[Any],
        memory: Memory,
        *,
        shared: int = 0,
        most_instructions: int = 10_000_000,
    ) -> Launch:
        """Runs a kernel to its end.

        Args:
            name: The kernel's name.
            grid: Blocks by dimension, up to three.
            block: Threads by dimension, up to three; whole warps in all.
            args: A value for each parameter: an `Allocation` or None for a pointer, an int, a float, or anything that
                `bytes` takes (a `ctypes.Structure`) for a struct.
            memory: All that the kernel may touch.
            shared: Bytes of dynamic shared memory.
            most_instructions: How many may be executed before the kernel counts as endless.

        Raises:
            LaunchError: The arguments or the grid do not fit.
            PtxError: Whatever the kernel does wrong.
        """
        program = self._programs.get(name)
        if program is None:
            raise LaunchError(f"no kernel {name}: there are {', '.join(sorted(self._programs))}")
        shape = _shape(program.kernel, grid, block)
        shared_bytes = program.kernel.shared_bytes + shared
        if shared_bytes > _MOST_SHARED:
            raise LaunchError(f"{name}: expected at most {_MOST_SHARED} bytes of shared memory, got {shared_bytes}")
        parameters = Parameters(parameter_bytes(program.kernel, args))
        memory.start_launch()
        executed = np.zeros(len(program.kernel.instructions), np.int64)
        together = max(1, _SIDE_BY_SIDE // shape.threads)
        with np.errstate(all="ignore"):
            for first in range(0, shape.blocks, together):
                blocks = Blocks(shape, first, min(together, shape.blocks - first))
                lanes = Lanes(program.kernel, blocks, memory, parameters, shared_bytes)
                machine = Machine(program, lanes, most_instructions)
                machine.run()
                executed += machine.executed
        counts: Counter[str] = Counter()
        for instruction, times in zip(program.kernel.instructions, executed.tolist(), strict=True):
            counts[".".join((instruction.opcode, *instruction.modifiers))] += times
        return Launch(counts, tuple(executed.tolist()))


def _shape(kernel: Kernel, grid: tuple[int, ...], block: tuple[int, ...]) -> Shape:
    """A grid that a device would take."""
    whole = Shape(_three("grid", grid, _LARGEST_GRID), _three("block", block, _LARGEST_BLOCK))
    most = min(_MOST_THREADS, kernel.threads_limit or _MOST_THREADS)
    if whole.threads > most or whole.threads % 32:
        raise LaunchError(f"{kernel.name}: expected whole warps and at most {most} threads, got {whole.threads}")
    return whole


def _three(name: str, sizes: tuple[int, ...], largest: tuple[int, int, int]) -> tuple[int, int, int]:
    x, y, z = (*sizes, 1, 1)[:3]
    if len(sizes) > 3 or not all(1 <= size <= most for size, most in zip((x, y, z), largest, strict=True)):
        raise LaunchError(f"{name}: expected one to three sizes from 1 to {largest}, got {sizes}")
    return x, y, z


def parameter_bytes(kernel: Kernel, values: list[Any]) -> bytes:
    """The arguments as they lie in the parameters' memory."""
    if len(values) != len(kernel.parameters):
        raise LaunchError(f"{kernel.name}: expected {len(kernel.parameters)} arguments, got {len(values)}")
    laid = bytearray(max((p.offset + p.size for p in kernel.parameters), default=0))
    for parameter, value in zip(kernel.parameters, values, strict=True):
        data = encoded(value, parameter.size)
        if len(data) != parameter.size:
            raise LaunchError(f"{kernel.name}: {parameter.name}: expected {parameter.size} bytes, got {len(data)}")
        laid[parameter.offset : parameter.offset + parameter.size] = data
    return bytes(laid)


def encoded(value: Any, size: int) -> bytes:
    """One argument in memory."""
    match value:
        case None:
            return bytes(size)
        case Allocation():
            return value.address.to_bytes(8, "little")
        case bool() | int():
            return (value % (1 << 8 * size)).to_bytes(size, "little")
        case float():
            return (np.float32(value) if size == 4 else np.float64(value)).tobytes()
        case np.generic():
            return value.tobytes()
        case _:
            return bytes(value)
