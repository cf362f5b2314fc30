"""What the compiler made of the kernels: registers and memory from a cubin's ELF, and the instructions of its loops.

nvdisasm comes from PyPI (`pip install nvidia-cuda-nvdisasm==13.2.86`).
"""

import re
import struct
import subprocess
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

PACKAGE, VERSION = "nvidia-cuda-nvdisasm", "13.2.86"

# Attributes of .nv.info, a list of (format, attribute, size, value).
_WITH_VALUE = 4
_REGISTERS, _FRAME = 0x2F, 0x11

_FUNCTION = re.compile(r"\.section\s+\.text\.([\w$]+)")
_LABEL = re.compile(r"(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")


class SassError(Exception):
    """The disassembler is missing, or a cubin is not what it should be."""


@dataclass(frozen=True)
class Resources:
    """What a kernel occupies: registers a thread, bytes of shared memory a block, bytes of local memory a thread."""

    registers: int
    shared: int
    local: int


@dataclass(frozen=True)
class Instruction:
    """One machine instruction: `opcode` has its modifiers, `target` is where a branch goes."""

    address: int
    opcode: str
    operands: str
    conditional: bool
    target: int | None = None

    @property
    def goes_on(self) -> bool:
        """Whether the instruction after it may be next."""
        return self.conditional or not self.opcode.startswith(("BRA", "EXIT", "RET"))


@dataclass(frozen=True)
class Loop:
    """The instructions from a branch's target to that branch, which goes back."""

    instructions: tuple[Instruction, ...]

    @property
    def span(self) -> tuple[int, int]:
        """The addresses of its first and last instruction."""
        return self.instructions[0].address, self.instructions[-1].address

    def count(self, pattern: str) -> int:
        """How many instructions a pattern matches from their start."""
        return sum(bool(re.match(pattern, instruction.opcode)) for instruction in self.instructions)


@dataclass(frozen=True)
class Code:
    """A kernel's machine code."""

    instructions: tuple[Instruction, ...]

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """Every loop, the innermost of some that share an end first."""
        back = [i for i in self.instructions if i.target is not None and i.target < i.address]
        spans = sorted({(i.address - i.target, i.target, i.address) for i in back})
        return tuple(Loop(tuple(i for i in self.instructions if start <= i.address <= end)) for _, start, end in spans)

    def count(self, pattern: str) -> int:
        """How many instructions a pattern matches from their start."""
        return Loop(self.instructions).count(pattern)

    def shortest_way(self, start: int, end: int) -> int:
        """The fewest instructions from address `start` until the one at `end` is next."""
        places = {instruction.address: number for number, instruction in enumerate(self.instructions)}
        distances, queue = {places[start]: 0}, deque([places[start]])
        while queue and places[end] not in distances:
            here = queue.popleft()
            instruction = self.instructions[here]
            following = [here + 1] if instruction.goes_on else []
            following += [] if instruction.target is None else [places[instruction.target]]
            for number in following:
                if number < len(self.instructions) and number not in distances:
                    distances[number] = distances[here] + 1
                    queue.append(number)
        if places[end] not in distances:
            raise SassError(f"no way from {start:#x} to {end:#x}")
        return distances[places[end]]


def resources(cubin: bytes) -> dict[str, Resources]:
    """What each kernel of a cubin occupies."""
    sections = {name: (offset, size) for name, offset, size in _sections(cubin)}
    names = _symbols(cubin, sections)
    registers, frames = {}, {}
    for attribute, symbol, value in _info(cubin, *sections[".nv.info"]):
        if attribute == _REGISTERS:
            registers[names[symbol]] = value
        elif attribute == _FRAME:
            frames[names[symbol]] = value
    if not registers:
        raise SassError("the cubin says nothing of registers")
    return {
        name: Resources(count, sections.get(f".nv.shared.{name}", (0, 0))[1], frames[name])
        for name, count in sorted(registers.items())
    }


def _sections(elf: bytes) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each section."""
    if elf[:5] != b"\x7fELF\x02":
        raise SassError("not a 64-bit ELF file")
    (table,) = struct.unpack_from("<Q", elf, 40)
    size, count, names = struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
    for name, _, _, _, offset, length in headers:
        yield _text(elf, headers[names][4] + name), offset, length


def _text(elf: bytes, start: int) -> str:
    return elf[start : elf.index(b"\0", start)].decode()


def _symbols(elf: bytes, sections: Mapping[str, tuple[int, int]]) -> list[str]:
    offset, size = sections[".symtab"]
    return [
        _text(elf, sections[".strtab"][0] + struct.unpack_from("<I", elf, at)[0])
        for at in range(offset, offset + size, 24)
    ]


def _info(elf: bytes, offset: int, size: int) -> Iterator[tuple[int, int, int]]:
    """(attribute, symbol, value) of those attributes that are pairs."""
    end = offset + size
    while offset < end:
        kind, attribute, length = struct.unpack_from("<BBH", elf, offset)
        if kind == _WITH_VALUE and length == 8:
            yield attribute, *struct.unpack_from("<II", elf, offset + 4)
        offset += 4 + (length if kind == _WITH_VALUE else 0)


def disassemble(cubin: bytes) -> dict[str, Code]:
    """The machine code of each kernel of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(disassembler()), "-c", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SassError(f"nvdisasm: {done.stderr.strip()}")
    parts = _FUNCTION.split(done.stdout)[1:]
    return {name: _code(text) for name, text in zip(parts[::2], parts[1::2], strict=True)}


def disassembler() -> Path:
    """Where the pinned wheel's nvdisasm lies."""
    advice = f"pip install {PACKAGE}=={VERSION}"
    try:
        wheel = distribution(PACKAGE)
    except PackageNotFoundError:
        raise SassError(f"nvdisasm is not installed: {advice}") from None
    if wheel.version != VERSION:
        raise SassError(f"expected {PACKAGE}=={VERSION}, found {wheel.version}: {advice}")
    found = [Path(str(wheel.locate_file(file))) for file in wheel.files or [] if file.name == "nvdisasm"]
    if not found:
        raise SassError(f"{PACKAGE}=={VERSION} holds no nvdisasm for this system")
    return found[0]


def _code(text: str) -> Code:
    """A function's listing, parsed."""
    found: list[tuple[int, str, str, bool]] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    for line in text.splitlines():
        if label := _LABEL.match(line.strip()):
            waiting.append(label.group(1))
        elif instruction := _INSTRUCTION.search(line):
            place, predicate, opcode, operands = instruction.groups()
            address = int(place, 16)
            labels.update(dict.fromkeys(waiting, address))
            waiting = []
            # A branch may have its predicate among its operands.
            conditional = predicate is not None or (opcode.startswith("BRA") and "," in operands)
            found.append((address, opcode, operands, conditional))
    return Code(tuple(Instruction(*row, _target(row[1], row[2], labels)) for row in found))


def _target(opcode: str, operands: str, labels: Mapping[str, int]) -> int | None:
    match = _TARGET.search(operands) if opcode.startswith("BRA") else None
    return labels[match.group(1)] if match else None
