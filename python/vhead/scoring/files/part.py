"""The file that an output grows in: one run's at a time, only ever a regular file, with a digest of what it holds."""

import errno
import fcntl
import hashlib
import io
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from vhead.errors import OutputBusyError, OutputError, naming

logger = logging.getLogger("vhead")

_BLOCK = 2**20
_OPEN = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Sink(Protocol):
    """What bytes are appended to."""

    def write(self, data: bytes, /) -> object:
        """Appends bytes."""

    def flush(self) -> None:
        """Hands what was appended to the operating system."""


class GrowingFile(io.RawIOBase):
    """A file that is appended to, under a lock that ends with the process.

    Args:
        path: Its name; what is there already stays until it is cut.
        new: Whether nothing may be there.

    Raises:
        OutputBusyError: Another run holds it.
        OutputError: There is something else than a regular file with this one name.
        OSError: It cannot be opened.
    """

    def __init__(self, path: Path, *, new: bool = False) -> None:
        super().__init__()
        self.path = path
        self._file = _locked(path, os.O_EXCL if new else 0)
        self._digest = hashlib.sha256()
        self._length = 0

    @property
    def is_empty(self) -> bool:
        """Whether nothing was in it when it was opened, and nothing is now."""
        return os.fstat(self._file).st_size == 0

    @property
    def digest(self) -> str:
        """The digest of the bytes that it holds."""
        return self._digest.hexdigest()

    def cut(self, length: int) -> bool:
        """Keeps the first `length` bytes, which it reads for the digest, and drops the rest; False: there are fewer."""
        self._digest, self._length = hashlib.sha256(), 0
        with naming(self.path):
            os.lseek(self._file, 0, os.SEEK_SET)
            while self._length < length and (block := os.read(self._file, min(_BLOCK, length - self._length))):
                self._digest.update(block)
                self._length += len(block)
            if self._length < length:
                return False
            os.ftruncate(self._file, length)
        return True

    def write(self, data: Any) -> int:
        """Appends all of the bytes, and gives their number."""
        view = memoryview(data).cast("B")
        self._digest.update(view)
        self._length += len(view)
        left = view
        with naming(self.path):
            while len(left):
                left = left[os.write(self._file, left) :]
        return len(view)

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        """How many bytes it holds."""
        return self._length

    def sync(self) -> None:
        """Waits until all of it is on the disk."""
        with naming(self.path):
            os.fsync(self._file)

    def read_back(self) -> io.BufferedReader:
        """The same file from its beginning, to be read."""
        return open_regular(self.path)

    def close(self) -> None:
        """Closes the file, and with that releases the lock."""
        if not self.closed:
            super().close()
            os.close(self._file)


@contextmanager
def new_file(path: Path) -> Iterator[GrowingFile]:
    """Makes a new file, in place of one that a killed run may have left; it is deleted if the block fails."""
    path.unlink(missing_ok=True)
    with GrowingFile(path, new=True) as file:
        try:
            yield file
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def sync_folder(path: Path) -> None:
    """Waits until the names in a file's folder are on the disk."""
    folder = os.open(path.absolute().parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def open_regular(path: Path) -> io.BufferedReader:
    """Opens a regular file, to be read.

    Raises:
        OutputError: It is a link, a folder, a pipe or a device.
        OSError: It cannot be opened.
    """
    check_name(path)
    file = os.fdopen(os.open(path, os.O_RDONLY | _OPEN), "rb")
    try:
        _check_regular(file.fileno(), path)
    except BaseException:
        file.close()
        raise
    return file


def check_name(path: Path) -> None:
    """Checks that an output can be put under this name: nothing is there, or a regular file.

    Raises:
        OutputError: There is a link, a folder, a pipe or a device.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise OutputError(f"{path}: expected a file or nothing under the output's name, found {_kind(mode)}")


def _locked(path: Path, flags: int) -> int:
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | _OPEN | flags, 0o666)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                check_name(path)
            raise
        try:
            _check_regular(file, path)
            _lock(file, path)
            # Between opening and locking, the run that held it may have given the file another name.
            if _is_at(file, path):
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _lock(file: int, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputBusyError(f"{path}: another run is writing this output") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning("%s: files cannot be locked here, so a second run with this output would go unnoticed", path)


def _check_regular(file: int, path: Path) -> None:
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode):
        raise OutputError(f"{path}: expected a file, found {_kind(status.st_mode)}; delete it")
    if status.st_nlink > 1:
        raise OutputError(
            f"{path}: expected a file with one name, found one that has a second name (a hard link), whose content "
            "would change as well; delete this one"
        )


def _is_at(file: int, path: Path) -> bool:
    try:
        there = path.lstat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(file), there)


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISLNK, "a link"), (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"))
    return next((name for test, name in kinds if test(mode)), "a device or a socket")
