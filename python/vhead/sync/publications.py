"""What a directory of publications holds, without a model and without torch."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from vhead import _native
from vhead.errors import PublicationError, SyncFileError

Summary = tuple[int, bool, int | None, list[str], str, str, int]

# Publications that stay, beside those that they are changes to.
KEPT = 8


@dataclass(frozen=True)
class Publication:
    """What a publication says of itself.

    Attributes:
        step: Its step.
        is_full: Whether it holds all weights; else what has changed since `base_step`.
        base_step: The step that it changes, or None.
        parts: Which parts of a model it holds: `model`, or `head` and `adapter`.
        metadata: What the publisher said beside the weights.
        digest: BLAKE3 of all tensors' names, dtypes, shapes and digests.
        nbytes: Bytes of its files.
    """

    step: int
    is_full: bool
    base_step: int | None
    parts: tuple[str, ...]
    metadata: dict[str, Any]
    digest: str
    nbytes: int

    @classmethod
    def of(cls, summary: Summary) -> Self:
        """The publication that the extension describes."""
        step, is_full, base_step, parts, metadata, digest, nbytes = summary
        return cls(step, is_full, base_step, tuple(parts), json.loads(metadata), digest, nbytes)


@dataclass(frozen=True)
class Entry:
    """A publication's place in a directory.

    Attributes:
        step: The step of its folder.
        publication: What it says of itself, or None where that cannot be read.
        problem: What is wrong then; empty otherwise.
        is_latest: Whether `LATEST` names it.
    """

    step: int
    publication: Publication | None
    problem: str
    is_latest: bool


def publications(directory: str | Path) -> list[Entry]:
    """The publications of a directory, by rising step; of each, only the manifest is read.

    Raises:
        SyncError: The directory is not there, or its `LATEST` is damaged.
    """
    return [
        Entry(step, None if summary is None else Publication.of(summary), problem, is_latest)
        for step, summary, problem, is_latest in _native.sync_list(Path(directory))
    ]


def verify(directory: str | Path, step: int | None = None, *, staging: str | Path | None = None) -> Publication:
    """Reads a publication and all that it is changes to, and verifies every byte; nothing is installed.

    Args:
        directory: The directory.
        step: Which one; None: what `LATEST` names.
        staging: A folder for a copy without a name, as long as the weights, of changes to another step; None: the
            system's for temporary files.

    Raises:
        PublicationError: It is damaged, or a step that it needs is.
        SyncError: It is not there, or cannot be read.
    """
    stage = _native.SyncStage.open(Path(directory), step, None, staging_folder(staging), in_place=True)
    if stage is None:
        raise PublicationError(f"{directory}: expected a publication, found none")
    while stage.next is not None:
        stage.verify_next(None)
    return Publication.of(stage.summary)


def collect(directory: str | Path, *, keep: int = KEPT) -> tuple[list[int], list[str]]:
    """Removes publications that nobody needs, and what killed publishers have left.

    Args:
        directory: The directory.
        keep: How many of the last publications stay, beside those that they are changes to.

    Returns:
        The steps of the publications that were removed, and the other names.

    Raises:
        PublisherConflictError: Somebody publishes in the directory at this moment.
        SyncError: The directory cannot be read or written.
    """
    return _native.sync_collect(Path(directory), keep)


def staging_folder(given: str | Path | None) -> Path:
    """Where copies without names lie."""
    return Path(tempfile.gettempdir() if given is None else given)


def made_folder(place: Path) -> Path:
    """The folder, which is made if need be.

    Raises:
        SyncFileError: It cannot be made.
    """
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SyncFileError(error.errno, error.strerror, str(place)) from error
    return place
