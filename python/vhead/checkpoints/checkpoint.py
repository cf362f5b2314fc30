"""The tensors of a checkpoint, in a local folder or on the hub, each read only when it is asked for.

Names come from the safetensors header or the shard index, so that finding two tensors costs two tensors, never the
whole checkpoint. Files are untrusted: whatever is wrong with one is a `HeadFileError` that names it. `quiet_about`
keeps transformers from reporting the same tensors as unexpected when it reads the files in its turn.
"""

import json
import logging
import os
import re
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict, Unpack

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch import Tensor

from vhead.checkpoints import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from vhead.checkpoints.tensor_files import TensorFile, TensorInfo, open_tensors, unpickles_safely
from vhead.errors import HeadFileError, LoadError

_SHARD_NAME = re.compile(r"[^/\\\0]+\.(?:safetensors|bin)")

# An adapter's files, as peft names them.
_ADAPTER_HEAD_FILE = "value_head.safetensors"
_CONFIG_FILES = ("config.json", ADAPTER_CONFIG)

# The files beside the weights that a tokenizer, a processor, generation or a model's own code needs.
SIDE_FILES = frozenset({".bpe", ".jinja", ".json", ".model", ".py", ".spm", ".tiktoken", ".txt", ".vocab"})
_WEIGHT_FILES = frozenset({".safetensors", ".bin"})

# Ten times what the longest index and the longest configuration of today take.
_LONGEST_JSON = 100_000_000

_LOADING_LOGGER = "transformers.modeling_utils"
_TABLE_STATUS = re.compile(r"\b(?:UNEXPECTED|MISSING|MISMATCH|CONVERSION)\b")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


class LocationArguments(TypedDict, total=False):
    """The arguments of `from_pretrained` that say where files are, and therefore hold for the head's as well."""

    cache_dir: str | None
    force_download: bool | None
    local_files_only: bool | None
    revision: str | None
    subfolder: str | None
    token: str | bool | None
    use_safetensors: bool | None
    variant: str | None


