"""Finds pickles that would take all time or memory, from their opcodes and before anything is made of them.

A tuple that holds another one twice, which holds another one twice, and so on, takes a few hundred bytes. As a key of a
dictionary it is hashed, and each level doubles the time, inside one call of Python's that no signal ends. And a
bytearray is made of a number.
"""

import pickletools
from collections.abc import Iterable, Iterator
from typing import IO

# Far more than the sizes, the strides and the storage of a tensor, and hashed in milliseconds.
_MOST_ELEMENTS = 100_000

# A file of torch's without an archive: a number, the version, the machine, the tensors, the names of the storages.
_PICKLES_IN_A_FILE = 5


def bomb_in(file: IO[bytes]) -> str | None:
    """What one of the pickles at the beginning of a file holds that would take all time or memory, or None.

    A file that is no pickle passes: reading it ends in an error by itself.
    """
    try:
        return next((bomb for _ in range(_PICKLES_IN_A_FILE) for bomb in _bombs(file)), None)
    except (ValueError, IndexError, KeyError, AttributeError):
        return None


def _bombs(file: IO[bytes]) -> Iterator[str]:
    """Counts the elements of each tuple, an element once for each way that leads to it; everything else is one."""
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[object, int] = {}
    for opcode, argument, _ in pickletools.genops(file):
        name = opcode.name
        # Its bytes need not be in the file: a number says how many zeros to make. Nothing of a head needs one.
        if name in ("GLOBAL", "SHORT_BINUNICODE", "BINUNICODE") and str(argument).rpartition(" ")[2] == "bytearray":
            yield "a bytearray, which a number can make of any size"
        if name == "MARK":
            marks.append(len(stack))
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name.endswith("PUT"):
            memo[argument] = stack[-1]
        elif name.endswith("GET"):
            stack.append(memo[argument])
        elif name == "DUP":
            stack.append(stack[-1])
        else:
            taken = _take(opcode.stack_before, stack, marks)
            size = 1
            if name.startswith("TUPLE"):
                size += sum(taken)
                if size > _MOST_ELEMENTS:
                    yield "tuples inside tuples that would take years to read"
            stack += [size] * len(opcode.stack_after)


def _take(before: list[pickletools.StackObject], stack: list[int], marks: list[int]) -> Iterable[int]:
    """Removes from the stack what an opcode consumes, and returns it."""
    if pickletools.markobject in before:
        start = marks.pop() - before.index(pickletools.markobject)
    else:
        start = len(stack) - len(before)
    taken = stack[start:]
    del stack[start:]
    return taken
