"""Which files of a folder go along with a converted checkpoint, and which of the folder that it replaces stay."""

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from vhead.checkpoints.checkpoint import SIDE_FILES, regular_file

# What is written anew, and what is a trainer's.
_NOT_CARRIED = re.compile(r"(adapter_)?config\.json|trainer_state\.json|.*\.index(\..+)?\.json")
_CARRIED_FOLDER = "additional_chat_templates"

# What tells a loader which model a folder holds: an old adapter's would win over a new model's.
_OF_MODEL = re.compile(
    r"(adapter_)?config\.json|.*\.index\.json|value_head\..+"
    r"|(model|pytorch_model|adapter_model)(-\d+-of-\d+)?\.(safetensors|bin)"
)


def carried(source: Path) -> Iterator[str]:
    """The names of a checkpoint's files that a conversion copies as they are."""
    for path in sorted(source.iterdir()):
        if path.name == _CARRIED_FOLDER and path.is_dir():
            yield from (f"{path.name}/{child.name}" for child in sorted(path.iterdir()) if not child.is_dir())
        elif path.suffix in SIDE_FILES and not path.is_dir() and not _NOT_CARRIED.fullmatch(path.name):
            yield path.name


def copy_files(source: Path, names: Iterable[str], folder: Path) -> None:
    """Copies a checkpoint's files by name.

    Raises:
        HeadFileError: One is no regular file, or a link that leads out of the checkpoint.
    """
    for name in names:
        path = regular_file(source, name)
        if path is not None:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / name)


def keep_others(replaced: Path, folder: Path) -> None:
    """Keeps what lies in a replaced folder and belongs to no checkpoint, unless the new folder has that name already.

    Files are linked, not copied: nothing is read, and whoever has one open writes into the same file.

    Args:
        replaced: The folder that will be replaced.
        folder: The new checkpoint's folder.
    """
    if not replaced.is_dir():
        return
    new = {path.name for path in folder.iterdir()}

    def left_out(place: str, names: list[str]) -> set[str]:
        is_top = Path(place) == replaced
        return {name for name in names if is_top and (name in new or _OF_MODEL.fullmatch(name))}

    shutil.copytree(replaced, folder, symlinks=True, ignore=left_out, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        # Some file systems have no second names for one file.
        shutil.copy2(source, target, follow_symlinks=False)