class Checkpoint:
    """Where a checkpoint's files are and which tensor is in which of them.

    Args:
        location: A folder, one file of tensors, or a hub repository's id. What exists is never looked up on the hub.
        **arguments: Where and which files to look for; None means the hub's default. `use_safetensors` None looks for
            safetensors first, `variant` is the one in names like `model.fp16.safetensors`.
    """

    def __init__(
        self,
        location: str | Path,
        **arguments: Unpack[LocationArguments],
    ) -> None:
        self.location = str(location)
        self._variant = arguments.pop("variant", None)
        self._use_safetensors = arguments.pop("use_safetensors", None)
        self._subfolder = arguments.pop("subfolder", None) or ""
        self._hub_arguments: dict[str, Any] = {name: value for name, value in arguments.items() if value is not None}
        self._opened: dict[Path, TensorFile] = {}
        self._absence: str | None = None

    @property
    def is_file(self) -> bool:
        """Whether the checkpoint is one file, not a folder or a repository of them."""
        return Path(self.location).is_file()

    @property
    def is_local(self) -> bool:
        """Whether the checkpoint exists on this machine, so that the hub is never asked."""
        return Path(self.location).exists()

    @cached_property
    def weight_map(self) -> dict[str, str]:
        """The name of each of the model's tensors and the file that holds it; empty where there are no weights.

        In a folder with an adapter and no model, these are the adapter's: a classifier's adapter holds its head.
        """
        if self.is_file:
            return self.names_in(Path(self.location).name)
        for name, index_name in self._weight_files():
            if self.path(name) is not None and not self._is_pickled_copy(name):
                return self.names_in(name)
            index = self.path(index_name)
            if index is not None:
                return _read_index(index)
        adapter = next((name for name in ADAPTER_WEIGHTS if self.path(name) is not None), None)
        return {} if adapter is None else self.names_in(adapter)

    def path(self, name: str) -> Path | None:
        """The local path of one of the checkpoint's files, downloaded if need be, or None if there is no such file."""
        root = Path(self.location)
        if root.is_file():
            return root if root.name == name else None
        if root.is_dir():
            return regular_file(root, str(PurePosixPath(self._subfolder, name)))
        if root.exists():
            raise HeadFileError(f"{root}: expected a folder or a file with a checkpoint, found a pipe or a device")
        return None if self._absence is not None else self._download(name)

    def _download(self, name: str) -> Path | None:
        """One of a repository's files; a hub that does not have the repository, or does not answer, is asked once."""
        try:
            return Path(hf_hub_download(self.location, name, subfolder=self._subfolder or None, **self._hub_arguments))
        except HFValidationError:
            self._absence = "there is no such folder"
        except RevisionNotFoundError:
            self._absence = f"the hub's repository has no revision {self._hub_arguments.get('revision')!r}"
        except RepositoryNotFoundError:
            self._absence = "there is no such folder, and the hub has no repository of that name that you may read"
        except LocalEntryNotFoundError:
            # Either the hub does not answer, or it must not be asked. What its cache has is found without it.
            self._hub_arguments["local_files_only"] = True
        except EntryNotFoundError:
            pass
        return None

    def require(self) -> None:
        """Checks that there is a model or an adapter, before other packages look for each of its files in turn.

        Raises:
            LoadError: There is none.
            HeadFileError: The location is a pipe or a device.
        """
        if any(self.path(name) is not None for name in _CONFIG_FILES):
            return
        reason = f"found neither {' nor '.join(_CONFIG_FILES)}"
        if self._absence is not None:
            reason = self._absence
        elif not self.is_local and self._hub_arguments.get("local_files_only"):
            reason = (
                "there is no such folder, the hub's cache has nothing of that name, and the hub cannot be reached or "
                "may not be asked (HF_HUB_OFFLINE, local_files_only)"
            )
        raise LoadError(f"{self.location}: expected the folder of a model or a repository on the hub, but {reason}")

    def check(self) -> None:
        """Refuses what no loader may open, before other packages open the checkpoint's files by their names.

        Raises:
            HeadFileError: A file is none of the checkpoint's, is something else than its name says, or is longer than
                any model's.
        """
        for name in self._local_names():
            path = regular_file(Path(self.location), name)
            if path is not None and path.suffix == ".json" and path.stat().st_size > _LONGEST_JSON:
                raise HeadFileError(f"{path}: expected at most {_LONGEST_JSON:,} bytes, got {path.stat().st_size:,}")
        adapter = [name for name in ADAPTER_WEIGHTS if self.path(name) is not None]
        for name in {*self.weight_map.values(), *adapter}:
            # Of a repository, transformers downloads the weights; pickled ones are looked at before it opens them.
            if self.is_local or name.endswith(".bin"):
                self._open(name).check()

    def _local_names(self) -> Iterator[str]:
        """The files of a folder that a model, a tokenizer or an adapter may be loaded from."""
        folder = Path(self.location, self._subfolder)
        for parent in (folder, folder / "additional_chat_templates"):
            for path in parent.iterdir() if parent.is_dir() else ():
                is_read = path.suffix in SIDE_FILES | _WEIGHT_FILES
                if parent is not folder or (is_read and not path.is_dir()):
                    yield str(path.relative_to(self.location))

    def held_bytes(self) -> int | None:
        """Bytes in the model's files of weights; None where they are not all on this machine."""
        here = Checkpoint(
            self.location,
            **{**self._hub_arguments, "subfolder": self._subfolder, "force_download": None, "local_files_only": True},
        )
        paths = [here.path(name) for name in set(self.weight_map.values())]
        sizes = [path.stat().st_size for path in paths if path is not None]
        return sum(sizes) if sizes and len(sizes) == len(paths) else None

    def _is_pickled_copy(self, name: str) -> bool:
        """Whether a file beside an adapter is its head for TRL, which cannot be read here, and safetensors hold it."""
        is_unreadable = name.endswith(".bin") and not unpickles_safely()
        return is_unreadable and all(self.path(file) is not None for file in (ADAPTER_CONFIG, _ADAPTER_HEAD_FILE))

    def names_in(self, name: str) -> dict[str, str]:
        """The tensors of one file, as `weight_map` lists them."""
        return dict.fromkeys(self._open(name).tensors, name)

    def shape(self, tensor: str, file_name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the file's header."""
        return self.info(tensor, file_name).shape

    def info(self, tensor: str, file_name: str) -> TensorInfo:
        """Shape and dtype of a tensor, from the file's header."""
        tensors = self._open(file_name).tensors
        if tensor not in tensors:
            raise HeadFileError(f"{self.describe(file_name)}: the index places {tensor} here, but it is missing")
        return tensors[tensor]

    def metadata(self, file_name: str) -> Mapping[str, str]:
        """What a file of tensors says beside them."""
        return self._open(file_name).metadata

    @cached_property
    def config(self) -> dict[str, Any]:
        """What `config.json` says, or nothing where there is none.

        Raises:
            HeadFileError: It is not a JSON object.
        """
        return self.json_object("config.json")

    def json_object(self, name: str) -> dict[str, Any]:
        """What a JSON file of the checkpoint says, or nothing where there is none.

        Raises:
            HeadFileError: It is not a JSON object.
        """
        path = None if self.is_file else self.path(name)
        if path is None:
            return {}
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise HeadFileError(f"{path}: expected a JSON object, got: {error!r}") from error
        if not isinstance(content, dict):
            raise HeadFileError(f"{path}: expected a JSON object, got a {type(content).__name__}")
        return content

    def read(self, tensor: str, file_name: str) -> Tensor:
        """Reads one tensor."""
        self.info(tensor, file_name)
        return self._open(file_name).read(tensor)

    def describe(self, file_name: str) -> str:
        """The place of a file, for messages: below the folder or the repository."""
        root = Path(self.location)
        return str(root) if root.is_file() else str(PurePosixPath(self.location, self._subfolder, file_name))

    def _weight_files(self) -> Iterable[tuple[str, str]]:
        kinds = (("model", "safetensors", True), ("pytorch_model", "bin", False))
        variant = f".{self._variant}" if self._variant else ""
        for stem, extension, is_safetensors in kinds:
            if self._use_safetensors in (None, is_safetensors):
                yield f"{stem}{variant}.{extension}", f"{stem}.{extension}.index{variant}.json"

    def _open(self, name: str) -> TensorFile:
        path = self.path(name)
        if path is None:
            raise HeadFileError(f"{self.describe(name)}: the index names this file, but it is missing")
        if path not in self._opened:
            self._opened[path] = open_tensors(path, name)
        return self._opened[path]


def regular_file(folder: Path, name: str) -> Path | None:
    """The path of a checkpoint's file, or None where there is none of that name.

    A checkpoint's files are regular ones. A link stays inside the checkpoint, or leads from a snapshot of the hub's
    cache to the contents that the cache keeps beside its snapshots: through any other one, a folder that somebody has
    unpacked would show files of whoever reads it.

    Args:
        folder: The checkpoint's folder.
        name: The file's name in it, which may lead through folders.

    Raises:
        HeadFileError: There is something of that name which is no regular file, or a link that leads nowhere or out of
            the checkpoint.
    """
    path = folder / name
    if not os.path.lexists(path):
        return None
    try:
        target, root = path.resolve(strict=True), folder.resolve()
        kind = target.stat().st_mode
    except (OSError, RuntimeError) as error:
        raise HeadFileError(f"{path}: expected a file of the checkpoint, found a link that leads nowhere") from error
    if not (target.is_relative_to(root) or _is_cached_content(root, target)):
        raise HeadFileError(
            f"{path}: expected a file of the checkpoint, found a link to {target}, which is outside of it; "
            "if that file belongs to the checkpoint, put a copy of it here"
        )
    if not stat.S_ISREG(kind):
        found = "a folder" if stat.S_ISDIR(kind) else "a pipe or a device"
        raise HeadFileError(f"{path}: expected a file of the checkpoint, found {found}")
    return path


def _is_cached_content(root: Path, target: Path) -> bool:
    """Whether a file is the content behind a link in the hub's cache, where snapshots link to `blobs` beside them."""
    return any(
        parent.name == "snapshots" and target.parent == parent.parent / "blobs" for parent in (root, *root.parents)
    )


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        entries = {str(name): str(file_name) for name, file_name in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise HeadFileError(f'{path}: expected an index with a "weight_map", got: {error!r}') from error
    for file_name in set(entries.values()):
        if not _SHARD_NAME.fullmatch(file_name):
            raise HeadFileError(f"{path}: expected the names of shards beside the index, got {file_name!r}")
    return entries


@contextmanager
def quiet_about(*modules: str) -> Iterator[None]:
    """Drops this thread's load reports that are about tensors of these modules and about nothing else.

    A filter on transformers' own logger does it, for as long as the block runs. A report that has any other row is
    shown in full.
    """
    report_filter = _ReportFilter(frozenset(modules))
    logger = logging.getLogger(_LOADING_LOGGER)
    logger.addFilter(report_filter)
    try:
        yield
    finally:
        logger.removeFilter(report_filter)


class _ReportFilter(logging.Filter):
    def __init__(self, modules: frozenset[str]) -> None:
        super().__init__()
        self._modules = modules
        self._thread = threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.thread != self._thread:
            return True
        subjects = _reported_tensors(_ANSI.sub("", record.getMessage()))
        return not subjects or any(self._modules.isdisjoint(re.split(r"[.{]", name)) for name in subjects)


def _reported_tensors(message: str) -> list[str]:
    """The tensors that a load report is about: the rows of transformers 5's table or the list of transformers 4."""
    if "LOAD REPORT" in message:
        rows = (line for line in message.splitlines() if "|" in line and _TABLE_STATUS.search(line.partition("|")[2]))
        return [row.partition("|")[0].strip() for row in rows]
    if message.startswith("Some weights of the model checkpoint") and "were not used" in message:
        return re.findall(r"'([^']+)'", message.partition("[")[2].partition("]")[0])
    return []
