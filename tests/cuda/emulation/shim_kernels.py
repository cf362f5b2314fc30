"""Launches kernels compiled for the CPU: in this process, or later in one that sanitizers watch."""

import ctypes
import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

_ALIGNMENT = 256
_WORD = 8


class EmulationError(Exception):
    """A kernel did what a device leaves undefined."""


class Range(ctypes.Structure):
    """`emulation::Range` of shim.hpp."""

    _fields_ = tuple((name, ctypes.c_uint64) for name in ("begin", "end", "writable", "read", "written"))


@dataclass(eq=False)
class Allocation:
    """An array at an address that is as aligned as a device's allocations are."""

    name: str
    array: np.ndarray
    writable: bool
    bytes_read: int = 0
    bytes_written: int = 0

    @property
    def address(self) -> int:
        """Where it lies in this process."""
        return self.array.ctypes.data

    @property
    def end(self) -> int:
        """The address after its last byte."""
        return self.address + self.array.nbytes


@dataclass
class Memory:
    """All that a kernel may touch."""

    allocations: list[Allocation] = field(default_factory=list)

    def input(self, name: str, array: np.ndarray) -> Allocation:
        """A copy of `array`, which kernels may only read."""
        return self._add(Allocation(name, _aligned(array.shape, array.dtype), writable=False), array)

    def output(self, name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> Allocation:
        """Memory in which every bit is set, so that a float that nobody wrote is a NaN."""
        return self._add(Allocation(name, _aligned(shape, np.dtype(dtype)), writable=True), None)

    def _add(self, allocation: Allocation, array: np.ndarray | None) -> Allocation:
        if array is None:
            allocation.array.view(np.uint8).fill(0xFF)
        else:
            allocation.array[...] = array
        self.allocations.append(allocation)
        return allocation


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape)) * dtype.itemsize
    whole = np.empty(size + _ALIGNMENT, np.uint8)
    start = -whole.ctypes.data % _ALIGNMENT
    return whole[start : start + size].view(dtype).reshape(shape)


def encode(argument: object) -> bytes:
    """A kernel's argument as it lies in memory."""
    match argument:
        case Allocation():
            return struct.pack("Q", argument.address)
        case None:
            return bytes(_WORD)
        case int():
            return struct.pack("Q", argument)
        case ctypes.Structure():
            return bytes(argument)
    raise TypeError(f"a kernel's argument is a number, an allocation or a structure, found {type(argument).__name__}")


class Library:
    """Kernels in a shared library of `build`; `seed` is the scheduler's."""

    def __init__(self, path: Path, seed: int = 0) -> None:
        self._function, self.seed = ctypes.CDLL(str(path)).vhead_emulation_launch, seed

    def launch(
        self, name: str, grid: tuple[int, ...], block: tuple[int, ...], arguments: list[object], memory: Memory
    ) -> None:
        """Runs a kernel, and adds to what is known of the bytes that each allocation's readers and writers moved."""
        values = [ctypes.create_string_buffer(encode(argument)) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        ranges = (Range * len(memory.allocations))(*(Range(a.address, a.end, a.writable) for a in memory.allocations))
        error = ctypes.create_string_buffer(256)
        failed = self._function(
            name.encode(), _shape(grid), _shape(block), pointers, ctypes.c_uint64(self.seed),
            ranges, ctypes.c_uint64(len(ranges)), error, ctypes.c_uint64(len(error)),
        )  # fmt: skip
        if failed:
            raise EmulationError(f"{name}: {error.value.decode()}")
        for allocation, moved in zip(memory.allocations, ranges, strict=True):
            allocation.bytes_read += moved.read
            allocation.bytes_written += moved.written


def _shape(shape: tuple[int, ...]) -> Any:
    return (ctypes.c_uint32 * 3)(*shape, *[1] * (3 - len(shape)))


class Replay:
    """Notes launches, and runs all of them in a program of `build`: `run` fills in the outputs."""

    def __init__(self, path: Path, seed: int = 0) -> None:
        self._path, self.seed = path, seed
        self._launches: list[bytes] = []
        self._allocations: list[Allocation] = []

    def launch(
        self, name: str, grid: tuple[int, ...], block: tuple[int, ...], arguments: list[object], memory: Memory
    ) -> None:
        """Notes a launch."""
        self._allocations += [a for a in memory.allocations if a not in self._allocations]
        encoded = [self._relocatable(encode(argument)) for argument in arguments]
        numbers = (*_shape(grid), *_shape(block), self.seed, len(encoded))
        self._launches.append(_sized(name.encode()) + _words(*numbers) + b"".join(encoded))

    def run(self) -> None:
        """Runs what was noted; raises EmulationError with what the sanitizers or the shim say."""
        inputs = b"".join(_sized(allocation.array.tobytes()) for allocation in self._allocations)
        tape = _words(len(self._allocations)) + inputs + _words(len(self._launches)) + b"".join(self._launches)
        done = subprocess.run([str(self._path)], input=tape, capture_output=True, check=False)
        # Of fibers as such ASan warns once; the shim tells it about each switch.
        said = [line for line in done.stderr.splitlines() if b"doesn't fully support makecontext" not in line]
        if done.returncode or said:
            raise EmulationError(b"\n".join(said).decode(errors="replace"))
        start = 0
        for allocation in self._allocations:
            found = np.frombuffer(done.stdout, np.uint8, allocation.array.nbytes, start)
            allocation.array.reshape(-1).view(np.uint8)[:] = found
            start += allocation.array.nbytes

    def _relocatable(self, argument: bytes) -> bytes:
        """The argument, and which of its words are addresses in which allocations."""
        addresses = b""
        found = 0
        for offset in range(0, len(argument) - len(argument) % _WORD, _WORD):
            (word,) = struct.unpack_from("Q", argument, offset)
            for number, allocation in enumerate(self._allocations):
                if allocation.address <= word < allocation.end:
                    addresses += _words(offset, number, word - allocation.address)
                    found += 1
        return _sized(argument) + _words(found) + addresses


def _words(*numbers: int) -> bytes:
    return struct.pack(f"{len(numbers)}Q", *numbers)


def _sized(data: bytes) -> bytes:
    return _words(len(data)) + data
