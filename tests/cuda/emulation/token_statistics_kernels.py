"""Runs the token statistics' kernels in an emulator as `rust/cuda` launches them, and rust/core beside them."""

import ctypes
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tests.cuda.emulation import shim_kernels
from tests.cuda.emulation.ptx import Memory, Module
from vhead import _native

KERNELS = Path(__file__).parents[3] / "rust" / "cuda" / "kernels"
BLOCK = 1024
STATISTICS = ("logprobs", "entropy", "log_sum_p_squared", "is_top1", "peak", "log_sum")
SELECTED = ("candidate_logprobs", "top_tokens", "top_logprobs")
_CONSTANT = re.compile(r"constexpr u32 (\w+) = (\d+);")


def constants() -> dict[str, int]:
    """The geometry that token_statistics.cuh states."""
    found = _CONSTANT.findall((KERNELS / "token_statistics.cuh").read_text(encoding="utf-8"))
    return {name: int(value) for name, value in found}


class _Rule(ctypes.Structure):
    """`struct LogitsRule` of token_statistics.cuh."""

    _fields_ = (
        ("inner", ctypes.c_float),
        ("outer", ctypes.c_float),
        ("kind", ctypes.c_uint32),
        ("unused", ctypes.c_uint32),
    )


class _Tile(ctypes.Structure):
    """`struct LogitsTile` of token_statistics.cuh."""

    _fields_ = (
        ("products", ctypes.c_uint64),
        ("bias", ctypes.c_uint64),
        ("row_stride", ctypes.c_uint64),
        ("first_column", ctypes.c_uint64),
        ("rows", ctypes.c_uint32),
        ("columns", ctypes.c_uint32),
        ("rule", _Rule),
    )


class _Selection(ctypes.Structure):
    """`struct TokenSelection` of token_statistics.cuh."""

    _fields_ = (
        ("candidates", ctypes.c_uint64),
        ("candidate_logits", ctypes.c_uint64),
        ("top_tokens", ctypes.c_uint64),
        ("top_logits", ctypes.c_uint64),
        ("candidate_count", ctypes.c_uint32),
        ("top", ctypes.c_uint32),
    )


class _Selected(ctypes.Structure):
    """`struct SelectedTokens` of token_statistics.cuh."""

    _fields_ = (("addresses", ctypes.c_uint64 * 3),)


class _Addresses(ctypes.Structure):
    """Six addresses: `struct TokenStatistics` and `struct RowGradients` of token_statistics.cuh."""

    _fields_ = (("addresses", ctypes.c_uint64 * 6),)


_SELECTED_DTYPES = (torch.float32, torch.int64, torch.float32)


class Allocation(Protocol):
    """A piece of an emulator's device memory."""

    address: int
    bytes_read: int

    @property
    def array(self) -> np.ndarray:
        """What it holds now."""


class Emulator:
    """What the kernels run in: a PTX module or a library of the shim, and the memory that goes with it."""

    def __init__(self, launcher: Any, memory: Callable[[], Any]) -> None:
        self._launcher, self._new_memory = launcher, memory
        self.memory = memory()

    def start(self) -> None:
        """Forgets all memory."""
        self.memory = self._new_memory()

    def launch(self, name: str, blocks: int, threads: int, arguments: list[Any]) -> None:
        """Runs a kernel to its end."""
        self._launcher.launch(name, (blocks,), (threads,), arguments, self.memory)

    def finish(self) -> None:
        """Results are read now: runs what has only been noted."""
        if isinstance(self._launcher, shim_kernels.Replay):
            self._launcher.run()

    def check_traffic(self, products: Allocation, tile: _Tile) -> None:
        """A logit is read once."""
        if not isinstance(self._launcher, shim_kernels.Replay):
            assert products.bytes_read == 4 * tile.rows * tile.columns


def ptx(module: Module) -> Emulator:
    """The interpreter of PTX."""
    return Emulator(module, Memory)


def shim(path: Path, seed: int = 0) -> Emulator:
    """The kernels' source, compiled for this machine; `seed` is the scheduler's."""
    return Emulator(shim_kernels.Library(path, seed), shim_kernels.Memory)


def sanitized(path: Path, seed: int = 0) -> Emulator:
    """The same in a program that sanitizers watch."""
    return Emulator(shim_kernels.Replay(path, seed), shim_kernels.Memory)


