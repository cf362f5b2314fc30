"""PTX text to kernels: parameters, registers, shared memory and instructions, whose meaning is not looked at here."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache

from tests.cuda.emulation.ptx.errors import PtxSyntaxError

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_ENTRY = re.compile(r"\.(?:visible\s+|weak\s+)?\.?entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{")
_LABEL = re.compile(r"([\w$]+):")
_INSTRUCTION = re.compile(r"(?:@(!?)(%[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.DOTALL)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)$", re.DOTALL)
_SHARED = re.compile(r"(\.extern\s+)?\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]$")
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?([\w$]+)(?:\[(\d+)\])?$"
)
_LIMIT = re.compile(r"\.(maxntid|reqntid)\s+([\d\s,]+)")
_MODULE_SHARED = re.compile(r"(?:\.extern\s+)?\.shared\s+[^;]*;")


@dataclass(frozen=True)
class Parameter:
    """A kernel's argument: where it lies among the others, in bytes."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Instruction:
    """One instruction as it is written."""

    text: str
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    predicate: str | None = None
    negated: bool = False

    @property
    def type(self) -> str:
        """The last modifier: the type of what is computed."""
        return self.modifiers[-1] if self.modifiers else ""


@dataclass
class Kernel:
    """A kernel, parsed."""

    name: str
    parameters: tuple[Parameter, ...]
    threads_limit: int | None
    registers: dict[str, str] = field(default_factory=dict)  # name or prefix of names to type
    shared: dict[str, int] = field(default_factory=dict)
    shared_bytes: int = 0
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def without(self, number: int) -> "Kernel":
        """The kernel with one instruction left out."""
        kept = [instruction for i, instruction in enumerate(self.instructions) if i != number]
        labels = {label: place - (place > number) for label, place in self.labels.items()}
        return replace(self, instructions=kept, labels=labels)

    @property
    def symbols(self) -> dict[str, int]:
        """Addresses of shared variables and of parameters, each in its own memory."""
        return {**self.shared, **{parameter.name: parameter.offset for parameter in self.parameters}}

    def register_type(self, name: str) -> str:
        """The type that a register was declared with."""
        kind = self.registers.get(name) or self.registers.get(name.rstrip("0123456789"))
        if kind is None:
            raise PtxSyntaxError(f"{self.name}: register {name} is not declared")
        return kind


def parse(text: str) -> dict[str, Kernel]:
    """The kernels of a PTX text by name."""
    text = _COMMENT.sub("", text.rstrip("\0"))
    kernels, common = {}, [match.group().rstrip(";") for match in _MODULE_SHARED.finditer(_outside_bodies(text))]
    for entry in _ENTRY.finditer(text):
        name, parameters, directives, start = *entry.groups(), entry.end()
        kernel = Kernel(name, tuple(_parameters(parameters)), _threads_limit(directives))
        for declaration in common:
            _declare_shared(kernel, declaration)
        for statement in _statements(text[start : _closing_brace(text, start)]):
            _add(kernel, statement)
        kernels[name] = kernel
    if not kernels:
        raise PtxSyntaxError("the text defines no kernel")
    return kernels


def _outside_bodies(text: str) -> str:
    """The module's own declarations."""
    kept, end = [], 0
    for entry in _ENTRY.finditer(text):
        kept.append(text[end : entry.start()])
        end = _closing_brace(text, entry.end()) + 1
    outside = "".join([*kept, text[end:]])
    # The compiler leaves the sources' constants behind as variables; to use one is an unknown operand.
    if found := re.search(r"\.(func|texref|surfref)\b", outside):
        raise PtxSyntaxError(f"a module's .{found.group(1)} is not known")
    return outside


def _closing_brace(text: str, start: int) -> int:
    depth = 1
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return start + brace.start()
    raise PtxSyntaxError("a kernel's body does not end")


def _parameters(text: str) -> Iterator[Parameter]:
    offset = 0
    for declaration in filter(None, (part.strip() for part in text.split(","))):
        match = _PARAMETER.match(" ".join(declaration.split()))
        if match is None:
            raise PtxSyntaxError(f"parameter: {declaration}")
        align, kind, name, count = match.groups()
        size = bits(kind) // 8
        align = int(align) if align else size
        offset = -(-offset // align) * align
        yield Parameter(name, offset, size * int(count or 1))
        offset += size * int(count or 1)


@cache
def bits(kind: str) -> int:
    """The width of a type: 32 for `u32`."""
    match = re.fullmatch(r"[busf](\d+)|bf16|f16x2|bf16x2", kind)
    if match is None:
        raise PtxSyntaxError(f"type .{kind} is not known")
    return int(match.group(1)) if match.group(1) else 32 if kind.endswith("x2") else 16


def _threads_limit(directives: str) -> int | None:
    match = _LIMIT.search(directives)
    if match is None:
        return None
    x, y, z = ([int(size) for size in match.group(2).split(",")] + [1, 1])[:3]
    return x * y * z


def _statements(body: str) -> Iterator[str]:
    """Statements without their semicolons, labels with their colons; the braces of inner scopes are passed over."""
    position = 0
    while position < len(body):
        if body[position].isspace() or body[position] in "{}":
            position += 1
        elif label := _LABEL.match(body, position):
            yield label.group()
            position = label.end()
        else:
            end = body.find(";", position)
            if end < 0:
                raise PtxSyntaxError(f"no semicolon after: {body[position:]}")
            yield body[position:end].strip()
            position = end + 1


def _add(kernel: Kernel, statement: str) -> None:
    """Takes a statement up into the kernel."""
    if statement.endswith(":"):
        kernel.labels[statement[:-1]] = len(kernel.instructions)
    elif registers := _REGISTERS.match(statement):
        _declare_registers(kernel, *registers.groups())
    elif ".shared" in statement.split():
        _declare_shared(kernel, statement)
    elif statement.startswith(".pragma"):
        pass
    elif instruction := _INSTRUCTION.match(statement):
        kernel.instructions.append(_instruction(statement, *instruction.groups()))
    else:
        raise PtxSyntaxError(f"{kernel.name}: {statement}")


def _declare_registers(kernel: Kernel, kind: str, names: str) -> None:
    for name in (name.strip() for name in names.split(",")):
        prefix = name.partition("<")[0]
        if kernel.registers.setdefault(prefix, kind) != kind:
            raise PtxSyntaxError(f"{kernel.name}: register {prefix} is .{kernel.registers[prefix]} and .{kind}")


def _declare_shared(kernel: Kernel, statement: str) -> None:
    match = _SHARED.match(" ".join(statement.split()))
    if match is None:
        raise PtxSyntaxError(f"{kernel.name}: {statement}")
    _, align, name, size = match.groups()
    kernel.shared[name] = -(-kernel.shared_bytes // int(align)) * int(align)
    kernel.shared_bytes = kernel.shared[name] + int(size or 0)


def _instruction(text: str, negated: str | None, predicate: str | None, name: str, operands: str) -> Instruction:
    opcode, *modifiers = re.split(r"\.|(?<=L1)::|(?<=L2)::", name)
    parts = tuple(operand.strip() for operand in _OPERAND.findall(operands))
    return Instruction(" ".join(text.split()), opcode, tuple(modifiers), parts, predicate, bool(negated))
