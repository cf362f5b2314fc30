"""The table of instructions: what each does to some lanes. Control flow and block barriers are the machine's."""

from collections.abc import Callable, Sequence
from typing import Any

from tests.cuda.emulation.ptx.errors import UnknownInstructionError
from tests.cuda.emulation.ptx.lanes import At, Lanes
from tests.cuda.emulation.ptx.operands import reader, writer
from tests.cuda.emulation.ptx.syntax import Instruction, Kernel

Step = Callable[[Lanes, At], None]
Decoder = Callable[[Kernel, Instruction], Step]

_DECODERS: dict[str, Decoder] = {}


def decodes(*opcodes: str) -> Callable[[Decoder], Decoder]:
    """Enters a decoder in the table."""

    def enter(decoder: Decoder) -> Decoder:
        _DECODERS.update(dict.fromkeys(opcodes, decoder))
        return decoder

    return enter


def decode(kernel: Kernel, instruction: Instruction) -> Step:
    """What an instruction does."""
    decoder = _DECODERS.get(instruction.opcode)
    if decoder is None:
        raise unknown(kernel, instruction)
    return decoder(kernel, instruction)


def unknown(kernel: Kernel, instruction: Instruction, why: str = "is not known") -> UnknownInstructionError:
    """The error for an instruction that the interpreter will not guess about."""
    return UnknownInstructionError(f"{kernel.name}: `{instruction.text}` {why}")


def elementwise(kernel: Kernel, instruction: Instruction, kinds: Sequence[str], compute: Callable[..., Any]) -> Step:
    """`destination = compute(sources)`, each source read as its kind."""
    destination, *sources = instruction.operands
    if len(sources) != len(kinds):
        raise unknown(kernel, instruction)
    write = writer(kernel, destination)
    reads = [reader(kernel, source, kind) for source, kind in zip(sources, kinds, strict=True)]

    def step(lanes: Lanes, at: At) -> None:
        write(lanes, at, compute(*[read(lanes, at) for read in reads]))

    return step
