"""Loads, stores, and a warp's exchanges."""

from collections.abc import Callable

import numpy as np

from tests.cuda.emulation.ptx.errors import ShuffleError
from tests.cuda.emulation.ptx.lanes import UNSIGNED, Array, At, Lanes
from tests.cuda.emulation.ptx.operands import address, as_type, dtype, reader, vector, writer
from tests.cuda.emulation.ptx.operations import Step, decodes, unknown
from tests.cuda.emulation.ptx.syntax import Instruction, Kernel, bits

# Where data are kept on the way changes no result.
_HINTS = {
    "nc",
    "ca",
    "cg",
    "cs",
    "lu",
    "cv",
    "wb",
    "wt",
    "volatile",
    "L1",
    "L2",
    "no_allocate",
    "evict_first",
    "evict_last",
}
_HINTS |= {"evict_normal", "evict_unchanged", "64B", "128B", "256B"}
_SPACES = {"global", "shared", "param"}
_VECTORS = {"v2": 2, "v4": 4}
_WARP = 32
_ALL_LANES = 0xFFFFFFFF


@decodes("ld", "ldu")
def load(kernel: Kernel, instruction: Instruction) -> Step:
    """From one of the memories to one register or several."""
    space, kind, count = _access(kernel, instruction)
    destination, source = instruction.operands
    names, size = vector(destination), bits(kind) // 8
    if len(names) != count:
        raise unknown(kernel, instruction)
    where, writes = address(kernel, source), [writer(kernel, name) for name in names]
    fetch = {"global": _load_global, "shared": _load_shared, "param": _load_parameter}[space]

    def step(lanes: Lanes, at: At) -> None:
        values = fetch(lanes, at, where(lanes, at), size * count).view(dtype(kind))
        for place, write in enumerate(writes):
            write(lanes, at, values[:, place])

    return step


@decodes("st")
def store(kernel: Kernel, instruction: Instruction) -> Step:
    """From one register or several to global or shared memory."""
    space, kind, count = _access(kernel, instruction)
    destination, source = instruction.operands
    names, width = vector(source), bits(kind)
    if len(names) != count or space == "param":
        raise unknown(kernel, instruction)
    where, reads = address(kernel, destination), [_stored(kernel, name, width) for name in names]

    def step(lanes: Lanes, at: At) -> None:
        addresses = where(lanes, at)
        values = np.empty((len(addresses), count), UNSIGNED[width])
        for place, read in enumerate(reads):
            values[:, place] = read(lanes, at)
        data = values.view(np.uint8)
        if space == "shared":
            lanes.shared.write(addresses, data.shape[1], lanes.numbers[at], data)
        else:
            lanes.memory.write(addresses, data.shape[1], lanes.global_numbers[at], data)

    return step


def _stored(kernel: Kernel, name: str, width: int) -> Callable[[Lanes, At], Array]:
    """Reads what is stored: a byte comes from the low part of a wider register."""
    if not name.startswith("%"):
        return reader(kernel, name, f"b{width}")
    return lambda lanes, at: as_type(lanes.register(name)[at], UNSIGNED[width])


def _access(kernel: Kernel, instruction: Instruction) -> tuple[str, str, int]:
    """Memory, type and number of registers of a load or store."""
    *modifiers, kind = instruction.modifiers
    spaces = [modifier for modifier in modifiers if modifier in _SPACES]
    counts = [_VECTORS[modifier] for modifier in modifiers if modifier in _VECTORS]
    if len(spaces) != 1 or set(modifiers) - _SPACES - _VECTORS.keys() - _HINTS:
        raise unknown(kernel, instruction)
    return spaces[0], kind, counts[0] if counts else 1


def _load_global(lanes: Lanes, at: At, addresses: Array, size: int) -> Array:
    return lanes.memory.read(addresses, size, lanes.global_numbers[at])


def _load_shared(lanes: Lanes, at: At, addresses: Array, size: int) -> Array:
    return lanes.shared.read(addresses, size, lanes.numbers[at])


def _load_parameter(lanes: Lanes, _at: At, addresses: Array, size: int) -> Array:
    return lanes.parameters.read(addresses, size)