@dataclass(frozen=True)
class Case:
    """Products `[N, V]` float32, targets `[N]`, biases `[V]` or none, and the rule: scale, softcap, temperature.

    What is selected besides the targets: candidates `[N, M]` or none, and how many of the likeliest tokens.
    """

    products: Tensor
    targets: Tensor
    bias: Tensor | None = None
    rule: tuple[float, float | None, float] = (1.0, None, 1.0)
    candidates: Tensor | None = None
    top: int = 0

    @property
    def vocabulary(self) -> int:
        """`V`."""
        return self.products.shape[1]

    def core(self) -> tuple[Tensor, ...]:
        """The statistics by rust/core, in the order of `STATISTICS`."""
        statistics = _native.LogitStatistics(self.targets, self.vocabulary, self.bias, *self.rule)
        statistics.fold(self.products, 0, 0)
        return tuple(statistics.finish())

    def core_selected(self) -> tuple[Tensor, ...]:
        """What is selected by rust/core, in the order of `SELECTED`; `[N, 0]` for what is not asked for."""
        asked = (self.candidates, self.top)
        statistics = _native.LogitStatistics(self.targets, self.vocabulary, self.bias, *self.rule, *asked)
        statistics.fold(self.products, 0, 0)
        of_candidates, tokens, logprobs = statistics.finish_selected()
        none = torch.empty(len(self.targets), 0)
        found = (of_candidates, tokens, logprobs)
        return tuple(none.to(kind) if x is None else x for x, kind in zip(found, _SELECTED_DTYPES, strict=True))

    def core_gradients(self, upstream: tuple[Tensor, Tensor]) -> Tensor:
        """The products' gradients by rust/core."""
        _, entropy, _, _, peak, log_sum = self.core()
        numbers = (peak, log_sum, entropy)
        gradients = self.products.clone()
        of = _native.LogitGradients(self.targets, self.vocabulary, self.bias, *self.rule, numbers, upstream)
        of.differentiate(gradients, 0, 0)
        return gradients


