"""The state of some blocks' threads: registers, special registers and the memories that they see."""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tests.cuda.emulation.ptx.errors import AccessError
from tests.cuda.emulation.ptx.memory import Memory, Shared
from tests.cuda.emulation.ptx.syntax import Kernel, bits

Array: TypeAlias = NDArray[Any]
# Which lanes an instruction is for: all of them, or their numbers in rising order.
At: TypeAlias = slice | NDArray[np.intp]

ALL = slice(None)
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
# What a register holds before anything is written to it; no kernel may depend on it.
_UNWRITTEN = 0xDEADBEEFDEADBEEF


@dataclass(frozen=True)
class Shape:
    """Threads of a block and blocks of a grid, by dimension."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.block[0] * self.block[1] * self.block[2]

    @property
    def blocks(self) -> int:
        """Blocks of the grid."""
        return self.grid[0] * self.grid[1] * self.grid[2]


@dataclass(frozen=True)
class Blocks:
    """Consecutive blocks of a grid."""

    shape: Shape
    first: int
    count: int


class Parameters:
    """The kernel's arguments, which lie in a memory of their own."""

    def __init__(self, data: bytes) -> None:
        self._data = np.frombuffer(data, np.uint8)

    def read(self, addresses: Array, size: int) -> Array:
        """`[lanes, size]` bytes."""
        first = addresses.astype(np.int64)
        if (first % size).any() or first.min() < 0 or first.max() + size > len(self._data):
            raise AccessError(f"a load of {size} bytes at byte {first.max()} of {len(self._data)} bytes of parameters")
        return self._data[first[:, None] + np.arange(size)]


class Lanes:
    """Some blocks of a grid, one lane a thread."""

    def __init__(
        self, kernel: Kernel, blocks: Blocks, memory: Memory, parameters: Parameters, shared_bytes: int
    ) -> None:
        shape = blocks.shape
        self.count, self.threads, self.memory = blocks.count * shape.threads, shape.threads, memory
        self.numbers = np.arange(self.count, dtype=np.int32)
        self.global_numbers = (self.numbers + blocks.first * shape.threads).astype(np.int32)
        self.parameters, self.shared = parameters, Shared(blocks.count, shared_bytes, shape.threads)
        self._kernel, self._registers = kernel, {}
        self._special = special_registers(shape, blocks.first, blocks.count)

    def register(self, name: str) -> Array:
        """A register of all lanes: unsigned integers of its width, or booleans."""
        array = self._registers.get(name)
        if array is None:
            kind = self._kernel.register_type(name)
            dtype = np.bool_ if kind == "pred" else UNSIGNED[bits(kind)]
            unwritten = True if kind == "pred" else _UNWRITTEN % (1 << bits(kind))
            array = self._registers[name] = np.full(self.count, unwritten, dtype)
        return array

    def special(self, name: str) -> Array:
        """A special register of all lanes."""
        return self._special[name]


def special_registers(shape: Shape, first: int, blocks: int) -> dict[str, Array]:
    """`%tid.x` and the like, for each lane."""
    thread, block = (
        np.tile(np.arange(shape.threads), blocks),
        np.repeat(np.arange(first, first + blocks), shape.threads),
    )
    values: dict[str, Any] = {"%laneid": thread % 32}
    for name, number, sizes in (("tid", thread, shape.block), ("ctaid", block, shape.grid)):
        x, y, _ = sizes
        places = (number % x, number // x % y, number // (x * y))
        values.update({f"%{name}.{axis}": place for axis, place in zip("xyz", places, strict=True)})
    for name, sizes in (("ntid", shape.block), ("nctaid", shape.grid)):
        values.update({f"%{name}.{axis}": np.full(len(thread), size) for axis, size in zip("xyz", sizes, strict=True)})
    return {name: value.astype(np.uint32) for name, value in values.items()}
