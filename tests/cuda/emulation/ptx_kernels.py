"""Launches the head's kernels in the PTX interpreter as `rust/cuda` launches them on a device."""

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.cuda.emulation.ptx import Allocation, Launch, Memory, Module

KERNELS = Path(__file__).parents[3] / "rust" / "cuda" / "kernels"
_CONSTANT = re.compile(r"constexpr u32 (\w+) = (\w+);")
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_MOST_DIMENSIONS = 4
_VECTOR_BYTES = 16


def constants() -> dict[str, int]:
    """The geometry that arguments.cuh states."""
    found = _CONSTANT.findall((KERNELS / "arguments.cuh").read_text(encoding="utf-8"))
    return {name: int(value, 0) for name, value in found}


class Rows(ctypes.Structure):
    """`struct Rows` of arguments.cuh."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("count", ctypes.c_uint64),
        ("columns", ctypes.c_uint32),
        ("dimensions", ctypes.c_uint32),
        ("sizes", ctypes.c_uint64 * _MOST_DIMENSIONS),
        ("strides", ctypes.c_int64 * _MOST_DIMENSIONS),
    )


class Dropout(ctypes.Structure):
    """`struct Dropout` of arguments.cuh."""

    _fields_ = (
        ("seed_address", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("threshold", ctypes.c_uint32),
        ("scale", ctypes.c_float),
    )


@dataclass(frozen=True)
class Head:
    """A head's arguments on the host; `seed_on_device` says where the kernel reads the seed."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    dropout_p: float = 0.0
    seed: int = 0
    seed_on_device: bool = False

    @property
    def rows(self) -> int:
        """`N`."""
        return self.hidden.shape[:-1].numel()

    @property
    def columns(self) -> int:
        """`H`."""
        return self.hidden.shape[-1]

    @property
    def outputs(self) -> int:
        """`K`."""
        return self.weight.shape[0]


