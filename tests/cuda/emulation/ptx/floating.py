"""Floating-point instructions and conversions. Only those with one defined result are known."""

from collections.abc import Callable

import numpy as np

from tests.cuda.emulation.ptx import integers
from tests.cuda.emulation.ptx.floats import fma32, to_bfloat16, to_float16
from tests.cuda.emulation.ptx.lanes import UNSIGNED, Array
from tests.cuda.emulation.ptx.operands import dtype
from tests.cuda.emulation.ptx.operations import Step, decodes, elementwise, unknown
from tests.cuda.emulation.ptx.syntax import Instruction, Kernel

_ROUNDED = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}
_OF_INTEGERS = {"mul": integers.multiply, "div": integers.divide}
_FLOATS = {"f32", "f64"}
# How a float becomes an integer.
_INTEGERS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@decodes("add", "sub", "mul", "div", "min", "max")
def binary(kernel: Kernel, instruction: Instruction) -> Step:
    """Of floats or of integers."""
    of_floats = arithmetic if instruction.opcode in _ROUNDED else extreme
    if instruction.type in _FLOATS:
        return of_floats(kernel, instruction)
    return _OF_INTEGERS.get(instruction.opcode, integers.arithmetic)(kernel, instruction)


def arithmetic(kernel: Kernel, instruction: Instruction) -> Step:
    """An operation with one rounding, which must be written out.

    Without `.rn`, ptxas may make one fused multiply-add of a product and a sum, with other bits.
    """
    if instruction.modifiers[:-1] != ("rn",) or instruction.opcode not in _ROUNDED:
        raise unknown(kernel, instruction, "has no defined rounding: ptxas may fuse it")
    return elementwise(kernel, instruction, [instruction.type] * 2, _ROUNDED[instruction.opcode])


@decodes("fma")
def fused(kernel: Kernel, instruction: Instruction) -> Step:
    """A product and a sum, rounded once."""
    if instruction.modifiers != ("rn", "f32"):
        raise unknown(kernel, instruction)
    return elementwise(kernel, instruction, ["f32"] * 3, lambda a, b, c: fma32(*np.broadcast_arrays(a, b, c)))


def extreme(kernel: Kernel, instruction: Instruction) -> Step:
    """The smaller or larger number; a NaN only of two, and -0 is below +0."""
    if len(instruction.modifiers) != 1:
        raise unknown(kernel, instruction)
    largest = instruction.opcode == "max"
    choose, of_equals = (np.fmax, np.bitwise_and) if largest else (np.fmin, np.bitwise_or)

    def compute(a: Array, b: Array) -> Array:
        unsigned = UNSIGNED[8 * a.dtype.itemsize]
        return np.where(a == b, of_equals(a.view(unsigned), b.view(unsigned)).view(a.dtype), choose(a, b))

    return elementwise(kernel, instruction, [instruction.type] * 2, compute)


@decodes("neg")
def negate(kernel: Kernel, instruction: Instruction) -> Step:
    """The other sign."""
    if len(instruction.modifiers) != 1:
        raise unknown(kernel, instruction)
    return elementwise(kernel, instruction, [instruction.type], np.negative)


@decodes("abs")
def absolute(kernel: Kernel, instruction: Instruction) -> Step:
    """Without the sign."""
    if len(instruction.modifiers) != 1:
        raise unknown(kernel, instruction)
    return elementwise(kernel, instruction, [instruction.type], np.abs)


@decodes("rcp")
def reciprocal(kernel: Kernel, instruction: Instruction) -> Step:
    """One over a number, rounded once."""
    if instruction.modifiers[0] != "rn" or instruction.type not in _FLOATS:
        raise unknown(kernel, instruction)
    return elementwise(kernel, instruction, [instruction.type], lambda a: np.divide(a.dtype.type(1), a))


@decodes("cvt")
def convert(kernel: Kernel, instruction: Instruction) -> Step:
    """From one type to another."""
    *rounding, to, source = instruction.modifiers
    if to.endswith("x2"):
        return _convert_pair(kernel, instruction)
    is_whole = to == source and to in _FLOATS and len(rounding) == 1
    conversion = _INTEGERS.get(rounding[0]) if is_whole else _conversion(tuple(rounding), to, source)
    if conversion is None:
        raise unknown(kernel, instruction)
    return elementwise(kernel, instruction, [source], conversion)


def _conversion(rounding: tuple[str, ...], to: str, source: str) -> Callable[[Array], Array] | None:
    """The function; None for a conversion that the kernels have no use for."""
    wanted = dtype(to)
    if "f" not in to + source:
        return (lambda a: a.astype(wanted)) if not rounding else None
    rounded = {("f16", "f32"): to_float16, ("bf16", "f32"): to_bfloat16}.get((to, source))
    if rounded is not None:
        return rounded if rounding == ("rn",) else None
    if source == "f16" and to in _FLOATS:
        return (lambda a: a.view(np.float16).astype(wanted)) if not rounding else None
    if to in _FLOATS and not source.endswith("16"):
        exact = (to, source) == ("f64", "f32") or (to == "f64" and source[1:] == "32")
        allowed = ((), ("rn",)) if exact else (("rn",),)
        return (lambda a: a.astype(wanted)) if rounding in allowed else None
    if source in _FLOATS and to[0] in "us" and len(rounding) == 1 and rounding[0] in _INTEGERS:
        return lambda a: _to_integer(_INTEGERS[rounding[0]](a), wanted)
    return None


def _to_integer(whole: Array, wanted: type[np.integer]) -> Array:
    """Whole numbers as integers: those too large become the largest, a NaN becomes zero."""
    limits = np.iinfo(wanted)
    known = np.nan_to_num(whole.astype(np.float64), nan=0.0)
    # The largest integer of 64 bits is no float64: numbers from 2^63 or 2^64 on are found by their own comparison.
    inside = np.where(known < float(limits.max), np.maximum(known, float(limits.min)), 0.0).astype(wanted)
    return np.where(known < float(limits.max), inside, wanted(limits.max))


def _convert_pair(kernel: Kernel, instruction: Instruction) -> Step:
    """Two float32 numbers to two halves of a register, the first of them to the upper."""
    rounded = {"f16x2": to_float16, "bf16x2": to_bfloat16}.get(instruction.modifiers[1])
    if rounded is None or instruction.modifiers[::2] != ("rn", "f32"):
        raise unknown(kernel, instruction)

    def compute(high: Array, low: Array) -> Array:
        return rounded(high).astype(np.uint32) << np.uint32(16) | rounded(low)

    return elementwise(kernel, instruction, ["f32", "f32"], compute)
