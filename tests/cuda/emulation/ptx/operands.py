"""How an instruction's operands are read and written, as arrays of the type that it computes with."""

import re
from collections.abc import Callable
from functools import cache

import numpy as np

from tests.cuda.emulation.ptx.errors import UnknownInstructionError
from tests.cuda.emulation.ptx.lanes import UNSIGNED, Array, At, Lanes
from tests.cuda.emulation.ptx.syntax import Kernel, bits

Reader = Callable[[Lanes, At], Array]
Writer = Callable[[Lanes, At, Array], None]

_SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid)\.[xyz]|%laneid")
_HEXADECIMAL_FLOAT = re.compile(r"0[fFdD]([0-9A-Fa-f]+)")
_ADDRESS = re.compile(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]")


@cache
def dtype(kind: str) -> type[np.generic]:
    """numpy's type for PTX's `kind`; bits are unsigned integers, half precisions their bits."""
    if kind == "pred":
        return np.bool_
    width = bits(kind)
    if kind in {"f32", "f64"}:
        return np.float32 if width == 32 else np.float64
    return {16: np.int16, 32: np.int32, 64: np.int64, 8: np.int8}[width] if kind[0] == "s" else UNSIGNED[width]


def reader(kernel: Kernel, operand: str, kind: str) -> Reader:
    """Reads `operand` as `kind`; a wider register is cut."""
    wanted = dtype(kind)
    if _SPECIAL.fullmatch(operand):
        return lambda lanes, at: lanes.special(operand)[at].astype(wanted, copy=False)
    if operand.startswith("%"):
        kernel.register_type(operand)
        if kind == "pred":
            return lambda lanes, at: lanes.register(operand)[at]
        return lambda lanes, at: as_type(lanes.register(operand)[at], wanted)
    constant = _constant(kernel, operand, kind)
    return lambda _lanes, _at: constant


def as_type(register: Array, wanted: type[np.generic]) -> Array:
    """A register's bits as a type of its width, or their low part."""
    width = np.dtype(wanted).itemsize
    if register.dtype.itemsize > width:
        register = register.astype(UNSIGNED[8 * width])
    elif register.dtype.itemsize < width:
        raise UnknownInstructionError(f"a register of {8 * register.dtype.itemsize} bits read as {8 * width}")
    return register.view(wanted)


def _constant(kernel: Kernel, operand: str, kind: str) -> Array:
    """An immediate or the address of a variable or parameter, as an array of one element."""
    wanted = dtype(kind)
    if match := _HEXADECIMAL_FLOAT.fullmatch(operand):
        return np.array([int(match.group(1), 16)], UNSIGNED[4 * len(match.group(1))]).view(wanted)
    if operand in kernel.symbols:
        return np.array([kernel.symbols[operand]], wanted)
    try:
        number = int(operand, 0)
    except ValueError:
        raise UnknownInstructionError(f"{kernel.name}: operand {operand}") from None
    width = np.dtype(wanted).itemsize
    return np.array([number % (1 << 8 * width)], UNSIGNED[8 * width]).view(wanted)


def writer(kernel: Kernel, operand: str) -> Writer:
    """Writes to the register `operand`; a narrower value is extended by its own sign."""
    if operand == "_":
        return lambda _lanes, _at, _value: None
    kind = kernel.register_type(operand)
    if kind == "pred":
        return lambda lanes, at, value: lanes.register(operand).__setitem__(at, value)
    width = bits(kind) // 8

    def write(lanes: Lanes, at: At, value: Array) -> None:
        value = (
            value.view(UNSIGNED[8 * value.dtype.itemsize]) if value.dtype.itemsize == width else _widened(value, width)
        )
        lanes.register(operand)[at] = value

    return write


def _widened(value: Array, width: int) -> Array:
    if value.dtype.itemsize > width or value.dtype.kind == "f":
        raise UnknownInstructionError(
            f"a value of {8 * value.dtype.itemsize} bits written to a register of {8 * width}"
        )
    return value.astype(np.dtype(f"{value.dtype.kind}{width}")).view(UNSIGNED[8 * width])


def vector(operand: str) -> list[str]:
    """The registers of `{%r1, %r2}`, or the one of `%r1`."""
    return [name.strip() for name in operand.strip("{}").split(",")]


def address(kernel: Kernel, operand: str, width: int = 64) -> Reader:
    """Reads `[register + offset]` as addresses."""
    match = _ADDRESS.fullmatch(operand)
    if match is None:
        raise UnknownInstructionError(f"{kernel.name}: address {operand}")
    base, offset = match.group(1), np.uint64(int(match.group(2) or "0", 0) % (1 << 64))
    if base.startswith("%"):
        width = bits(kernel.register_type(base))
    read = reader(kernel, base, f"u{width}")
    return lambda lanes, at: _spread(read(lanes, at).astype(np.uint64) + offset, lanes, at)


def _spread(addresses: Array, lanes: Lanes, at: At) -> Array:
    """One address a lane, where the operand is the same for all."""
    count = lanes.count if isinstance(at, slice) else len(at)
    return addresses if len(addresses) == count else np.full(count, addresses[0])
