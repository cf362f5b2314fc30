"""What tells a model from any other: the content of its files, or its commit on the hub."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from vhead.checkpoints import ADAPTER_CONFIG


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
    return {f"{what} file {name}": digest for name, digest in _digests(path)}


def _digests(path: Path) -> Iterator[tuple[str, str]]:
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    for file in files:
        with file.open("rb") as content:
            yield file.name, hashlib.file_digest(content, "sha256").hexdigest()
    if base := _base(path / ADAPTER_CONFIG):
        yield from identity(base, "base").items()


def _base(config: Path) -> str | None:
    """The model that an adapter belongs to; its loader says what is wrong with a configuration that names none."""
    try:
        named = json.loads(config.read_bytes()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return named if isinstance(named, str) and named else None


def _commit(location: str) -> str:
    from vhead.checkpoints.checkpoint import Checkpoint  # imports torch

    checkpoint = Checkpoint(location)
    path = checkpoint.path("config.json") or checkpoint.path(ADAPTER_CONFIG)
    # Files of the hub's cache lie in a folder that is called by their commit.
    return location if path is None else f"{location} at {path.parent.name}"
