"""Integer and bit instructions, moves, comparisons and selections."""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.cuda.emulation.ptx.lanes import UNSIGNED, Array, At, Lanes
from tests.cuda.emulation.ptx.operands import reader, vector, writer
from tests.cuda.emulation.ptx.operations import Step, decodes, elementwise, unknown
from tests.cuda.emulation.ptx.syntax import Instruction, Kernel, bits

_ARITHMETIC: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "min": np.minimum,
    "max": np.maximum,
}
_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
_ORDERED = {
    "eq": operator.eq,
    "ne": lambda a, b: (a < b) | (a > b) if a.dtype.kind == "f" else a != b,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "lo": operator.lt,
    "ls": operator.le,
    "hi": operator.gt,
    "hs": operator.ge,
}
# True where an operand is a NaN as well.
_UNORDERED = {
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": lambda a, b: ~(a == b),
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}


def arithmetic(kernel: Kernel, instruction: Instruction) -> Step:
    """`add`, `sub`, `min` and `max`; sums wrap."""
    (kind,) = _modifiers(kernel, instruction, 1)
    return elementwise(kernel, instruction, [kind, kind], _ARITHMETIC[instruction.opcode])


def multiply(kernel: Kernel, instruction: Instruction) -> Step:
    """The low or high half of a product, or all of it."""
    part, kind = _modifiers(kernel, instruction, 2)
    return elementwise(kernel, instruction, [kind, kind], lambda a, b: _product(a, b, part, kind))


@decodes("mad")
def multiply_add(kernel: Kernel, instruction: Instruction) -> Step:
    """A product and a sum, of integers."""
    part, kind = _modifiers(kernel, instruction, 2)
    addend = f"{kind[0]}{2 * bits(kind)}" if part == "wide" else kind
    return elementwise(kernel, instruction, [kind, kind, addend], lambda a, b, c: _product(a, b, part, kind) + c)