class Device:
    """A head's arguments in the interpreter's memory, or in another emulator's, and its kernels."""

    def __init__(self, module: Module, head: Head, path: str | None = None, memory: Memory | None = None) -> None:
        self.module, self.head, self.memory = module, head, Memory() if memory is None else memory
        self.constants = constants()
        self.hidden = self.memory.input("hidden", to_numpy(_storage(head.hidden)))
        self.weight = self.memory.input("weight", head.weight.numpy())
        self.bias = None if head.bias is None else self.memory.input("bias", head.bias.numpy())
        self.seed = self.memory.input("seed", np.array([head.seed % 2**64], np.uint64)) if head.seed_on_device else None
        self.path = path or ("vector" if self._is_vector() else "scalar")

    def forward(self, *, blocks: int | None = None, several_rows: bool = False) -> tuple[Allocation, Launch]:
        """`values` `[N, K]`, by a grid of `blocks`; `several_rows` takes the kernel for many rows."""
        head, values = self.head, self.memory.output("values", (self.head.rows, self.head.outputs))
        args = [self._rows(), self.weight, self.bias, head.outputs, self._dropout(), values]
        warps, rows = self.constants["FORWARD_WARPS"], self.rows_of_a_warp if several_rows else 1
        grid, block = (blocks or -(-head.rows // (warps * rows)),), (32 * warps,)
        name = self.variant("vhead_value_head_rows", "") if several_rows else self.variant("vhead_value_head")
        return values, self.module.launch(name, grid, block, args, self.memory)

    @property
    def rows_of_a_warp(self) -> int:
        """How many rows a warp of the kernel for many rows takes at a time."""
        return self.constants["FORWARD_ROW_BYTES"] // self.head.hidden.element_size()

    def backward(self, grad_values: Tensor, *, hidden: bool = True, weight: bool = True) -> "Gradients":
        """The gradients that are wanted, by the kernels that write them."""
        head, chunks = self.head, -(-self.head.rows // self.constants["CHUNK"])
        grad = self.memory.input("grad_values", grad_values.numpy())
        like = to_numpy(head.hidden[..., :0]).dtype
        grad_hidden = self.memory.output("grad_hidden", (head.rows, head.columns), like) if hidden else None
        partials = self.memory.output("partials", (chunks, head.outputs, head.columns)) if weight else None
        threads = self.constants["BACKWARD_THREADS"]
        grid = (chunks, -(-head.columns // (8 * threads)))
        args = [self._rows(), self.weight, head.outputs, self._dropout(), grad, grad_hidden, partials]
        name = self.variant("vhead_value_head_backward" if hidden else "vhead_value_head_backward_weight")
        launch = self.module.launch(name, grid, (threads,), args, self.memory)
        return Gradients(grad, grad_hidden, partials, launch)

    def add_chunks(self, partials: Allocation) -> Allocation:
        """`grad_weight` `[K, H]`."""
        chunks, outputs, columns = partials.array.shape
        grad_weight = self.memory.output("grad_weight", (outputs, columns))
        width = self.constants["ADD_CHUNKS_COLUMNS"]
        args = [partials, chunks, outputs * columns, grad_weight]
        grid, block = (-(-outputs * columns // width),), (width, self.constants["SLOTS"])
        self.module.launch("vhead_value_head_add_chunks", grid, block, args, self.memory)
        return grad_weight

    def add_rows(self, grad_values: Allocation) -> Allocation:
        """`grad_bias` `[K]`."""
        grad_bias = self.memory.output("grad_bias", (self.head.outputs,))
        args = [grad_values, self.head.rows, self.head.outputs, grad_bias]
        self.module.launch(
            "vhead_value_head_add_rows", (self.head.outputs,), (self.constants["LANES"],), args, self.memory
        )
        return grad_bias

    def variant(self, name: str, path: str | None = None) -> str:
        """A kernel's name for the head's dtype, path and dropout."""
        parts = [name, _NAMES[self.head.hidden.dtype], self.path if path is None else path]
        return "_".join([*filter(None, parts), *(["dropout"] if self.head.dropout_p else [])])

    def _is_vector(self) -> bool:
        hidden, size = self.head.hidden, self.head.hidden.element_size()
        aligned = all((stride * size) % _VECTOR_BYTES == 0 for _, stride in merged(hidden))
        return self.head.columns % 8 == 0 and aligned and hidden.storage_offset() * size % _VECTOR_BYTES == 0

    def _rows(self) -> Rows:
        hidden, outer = self.head.hidden, merged(self.head.hidden)
        sizes, strides = [[pair[i] for pair in outer] + [0] * (_MOST_DIMENSIONS - len(outer)) for i in (0, 1)]
        data = self.hidden.address + hidden.storage_offset() * hidden.element_size()
        of_sizes, of_strides = (
            (ctypes.c_uint64 * _MOST_DIMENSIONS)(*sizes),
            (ctypes.c_int64 * _MOST_DIMENSIONS)(*strides),
        )
        return Rows(data, self.head.rows, self.head.columns, len(outer), of_sizes, of_strides)

    def _dropout(self) -> Dropout:
        threshold = int(self.head.dropout_p * 65536 + 0.5)
        address = self.seed.address if self.seed else 0
        value = 0 if self.seed else self.head.seed % 2**64
        return Dropout(address, value, threshold, 65536 / (65536 - threshold))


@dataclass(frozen=True)
class Gradients:
    """What the backward kernel read and wrote."""

    grad_values: Allocation
    hidden: Allocation | None
    partials: Allocation | None
    launch: Launch


def merged(hidden: Tensor) -> list[tuple[int, int]]:
    """Sizes and strides of the outer dimensions, those that can be walked as one merged."""
    outer: list[tuple[int, int]] = []
    for size, stride in zip(hidden.shape[:-1], hidden.stride()[:-1], strict=True):
        if size == 1:
            continue
        if outer and outer[-1][1] == stride * size:
            outer[-1] = (outer[-1][0] * size, stride)
        else:
            outer.append((size, stride))
    return outer


def _storage(tensor: Tensor) -> Tensor:
    """All that a tensor's storage holds."""
    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.as_strided((elements,), (1,), 0)


def to_numpy(tensor: Tensor) -> np.ndarray:
    """The tensor's elements; bfloat16 and float16 as their bits."""
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.element_size() == 2 else tensor.numpy()
