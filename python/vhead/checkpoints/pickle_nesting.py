"""Finds pickles with tuples that would take years to hash, from their opcodes and before anything is made of them.

A tuple that holds another one twice, which holds another one twice, and so on, takes a few hundred bytes. As a key of a
dictionary it is hashed, and each level doubles the time, inside one call of Python's that no signal ends.
"""

import pickletools
from collections.abc import Iterable, Iterator
from typing import IO

# Far more than the sizes, the strides and the storage of a tensor, and hashed in milliseconds.
_MOST_ELEMENTS = 100_000

# A file of torch's without an archive: a number, the version, the machine, the tensors, the names of the storages.
_PICKLES_IN_A_FILE = 5


def is_too_nested(file: IO[bytes]) -> bool:
    """Whether one of the pickles at the beginning of a file holds a tuple of too many elements.

    An element counts once for each way that leads to it. A file that is no pickle passes: reading it ends in an error
    by itself.
    """
    try:
        return any(size > _MOST_ELEMENTS for _ in range(_PICKLES_IN_A_FILE) for size in _tuple_sizes(file))
    except (ValueError, IndexError, KeyError, AttributeError):
        return False


def _tuple_sizes(file: IO[bytes]) -> Iterator[int]:
    """The elements of each tuple of a pickle; everything else is one element, whatever it holds."""
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[object, int] = {}
    for opcode, argument, _ in pickletools.genops(file):
        name = opcode.name
        # A number of bytes that it is to make, of which none is in the file; nothing of a head needs one.
        if name in ("GLOBAL", "SHORT_BINUNICODE", "BINUNICODE") and str(argument).rpartition(" ")[2] == "bytearray":
            yield _MOST_ELEMENTS + 1
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
                yield size
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
