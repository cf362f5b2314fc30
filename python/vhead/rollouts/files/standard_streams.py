"""Standard input and output as streams of bytes that name themselves in errors, and that can always be closed.

A thread that reads `sys.stdin.buffer` holds its lock for as long as it waits. Whoever closes it then waits as well, and
the interpreter aborts if it has to end meanwhile.
"""

import errno
import io
import os
import select
import sys
import weakref
from collections.abc import Callable
from typing import Any, BinaryIO, TextIO, TypeVar

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def standard_input() -> BinaryIO:
    """Standard input; closing it ends the wait of a thread that reads it.

    Raises:
        OSError: It is closed, or nothing that can be read.
    """
    raw = _raw(sys.stdin, "standard input")
    if not isinstance(raw, StandardStream):
        return raw
    raw.perform(os.read, 0)
    return _Input(raw)


def standard_output() -> BinaryIO:
    """Standard output as a stream of bytes.

    Raises:
        OSError: It is closed.
    """
    raw = _raw(sys.stdout, "standard output")
    if not isinstance(raw, StandardStream):
        return raw
    raw.perform(os.write, b"")
    return io.BufferedWriter(raw)


class StandardStream(io.RawIOBase):
    """A file that belongs to the process: closing it leaves the file open, and ends waiting for it.

    Args:
        descriptor: The file's number.
        name: What errors call it.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self.name = name
        self._descriptor = descriptor
        self._closed, self._close = os.pipe()
        # A thread may still wait for it when this is closed.
        weakref.finalize(self, os.close, self._closed)

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def readinto(self, buffer: Any) -> int:
        """Reads what is there, as soon as there is something; gives the number of bytes, 0 at the end."""
        if not self._wait(select.POLLIN):
            return 0
        data = self.perform(os.read, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def write(self, data: Any) -> int:
        """Writes as much as there is room for, as soon as there is some; gives the number of bytes."""
        self._wait(select.POLLOUT)
        return self.perform(os.write, data)

    def perform(self, operation: Callable[[int, Argument], Result], argument: Argument) -> Result:
        """Performs an operation on the file, so that its errors name the file."""
        try:
            return operation(self._descriptor, argument)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.name) from None

    def close(self) -> None:
        """Ends waiting, here and in other threads."""
        if not self.closed:
            os.close(self._close)
        super().close()

    def _wait(self, event: int) -> bool:
        """Waits for the file; False where this was closed."""
        poll = select.poll()
        poll.register(self._descriptor, event)
        poll.register(self._closed, select.POLLIN)
        return all(descriptor != self._closed for descriptor, _ in poll.poll())


class _Input(io.BufferedReader):
    def close(self) -> None:
        # First what is below: a thread that reads this holds the lock that closing it takes.
        self.raw.close()
        super().close()


def _raw(stream: TextIO | None, name: str) -> StandardStream | BinaryIO:
    """What is below one of the process's streams; a program that has put its own in the place gets that one's bytes."""
    if stream is None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF), name)
    try:
        return StandardStream(stream.fileno(), name)
    except io.UnsupportedOperation:
        return stream.buffer
