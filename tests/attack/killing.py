"""A process that is killed at one of its file operations, without a process of its own.

The operations go through the module `os`, so that a stand-in can count them. At the chosen one it raises, before it or,
for writing, in the middle of it, and from then on nothing reaches the disk any more: no clean-up that a killed
process would not have done either.
"""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Those that change what is on the disk; `Path`'s methods call them too.
OPERATIONS = ("open", "write", "ftruncate", "fsync", "replace", "rename", "unlink", "link", "mkdir")


class Killed(BaseException):
    """The process is no more."""


class Killer:
    """Counts file operations and ends everything at one of them.

    Args:
        monkeypatch: Puts `os` back.
        at: Which operation is the last; None: none is.
        torn: Whether the last one, where it writes, writes half.

    Attributes:
        done: The operations so far, by name.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int | None = None, *, torn: bool = False) -> None:
        self._at, self._torn = at, torn
        self._dead = False
        self._files: list[int] = []
        self.done: list[str] = []
        for name in OPERATIONS:
            monkeypatch.setattr(os, name, self._counted(name, getattr(os, name)))

    def _counted(self, name: str, operation: Callable[..., object]) -> Callable[..., object]:
        def stand_in(*arguments: object, **options: object) -> object:
            if self._dead:
                raise Killed
            if len(self.done) == self._at:
                self._dead = True
                if self._torn and name == "write":
                    file, data = arguments
                    operation(file, bytes(data)[: len(data) // 2])
                raise Killed
            self.done.append(name)
            result = operation(*arguments, **options)
            if name == "open":
                self._files.append(result)
            return result

        return stand_in

    def bury(self) -> None:
        """Ends the locks of the dead, as the end of a process does; the files themselves are closed by their owners."""
        for file in self._files:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)


@contextlib.contextmanager
def killed_at(at: int | None, *, torn: bool = False) -> Iterator[Killer]:
    """Runs a block whose file operations end at the chosen one."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        killer = Killer(monkeypatch, at, torn=torn)
        with contextlib.suppress(Killed):
            yield killer
    killer.bury()


def snapshot(folder: Path) -> dict[str, bytes]:
    """What is in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
