"""Device memory and a block's shared memory: bounds, alignment, races, and bytes read and written."""

from bisect import bisect_right
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tests.cuda.emulation.ptx.errors import AccessError, RaceError

Array = NDArray[Any]
Addresses = NDArray[np.uint64]
Threads = NDArray[np.int32]

_FIRST_ADDRESS = 0x7F00_0000_0000
# What lies between two allocations belongs to none of them.
_GUARD = 1 << 12
_NOBODY, _SEVERAL = np.int32(-1), np.int32(-2)
_WIDEST = 16


class Allocation:
    """A piece of device memory that holds an array."""

    def __init__(self, name: str, address: int, array: Array, *, writable: bool) -> None:
        self.name, self.address, self.writable = name, address, writable
        self.size = array.nbytes
        padded = -(-self.size // _WIDEST) * _WIDEST
        self._bytes = np.zeros(padded, np.uint8)
        self._bytes[: self.size] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._array = self._bytes[: self.size].view(array.dtype).reshape(array.shape)
        self._was_read, self._was_written = np.zeros(padded, np.bool_), np.zeros(padded, np.bool_)
        self._reader, self._writer = np.full((2, padded if writable else 0), _NOBODY, np.int32)
        self.bytes_read = self.bytes_written = 0

    @property
    def array(self) -> Array:
        """What the memory holds now."""
        return self._array

    @property
    def distinct_bytes_read(self) -> int:
        """Bytes that were read at least once."""
        return int(self._was_read.sum())

    @property
    def distinct_bytes_written(self) -> int:
        """Bytes that were written at least once."""
        return int(self._was_written.sum())

    def start_launch(self) -> None:
        """Everything before a launch is ordered before everything in it."""
        self._reader.fill(_NOBODY)
        self._writer.fill(_NOBODY)

    def read(self, addresses: Addresses, size: int, threads: Threads) -> NDArray[np.uint8]:
        """`[lanes, size]` bytes."""
        index = self._index(addresses, size)
        self.bytes_read += index.size * size
        _grains(self._was_read, size)[index] = True
        if self.writable:
            writer, reader = _grains(self._writer, size), _grains(self._reader, size)
            self._check("reads what", "wrote", writer[index], threads)
            before = reader[index]
            alone = (before == _NOBODY) | (before == threads[:, None])
            reader[index] = np.where(alone, threads[:, None], _SEVERAL)
        return _grains(self._bytes, size)[index]

    def write(self, addresses: Addresses, size: int, threads: Threads, data: NDArray[np.uint8]) -> None:
        """Stores `[lanes, size]` bytes."""
        if not self.writable:
            raise AccessError(f"a store to {self.name}, which is an input")
        index = self._index(addresses, size)
        self.bytes_written += index.size * size
        _grains(self._was_written, size)[index] = True
        writer = _grains(self._writer, size)
        self._check("writes where", "wrote", writer[index], threads)
        self._check("writes where", "read", _grains(self._reader, size)[index], threads)
        writer[index] = threads[:, None]
        self._check("writes where", "writes", writer[index], threads)
        _grains(self._bytes, size)[index] = data

    def _index(self, addresses: Addresses, size: int) -> NDArray[np.intp]:
        """Numbers of the grains of `size` bytes; an allocation starts at a multiple of every size."""
        return ((addresses - np.uint64(self.address)) // np.uint64(size)).astype(np.intp)

    def _check(self, act: str, other_act: str, others: Threads, threads: Threads) -> None:
        wrong = (others != _NOBODY) & (others != threads[:, None])
        if wrong.any():
            lane = int(np.flatnonzero(wrong.any(1))[0])
            other = int(others[lane][wrong[lane]][0])
            who = "several threads" if other == _SEVERAL else f"thread {other}"
            raise RaceError(f"{self.name}: thread {threads[lane]} {act} {who} {other_act} in the same launch")


def _grains(array: Array, size: int) -> Array:
    return array.reshape(-1, size)


class Memory:
    """All of a device's memory that the kernels may touch."""

    def __init__(self) -> None:
        self._allocations: list[Allocation] = []
        self._starts: list[int] = []

    def input(self, name: str, array: ArrayLike) -> Allocation:
        """A copy of `array`, which kernels may only read."""
        return self._add(name, np.asarray(array), writable=False)

    def output(self, name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> Allocation:
        """Memory that holds nothing of use: every bit is set, so a float that nobody wrote is a NaN."""
        array = np.full(int(np.prod(shape)) * np.dtype(dtype).itemsize, 0xFF, np.uint8).view(dtype).reshape(shape)
        return self._add(name, array, writable=True)

    def _add(self, name: str, array: Array, *, writable: bool) -> Allocation:
        last = self._allocations[-1] if self._allocations else None
        free = last.address + last.size + _GUARD if last else _FIRST_ADDRESS
        allocation = Allocation(name, -(-free // _GUARD) * _GUARD, array, writable=writable)
        self._allocations.append(allocation)
        self._starts.append(allocation.address)
        return allocation

    def start_launch(self) -> None:
        """Forgets which thread touched what."""
        for allocation in self._allocations:
            if allocation.writable:
                allocation.start_launch()

    def read(self, addresses: Addresses, size: int, threads: Threads) -> NDArray[np.uint8]:
        """`[lanes, size]` bytes."""
        found = self._find(addresses, size, "load")
        if isinstance(found, Allocation):
            return found.read(addresses, size, threads)
        data = np.empty((len(addresses), size), np.uint8)
        for allocation, lanes in found:
            data[lanes] = allocation.read(addresses[lanes], size, threads[lanes])
        return data

    def write(self, addresses: Addresses, size: int, threads: Threads, data: NDArray[np.uint8]) -> None:
        """Stores `[lanes, size]` bytes."""
        found = self._find(addresses, size, "store")
        if isinstance(found, Allocation):
            found.write(addresses, size, threads, data)
            return
        for allocation, lanes in found:
            allocation.write(addresses[lanes], size, threads[lanes], data[lanes])

    def _find(self, addresses: Addresses, size: int, what: str) -> Allocation | list[tuple[Allocation, Array]]:
        """The allocation that all lanes mean, or each with its lanes."""
        if (addresses % np.uint64(size)).any():
            wrong = int(addresses[np.flatnonzero(addresses % np.uint64(size))[0]])
            raise AccessError(f"a {what} of {size} bytes at {self._place(wrong)}, which is not aligned to it")
        low, high = int(addresses.min()), int(addresses.max())
        number = bisect_right(self._starts, low) - 1
        if number >= 0 and high + size <= self._end(number):
            return self._allocations[number]
        numbers = np.searchsorted(np.array(self._starts, np.uint64), addresses, "right").astype(np.int64) - 1
        for lane, number in enumerate(numbers):
            if number < 0 or int(addresses[lane]) + size > self._end(number):
                raise AccessError(f"a {what} of {size} bytes at {self._place(int(addresses[lane]))}")
        return [(self._allocations[number], np.flatnonzero(numbers == number)) for number in np.unique(numbers)]

    def _end(self, number: int) -> int:
        return self._allocations[number].address + self._allocations[number].size

    def _place(self, address: int) -> str:
        """An address as a reader of the test sees it."""
        number = bisect_right(self._starts, address) - 1
        if number < 0:
            return f"{address:#x}, below every allocation"
        allocation = self._allocations[number]
        return f"byte {address - allocation.address} of {allocation.name}, which has {allocation.size}"


class Shared:
    """The shared memory of some blocks.

    Between two accesses of one byte by two threads, one of them a store, a barrier of the block must lie, or one of the
    warp where both are of the same warp.
    """

    def __init__(self, blocks: int, size: int, threads: int) -> None:
        self.size, self._stride = size, -(-max(size, 1) // _WIDEST) * _WIDEST
        total = blocks * self._stride
        self._threads, self._bytes = threads, np.full(total, 0xFF, np.uint8)
        self._writer, self._reader = np.full((2, total), _NOBODY, np.int32)
        self._write_era, self._read_era = np.zeros((2, total), np.int64)
        self._block_era, self._warp_era = np.zeros(blocks, np.int64), np.zeros(blocks * threads // 32, np.int64)

    def end_of_block_era(self, blocks: Array) -> None:
        """A barrier of these blocks."""
        self._block_era[blocks] += 1

    def end_of_warp_era(self, warps: Array) -> None:
        """A barrier of these warps."""
        self._warp_era[warps] += 1

    def read(self, addresses: Addresses, size: int, lanes: Threads) -> NDArray[np.uint8]:
        """`[lanes, size]` bytes."""
        index = self._index(addresses, size, lanes, "load")
        writer = _grains(self._writer, size)[index]
        if (writer == _NOBODY).any():
            lane = int(np.flatnonzero((writer == _NOBODY).any(1))[0])
            raise AccessError(f"a load from byte {addresses[lane]} of shared memory, which nobody wrote")
        self._check("reads what", "wrote", writer, _grains(self._write_era, size)[index], lanes)
        reader, era = _grains(self._reader, size), _grains(self._read_era, size)
        now, before = self._now(lanes)[:, None], reader[index]
        in_my_warp = (before >= 0) & (before // 32 == lanes[:, None] // 32)
        over = np.where(in_my_warp, era[index] < now, era[index] >> 32 < now >> 32)
        alone = (before == lanes[:, None]) | (before == _NOBODY) | over
        reader[index] = np.where(alone, lanes[:, None], _SEVERAL)
        # Lanes of one instruction that read one byte overwrite each other above.
        reader[index] = np.where(reader[index] == lanes[:, None], reader[index], _SEVERAL)
        era[index] = now
        return _grains(self._bytes, size)[index]

    def write(self, addresses: Addresses, size: int, lanes: Threads, data: NDArray[np.uint8]) -> None:
        """Stores `[lanes, size]` bytes."""
        index = self._index(addresses, size, lanes, "store")
        writer, era = _grains(self._writer, size), _grains(self._write_era, size)
        self._check("writes where", "wrote", writer[index], era[index], lanes)
        readers = _grains(self._reader, size)[index], _grains(self._read_era, size)[index]
        self._check("writes where", "read", *readers, lanes)
        writer[index], era[index] = lanes[:, None], self._now(lanes)[:, None]
        self._check("writes where", "writes", writer[index], era[index], lanes)
        _grains(self._bytes, size)[index] = data

    def _now(self, lanes: Threads) -> NDArray[np.int64]:
        """The era of each lane: its block's barriers, and its warp's as a fraction of them."""
        return (self._block_era[lanes // self._threads] << 32) + self._warp_era[lanes // 32]

    def _index(self, addresses: Addresses, size: int, lanes: Threads, what: str) -> NDArray[np.intp]:
        wrong = (addresses % np.uint64(size) != 0) | (addresses + np.uint64(size) > self.size)
        if wrong.any():
            where = int(addresses[np.flatnonzero(wrong)[0]])
            raise AccessError(f"a {what} of {size} bytes at byte {where} of shared memory, which has {self.size}")
        return (lanes // self._threads * self._stride + addresses.astype(np.int64)) // size

    def _check(self, act: str, other_act: str, others: Threads, eras: Array, lanes: Threads) -> None:
        """Raises where another thread's access is not ordered before this one."""
        now, mine = self._now(lanes)[:, None], lanes[:, None]
        same_warp = (others >= 0) & (others // 32 == mine // 32)
        ordered = np.where(same_warp, eras < now, eras >> 32 < now >> 32)
        wrong = (others != _NOBODY) & (others != mine) & ~ordered
        if wrong.any():
            lane = int(np.flatnonzero(wrong.any(1))[0])
            other = int(others[lane][wrong[lane]][0])
            who = "several threads" if other == _SEVERAL else f"thread {other % self._threads}"
            raise RaceError(
                f"shared memory: thread {lanes[lane] % self._threads} {act} {who} {other_act}, with no barrier"
            )