class Kernels:
    """The kernels on a case."""

    def __init__(self, emulator: Emulator, case: Case) -> None:
        emulator.start()
        self._emulator, self.case, self._constants = emulator, case, constants()
        self._targets = emulator.memory.input("targets", case.targets.numpy())
        self._bias = None if case.bias is None else emulator.memory.input("bias", case.bias.numpy())

    def statistics(self, columns: int | None = None, rows: int | None = None, padding: int = 0) -> tuple[Tensor, ...]:
        """The statistics, from tiles of so many columns and rows, whose rows lie `padding` elements apart."""
        states = self._emulator.memory.output("states", (len(self.case.targets), 5), np.uint64)
        for tile, row, products in self._tiles(columns, rows, padding):
            arguments = [tile, self._targets.address + 8 * row, states.address + 40 * row]
            self._emulator.launch("vhead_token_statistics_fold", tile.rows, self._constants["FOLD_THREADS"], arguments)
            self._emulator.check_traffic(products, tile)
        return self._finish(states)

    def selected(
        self, columns: int | None = None, rows: int | None = None, padding: int = 0
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The statistics and what is selected, from one pass over such tiles."""
        memory, count = self._emulator.memory, len(self.case.targets)
        widths = (0 if self.case.candidates is None else self.case.candidates.shape[1], self.case.top)
        candidates = None if self.case.candidates is None else memory.input("candidates", self.case.candidates.numpy())
        states = memory.output("states", (count, 5), np.uint64)
        logits = memory.output("candidate_logits", (count, widths[0]), np.float32)
        tokens = memory.output("top_tokens", (count, widths[1]), np.int64)
        of_tokens = memory.output("top_logits", (count, widths[1]), np.float32)
        logits.array[:], tokens.array[:], of_tokens.array[:] = 1e30, 5, 1e30  # what somebody else left there

        def of_rows(row: int) -> _Selection:
            at = 0 if candidates is None else candidates.address + 8 * row * widths[0]
            place = row * widths[1]
            own = (logits.address + 4 * row * widths[0], tokens.address + 8 * place, of_tokens.address + 4 * place)
            return _Selection(at, *own, *widths)

        for tile, row, products in self._tiles(columns, rows, padding):
            arguments = [tile, self._targets.address + 8 * row, states.address + 40 * row, of_rows(row)]
            threads = self._constants["FOLD_THREADS"]
            self._emulator.launch("vhead_token_statistics_fold_selected", tile.rows, threads, arguments)
            self._emulator.check_traffic(products, tile)
        kinds = zip(SELECTED, (widths[0], widths[1], widths[1]), (np.float32, np.int64, np.float32), strict=True)
        outputs = [memory.output(name, (count, width), kind) for name, width, kind in kinds]
        to = _Selected((ctypes.c_uint64 * 3)(*(output.address for output in outputs)))
        arguments = [states.address, of_rows(0), to]
        name = "vhead_token_statistics_finish_selected"
        self._emulator.launch(name, count, self._constants["FINISH_THREADS"], arguments)
        found = self._finish(states)
        return found, tuple(torch.from_numpy(output.array.copy()) for output in outputs)

    def gradients(
        self,
        upstream: tuple[Tensor, Tensor],
        dtype: torch.dtype = torch.float32,
        columns: int | None = None,
        padding: int = 0,
    ) -> Tensor:
        """The products' gradients in `dtype`, from tiles of so many columns."""
        _, entropy, _, _, peak, log_sum = self.case.core()
        numbers = [self._emulator.memory.input("numbers", x.numpy()) for x in (peak, log_sum, entropy, *upstream)]
        of_rows = _Addresses((ctypes.c_uint64 * 6)(self._targets.address, *(x.address for x in numbers)))
        name = f"vhead_token_statistics_differentiate_{str(dtype).removeprefix('torch.')}"
        parts = []
        for tile, _, products in self._tiles(columns, None, padding, writable=dtype == torch.float32):
            shape, kind = (tile.rows, tile.columns), np.float32 if dtype == torch.float32 else np.uint16
            to = (
                products
                if dtype == torch.float32 and not padding
                else self._emulator.memory.output("gradients", shape, kind)
            )
            segments = -(-tile.columns // self._constants["DIFFERENTIATE_COLUMNS"])
            threads = self._constants["DIFFERENTIATE_THREADS"]
            self._emulator.launch(name, tile.rows * segments, threads, [tile, of_rows, to.address])
            parts.append(to)
        self._emulator.finish()
        return torch.cat([torch.from_numpy(part.array.copy()).view(dtype) for part in parts], 1)

    def _tiles(
        self, columns: int | None, rows: int | None, padding: int, *, writable: bool = False
    ) -> Iterator[tuple[_Tile, int, Allocation]]:
        for row in range(0, len(self.case.targets), rows or len(self.case.targets)):
            for column in range(0, self.case.vocabulary, columns or self.case.vocabulary):
                part = self.case.products[row:][: rows or None, column:][:, : columns or None]
                array = np.pad(part.numpy(), ((0, 0), (0, padding)), constant_values=np.nan)
                memory = self._emulator.memory.output("products", array.shape, np.float32) if writable else None
                if memory is not None:
                    memory.array[:] = array
                else:
                    memory = self._emulator.memory.input("products", array)
                yield self._tile(part, memory.address, array.shape[1], column), row, memory

    def _tile(self, part: Tensor, address: int, stride: int, column: int) -> _Tile:
        scale, softcap, temperature = self.case.rule
        if softcap is not None:
            rule = _Rule(np.float32(scale / softcap), np.float32(softcap / temperature), 2, 0)
        else:
            inner = np.float32(scale / temperature)
            rule = _Rule(inner, 0.0, 0 if inner == 1.0 and self._bias is None else 1, 0)
        bias = 0 if self._bias is None else self._bias.address + 4 * column
        return _Tile(address, bias, stride, column, *part.shape, rule)

    def _finish(self, states: Allocation) -> tuple[Tensor, ...]:
        rows, threads = len(self.case.targets), self._constants["FINISH_THREADS"]
        outputs = [self._emulator.memory.output(name, (rows,), np.float32) for name in STATISTICS]
        to = _Addresses((ctypes.c_uint64 * 6)(*(output.address for output in outputs)))
        self._emulator.launch("vhead_token_statistics_finish", -(-rows // threads), threads, [states.address, rows, to])
        self._emulator.finish()
        return tuple(torch.from_numpy(output.array.copy()) for output in outputs)


def random_case(
    rows: int, vocabulary: int, *, bias: bool = False, rule: tuple[float, float | None, float] = (1.0, None, 1.0)
) -> Case:
    """Products of a standard deviation of 4, so that the peak rises now and then."""
    products, targets = torch.randn(rows, vocabulary) * 4, torch.randint(vocabulary, (rows,))
    return Case(products, targets, torch.randn(vocabulary) if bias else None, rule)


def with_targets(case: Case, targets: list[int]) -> Case:
    """The same products, other targets."""
    return replace(case, targets=torch.tensor(targets))


def differing(
    found: tuple[Tensor, ...], expected: tuple[Tensor, ...], names: tuple[str, ...] = STATISTICS
) -> list[str]:
    """Which statistics differ in a bit; a NaN is a NaN."""
    pairs = zip(names, found, expected, strict=True)
    return [name for name, a, b in pairs if not torch.equal(bits(a), bits(b))]


def wrongly_selected(emulator: Emulator, case: Case, **tiles: int | None) -> list[str]:
    """Which statistics of the kernel that selects, and which of what it selects, differ from rust/core's in a bit."""
    found, selected = Kernels(emulator, case).selected(**tiles)
    return differing(found, case.core()) + differing(selected, case.core_selected(), SELECTED)


def bits(numbers: Tensor) -> Tensor:
    """The numbers' bits, every NaN the same."""
    if not numbers.is_floating_point():
        return numbers
    numbers = numbers.masked_fill(numbers.isnan(), torch.nan)
    return numbers.view(torch.int32 if numbers.dtype == torch.float32 else torch.int16)
