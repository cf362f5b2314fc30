"""Files and folders whose names always lead to something whole: what was there before, or what is new.

What is new is written under a name of its own beside its place, reaches the disk, and takes the place in one step of
the file system. No two writers share a name, and whoever has opened what was there before goes on reading that. A run
that is killed leaves `.NAME.<16 hexadecimal digits>.unfinished`, which can be deleted; nothing here takes or deletes a
name that it has not made.
"""

import ctypes
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from vhead.errors import naming

# Long names have to leave room for what is put around them: file systems take 255 bytes.
_KEPT_OF_NAME = 40

# What Linux calls them in fcntl.h and stdio.h: paths from the current folder on, and a renaming that swaps two names.
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# What a system or a file system answers that cannot swap.
_NOT_OFFERED = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP})


@contextmanager
def replacing_file(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends, and leaves nothing behind where the block fails.

    Args:
        path: The file's name; there may be a regular file of that name, which is replaced, and nothing else.

    Raises:
        FileExistsError: There is something else of that name: a folder, a link, a device.
        OSError: The file cannot be written.
    """
    _check_is_file_or_nothing(path)
    unfinished = _beside(path)
    with _removed_unless_placed(unfinished):
        with naming(path), unfinished.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    _sync(path.parent)


@contextmanager
def replacing_folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A new folder that takes the place of `path` when the block ends, and leaves nothing behind where the block fails.

    A folder that is there already is swapped for the new one in one step and then deleted.

    Args:
        path: The folder's name. Folders around it are made.
        overwrite: Whether a folder that holds something is replaced.

    Raises:
        FileExistsError: There is a folder that holds something and is not to be replaced.
        OSError: The folder cannot be written, or the file system cannot swap two folders in one step.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    swaps = overwrite and path.exists()
    if swaps:
        _check_swapping(path)
    unfinished = _beside(path)
    unfinished.mkdir()
    try:
        with naming(path):
            yield unfinished
            _sync_tree(unfinished)
        if swaps:
            _swap(unfinished, path)
        else:
            _place(unfinished, path)
        _sync(path.parent)
    finally:
        # After a swap, this is the folder that was there before.
        if unfinished.exists():
            shutil.rmtree(unfinished)


def _beside(path: Path) -> Path:
    """A name in the same folder that nobody else has."""
    return path.with_name(f".{path.name[:_KEPT_OF_NAME]}.{secrets.token_hex(8)}.unfinished")


@contextmanager
def _removed_unless_placed(unfinished: Path) -> Iterator[None]:
    if not unfinished.parent.is_dir():
        raise FileNotFoundError(f"{unfinished.parent}: no such folder")
    try:
        yield
    finally:
        unfinished.unlink(missing_ok=True)


def _check_is_file_or_nothing(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a link" if stat.S_ISLNK(mode) else "no regular file"
        raise FileExistsError(f"{path}: expected a file to replace or nothing, found {kind}")


def _place(folder: Path, path: Path) -> None:
    """Gives a folder its name, which may be that of an empty folder."""
    try:
        folder.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise FileExistsError(f"{path}: another folder was put there in the meantime, and was left alone") from error


def _check_swapping(path: Path) -> None:
    """Tries whether the file system swaps folders, on two empty ones, before anything is written."""
    one, other = _beside(path), _beside(path)
    one.mkdir()
    try:
        other.mkdir()
        try:
            _swap(one, other)
        finally:
            other.rmdir()
    finally:
        one.rmdir()


def _swap(one: Path, other: Path) -> None:
    """Swaps the names of two folders in one step, so that there is no moment without one of either name."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        code = errno.ENOSYS
    elif libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return
    else:
        code = ctypes.get_errno()
    if code in _NOT_OFFERED:
        raise OSError(
            code,
            "this file system cannot replace a folder in one step, so for a moment there would be no model; "
            "remove the folder first, or write to another name",
            str(other.parent),
        )
    raise OSError(code, os.strerror(code), str(other))


def _sync_tree(folder: Path) -> None:
    for place, _, files in os.walk(folder):
        for name in files:
            _sync(Path(place, name))
        _sync(Path(place))


def _sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    if not (path.is_file() or path.is_dir()) or path.is_symlink():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