def _product(a: Array, b: Array, part: str, kind: str) -> Array:
    if part == "lo":
        return a * b
    width = bits(kind)
    if width == 64:
        return _high64(a, b)
    wide = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{width // 4}")
    product = a.astype(wide) * b.astype(wide)
    return product if part == "wide" else (product >> wide.type(width)).astype(a.dtype)


def _high64(a: Array, b: Array) -> Array:
    """The high 64 bits of a product of unsigned integers, by halves."""
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    cross = (a >> shift) * (b & low) + (((a & low) * (b & low)) >> shift)
    other = (a & low) * (b >> shift) + (cross & low)
    return (a >> shift) * (b >> shift) + (cross >> shift) + (other >> shift)


@decodes("rem")
def divide(kernel: Kernel, instruction: Instruction) -> Step:
    """Quotients and remainders of unsigned integers."""
    (kind,) = _modifiers(kernel, instruction, 1)
    if kind[0] != "u":
        raise unknown(kernel, instruction)

    def compute(a: Array, b: Array) -> Array:
        if (b == 0).any():
            raise unknown(kernel, instruction, "divides by zero")
        return a // b if instruction.opcode == "div" else a % b

    return elementwise(kernel, instruction, [kind, kind], compute)


@decodes("and", "or", "xor")
def logic(kernel: Kernel, instruction: Instruction) -> Step:
    """Bit by bit, or of predicates."""
    (kind,) = _modifiers(kernel, instruction, 1)
    return elementwise(kernel, instruction, [kind, kind], _LOGIC[instruction.opcode])


@decodes("not")
def invert(kernel: Kernel, instruction: Instruction) -> Step:
    """Every bit the other way."""
    (kind,) = _modifiers(kernel, instruction, 1)
    return elementwise(kernel, instruction, [kind], np.invert)


@decodes("shl", "shr")
def shift(kernel: Kernel, instruction: Instruction) -> Step:
    """Shifts; by the width or more, nothing is left but a negative number's sign."""
    (kind,) = _modifiers(kernel, instruction, 1)
    last, to_left = bits(kind) - 1, instruction.opcode == "shl"

    def compute(a: Array, by: Array) -> Array:
        amount = np.minimum(by, np.uint32(last)).astype(a.dtype)
        shifted = a << amount if to_left else a >> amount
        return np.where(by > last, a.dtype.type(0), shifted) if to_left or kind[0] != "s" else shifted

    return elementwise(kernel, instruction, [kind, "u32"], compute)


@decodes("bfi")
def insert(kernel: Kernel, instruction: Instruction) -> Step:
    """The low bits of the first source, at a place in the second."""
    (kind,) = _modifiers(kernel, instruction, 1)
    unsigned, width = UNSIGNED[bits(kind)], bits(kind)

    def compute(a: Array, b: Array, start: Array, length: Array) -> Array:
        if (start + length > width).any() or (length == 0).any() or (length == width).any():
            raise unknown(kernel, instruction, "takes bits from outside")
        mask = ((unsigned(1) << length.astype(unsigned)) - unsigned(1)) << start.astype(unsigned)
        return (a << start.astype(unsigned)) & mask | b & ~mask

    return elementwise(kernel, instruction, [kind, kind, "u32", "u32"], compute)


@decodes("selp")
def select(kernel: Kernel, instruction: Instruction) -> Step:
    """The first source where the predicate holds, else the second."""
    (kind,) = _modifiers(kernel, instruction, 1)
    kind = f"b{bits(kind)}"
    return elementwise(kernel, instruction, [kind, kind, "pred"], lambda a, b, p: np.where(p, a, b))


@decodes("setp")
def compare(kernel: Kernel, instruction: Instruction) -> Step:
    """A comparison, perhaps combined with a predicate."""
    how, *combined, kind = instruction.modifiers
    relation = _ORDERED.get(how) or _UNORDERED.get(how)
    if relation is None or len(combined) > 1 or (combined and combined[0] not in _LOGIC):
        raise unknown(kernel, instruction)
    if not combined:
        return elementwise(kernel, instruction, [kind, kind], relation)
    combine = _LOGIC[combined[0]]
    return elementwise(kernel, instruction, [kind, kind, "pred"], lambda a, b, p: combine(relation(a, b), p))


@decodes("mov")
def move(kernel: Kernel, instruction: Instruction) -> Step:
    """A copy; or a register cut into a vector, or put together from one."""
    (kind,) = _modifiers(kernel, instruction, 1)
    destination, source = instruction.operands
    if destination.startswith("{"):
        return _unpack(kernel, destination, source, kind)
    if source.startswith("{"):
        return _pack(kernel, destination, source, kind)
    return elementwise(kernel, instruction, [kind if kind == "pred" else f"b{bits(kind)}"], lambda a: a)


def _unpack(kernel: Kernel, destination: str, source: str, kind: str) -> Step:
    names = vector(destination)
    width = bits(kind) // len(names)
    read, writes = reader(kernel, source, f"b{bits(kind)}"), [writer(kernel, name) for name in names]

    def step(lanes: Lanes, at: At) -> None:
        whole = read(lanes, at)
        for place, write in enumerate(writes):
            write(lanes, at, (whole >> whole.dtype.type(place * width)).astype(UNSIGNED[width]))

    return step


def _pack(kernel: Kernel, destination: str, source: str, kind: str) -> Step:
    names = vector(source)
    width, whole = bits(kind) // len(names), UNSIGNED[bits(kind)]
    write, reads = writer(kernel, destination), [reader(kernel, name, f"b{width}") for name in names]

    def step(lanes: Lanes, at: At) -> None:
        parts: list[Any] = [read(lanes, at).astype(whole) << whole(place * width) for place, read in enumerate(reads)]
        write(lanes, at, np.bitwise_or.reduce(np.broadcast_arrays(*parts)))

    return step


@decodes("cvta")
def convert_address(kernel: Kernel, instruction: Instruction) -> Step:
    """Global memory and the parameters lie at the same addresses in the generic space."""
    if "shared" in instruction.modifiers or "local" in instruction.modifiers:
        raise unknown(kernel, instruction)
    return elementwise(kernel, instruction, ["u64"], lambda a: a)


def _modifiers(kernel: Kernel, instruction: Instruction, count: int) -> tuple[str, ...]:
    """The modifiers, which must be as many as are understood."""
    if len(instruction.modifiers) != count:
        raise unknown(kernel, instruction)
    return instruction.modifiers
