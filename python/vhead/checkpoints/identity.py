"""What tells a model from any other: the content of its files, or its commit on the hub."""

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from vhead.checkpoints import ADAPTER_CONFIG
from vhead.checkpoints.checkpoint import Checkpoint, regular_file
from vhead.errors import HeadFileError


def identity(location: str, what: str) -> dict[str, str]:
    """The digests of a model's files by name, or the commit of a hub repository.

    Of a folder these are the files directly in it, and with an adapter also those of its base model. Reading them takes
    about a second for each gigabyte.

    Args:
        location: A folder, a file, or a hub repository's id.
        what: What the names in the result begin with, such as `model`.

    Raises:
        OSError: A file cannot be read.
    """
    path = Path(location)
    if not path.exists():
        return {what: _commit(location)}
    found = {f"{what} file {name}": digest for name, digest in _digests(path)}
    base = _base(path)
    # A base that is an adapter, or no model at all, is for its loader to refuse, and none of its files is read here.
    if base is None or (Path(base).is_dir() and not (Path(base) / "config.json").is_file()):
        return found
    return found | identity(base, "base")


def _digests(path: Path) -> Iterator[tuple[str, str]]:
    """Of a folder's own regular files and its chat templates; what a link shows from elsewhere is not the model's."""
    if path.is_file():
        yield path.name, _digest(path)
        return
    for file in sorted([*path.iterdir(), *path.glob("additional_chat_templates/*")]):
        name = str(file.relative_to(path))
        with suppress(HeadFileError):
            if file.is_file() and regular_file(path, name) is not None:
                yield name, _digest(file)


def _digest(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _base(path: Path) -> str | None:
    """The model that an adapter belongs to; its loader says what is wrong with a configuration that names none."""
    try:
        named = Checkpoint(path).json_object(ADAPTER_CONFIG).get("base_model_name_or_path")
    except HeadFileError:
        return None
    return named if isinstance(named, str) and named else None


def _commit(location: str) -> str:
    checkpoint = Checkpoint(location)
    path = checkpoint.path("config.json") or checkpoint.path(ADAPTER_CONFIG)
    # Files of the hub's cache lie in a folder that is called by their commit.
    return location if path is None else f"{location} at {path.parent.name}"