@decodes("shfl")
def exchange(kernel: Kernel, instruction: Instruction) -> Step:
    """Each lane of a warp reads a register of another."""
    sync, mode, kind = instruction.modifiers
    destination, _, valid = instruction.operands[0].partition("|")
    value, other, clamp, mask = (reader(kernel, operand, "u32") for operand in instruction.operands[1:])
    if sync != "sync" or kind != "b32" or mode not in {"bfly", "idx", "up", "down"}:
        raise unknown(kernel, instruction)
    write, write_valid = writer(kernel, destination), writer(kernel, valid or "_")

    def step(lanes: Lanes, at: At) -> None:
        whole_warps(kernel, instruction, lanes, at, mask(lanes, at))
        values = np.broadcast_to(value(lanes, at), lanes.numbers[at].shape)
        source, inside = _source(mode, lanes.numbers[at] % _WARP, other(lanes, at), clamp(lanes, at))
        first = np.arange(len(values)) // _WARP * _WARP
        write(lanes, at, values[first + source])
        write_valid(lanes, at, inside)

    return step


def _source(mode: str, lane: Array, other: Array, clamp: Array) -> tuple[Array, Array]:
    """Which lane is read, and whether there is one; else a lane reads its own register."""
    lane, other = lane.astype(np.int64), (other & np.uint32(31)).astype(np.int64)
    segment, last = (clamp >> np.uint32(8) & np.uint32(31)).astype(np.int64), (clamp & np.uint32(31)).astype(np.int64)
    lowest, highest = lane & segment, (lane & segment) | (last & ~segment)
    source = {"bfly": lane ^ other, "up": lane - other, "down": lane + other, "idx": lowest | (other & ~segment)}[mode]
    inside = source >= highest if mode == "up" else source <= highest
    return np.where(inside, source, lane), inside


_REDUCTIONS = {"or": np.bitwise_or, "and": np.bitwise_and, "xor": np.bitwise_xor, "add": np.add}
_REDUCTIONS |= {"min": np.minimum, "max": np.maximum}


@decodes("redux")
def reduce(kernel: Kernel, instruction: Instruction) -> Step:
    """The warp's integers taken together, in every lane."""
    sync, how, kind = instruction.modifiers
    if sync != "sync" or how not in _REDUCTIONS:
        raise unknown(kernel, instruction)
    destination, source, mask_operand = instruction.operands
    read, mask = reader(kernel, source, kind), reader(kernel, mask_operand, "u32")
    write, together = writer(kernel, destination), _REDUCTIONS[how]

    def step(lanes: Lanes, at: At) -> None:
        whole_warps(kernel, instruction, lanes, at, mask(lanes, at))
        values = np.broadcast_to(read(lanes, at), lanes.numbers[at].shape).reshape(-1, _WARP)
        write(lanes, at, np.repeat(together.reduce(values, axis=1, dtype=values.dtype), _WARP))

    return step


@decodes("activemask", "vote", "match")
def depends_on_timing(kernel: Kernel, instruction: Instruction) -> Step:
    """Which lanes are together is not defined."""
    raise unknown(kernel, instruction)


def whole_warps(kernel: Kernel, instruction: Instruction, lanes: Lanes, at: At, mask: Array) -> None:
    """Raises where a warp comes without some of its lanes, all of which the mask must name."""
    if (mask != _ALL_LANES).any():
        raise unknown(kernel, instruction, "names not every lane of the warp")
    numbers = lanes.numbers[at]
    if isinstance(at, slice):
        return
    present = np.bincount(numbers // _WARP, minlength=lanes.count // _WARP)
    if ((present != 0) & (present != _WARP)).any():
        warp = int(np.flatnonzero((present != 0) & (present != _WARP))[0])
        missing = sorted(set(range(_WARP)) - set((numbers[numbers // _WARP == warp] % _WARP).tolist()))
        raise ShuffleError(f"{kernel.name}: `{instruction.text}` without lanes {missing} of warp {warp}")


@decodes("membar", "fence")
def fence(_kernel: Kernel, _instruction: Instruction) -> Step:
    """An order that the interpreter, which runs one instruction after another, has anyway."""
    return lambda _lanes, _at: None
