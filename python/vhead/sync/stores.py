"""Publications in a store that fsspec reaches, such as a bucket, by way of a folder on a disk of this machine."""

import json
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vhead.errors import PublicationError, PublicationMissingError, PublisherConflictError, SyncError, SyncFileError

_LATEST, _MANIFEST = "LATEST", "manifest.json"
_STEP = re.compile(r"step-[0-9]{8,}")
_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")
_LONGEST_LATEST = 256


def opened(directory: str | Path, staging: Path) -> "tuple[Path, Store | None]":
    """The folder that publications are in or pass through, and the store where the address is one of fsspec's.

    `file://` is the folder that it names.

    Raises:
        SyncError: fsspec has no such store, or a package for it is missing.
    """
    if "://" not in str(directory):
        return Path(directory), None
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    try:
        files, root = url_to_fs(str(directory))
    except (ImportError, ValueError) as error:
        raise SyncError(f"{directory}: cannot be reached: {error}") from error
    if isinstance(files, LocalFileSystem):
        return Path(root), None
    store = Store(files, root, str(directory), staging)
    return store.folder, store


def _removed(folder: Path, process: int) -> None:
    # A process that was forked has a copy of the object, and no folder of its own.
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


class Store:
    """A store, and the folder in which this process has what it needs of it.

    A publication is written object by object, its manifest last, and counts once `LATEST` names it. All that this needs
    of the store is that an object is replaced in one step, as buckets do it; nothing is renamed. There are no locks:
    two publishers notice each other by `LATEST` alone, which each reads before it writes it.

    Args:
        files: fsspec's file system.
        root: The directory in it.
        url: Its address, for messages.
        staging: Where the folder is made; it is removed with this object.
    """

    def __init__(self, files: Any, root: str, url: str, staging: Path) -> None:
        self._files, self._root, self._url = files, root.rstrip("/"), url
        self.folder = Path(tempfile.mkdtemp(dir=staging, prefix="vhead-sync-"))
        weakref.finalize(self, _removed, self.folder, os.getpid())
        self._last: bytes | None = None

    def latest(self) -> bytes | None:
        """What `LATEST` says; None where nothing has been published."""
        with suppress(PublicationMissingError), self._named(_LATEST):
            found: bytes = self._files.cat_file(self._path(_LATEST), end=_LONGEST_LATEST)
            return found
        return None

    def bring(self, step: int | None, have: tuple[int, str] | None) -> None:
        """Brings the newest publication into the folder, or that of a step, and what it is changes to.

        Changes to the step that a follower has are brought alone.
        """
        latest = self.latest()
        if latest is None and step is None:
            return
        name = f"step-{step:08d}" if step is not None else (latest or b"").decode(errors="replace").split(" ")[0]
        needed: list[str] = []
        while name not in needed:
            base = self._bring_one(name)
            needed.append(name)
            if base is None or (have is not None and base == have[0]):
                break
            name = f"step-{base:08d}"
        for other in self._steps_here() - set(needed):
            shutil.rmtree(self.folder / other)
        if latest is not None:
            (self.folder / _LATEST).write_bytes(latest)

    def _bring_one(self, name: str) -> int | None:
        """Brings a publication's files, which whoever reads them verifies; gives the step that it changes."""
        if not _STEP.fullmatch(name):
            raise PublicationError(f"{self._url}: LATEST: expected the name of a publication, got {name!r}")
        manifest = self._manifest(name)
        for file, entry in manifest["files"].items():
            place = self.folder / name / file
            if not _PLAIN.fullmatch(file):
                raise PublicationError(f"{self._url}/{name}: expected plain names of files, got {file!r}")
            if place.exists() and place.stat().st_size == entry["bytes"]:
                continue
            with self._named(f"{name}/{file}") as path:
                size = self._files.size(path)
                if size != entry["bytes"]:
                    raise PublicationError(f"{self._url}/{name}/{file}: expected {entry['bytes']} bytes, got {size}")
                self._files.get_file(path, str(place))
        base = manifest["base"]
        return None if base is None else int(base["step"])

    def _manifest(self, name: str) -> Any:
        place = self.folder / name / _MANIFEST
        place.parent.mkdir(exist_ok=True)
        with self._named(f"{name}/{_MANIFEST}") as path:
            self._files.get_file(path, str(place))
        try:
            manifest = json.loads(place.read_bytes())
            for entry in manifest["files"].values():
                int(entry["bytes"])
            int((manifest["base"] or {"step": 0})["step"])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise PublicationError(f"{self._url}/{name}/{_MANIFEST}: expected a manifest, got {error!r}") from error
        return manifest

    def resume(self) -> None:
        """Brings what a publisher has to know to go on after what is there: `LATEST` and the manifests."""
        self._last = self.latest()
        for name in self._steps() if self._last is not None else ():
            self._manifest(name)
        if self._last is not None:
            (self.folder / _LATEST).write_bytes(self._last)

    def send(self) -> None:
        """Sends the publications that are in the folder and not yet in the store, and removes those that are gone here.

        Raises:
            PublisherConflictError: Another publisher has published since.
            SyncFileError: The store refuses; readers then see what they saw before, and the next call tries again.
        """
        self._check_alone()
        here, there = self._steps_here(), self._steps()
        for name in sorted(here):
            files = sorted(self.folder.joinpath(name).iterdir(), key=lambda path: path.name == _MANIFEST)
            for file in files if name not in there or len(files) > 1 else ():
                with self._named(f"{name}/{file.name}") as path:
                    self._files.put_file(str(file), path)
            for file in files[:-1]:
                file.unlink()
        self._check_alone()
        latest = (self.folder / _LATEST).read_bytes()
        with self._named(_LATEST) as path:
            self._files.pipe_file(path, latest)
        self._last = latest
        for name in sorted(there - here, reverse=True):
            with self._named(name) as path:
                self._files.rm(path, recursive=True)

    def _check_alone(self) -> None:
        found = self.latest()
        if found != self._last:
            said = (found or b"nothing").decode(errors="replace").split(" ")[0]
            raise PublisherConflictError(
                f"{self._url}: another publisher has published {said}; only one may publish here, so this one has "
                "stopped"
            )

    def _steps_here(self) -> set[str]:
        return {path.name for path in self.folder.iterdir() if _STEP.fullmatch(path.name)}

    def _steps(self) -> set[str]:
        with suppress(PublicationMissingError), self._named("") as path:
            self._files.invalidate_cache()
            names = (entry.rstrip("/").rsplit("/", 1)[-1] for entry in self._files.ls(path.rstrip("/"), detail=False))
            return {name for name in names if _STEP.fullmatch(name)}
        return set()

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _named(self, name: str) -> Iterator[str]:
        """The path of something in the store; errors say which."""
        try:
            yield self._path(name)
        except FileNotFoundError as error:
            raise PublicationMissingError(
                f"{self._url}/{name}: is not there, or was removed while it was read"
            ) from error
        except OSError as error:
            raise SyncFileError(f"{self._url}/{name}: {error}") from error
