"""Converting a whole checkpoint: the head, the names of the language model's tensors, and the configuration.

Tensors pass one at a time and are not changed. The result is written beside its place and then put there.
"""

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vhead.checkpoint import Checkpoint
from vhead.errors import HeadError, HeadFileError, HeadMismatchError
from vhead.formats.architecture import Architecture
from vhead.formats.layout import Format, Sighting, read
from vhead.formats.registry import body_names, body_prefix, chosen, detection_of, format_named
from vhead.formats.streaming import Entry, write_safetensors
from vhead.formats.trl import LLAMA_FACTORY_FILES, TRL, VHEAD
from vhead.formats.weights import Detection, HeadWeights
from vhead.formats.writing import head_tensors, is_head_file, save, write_tensors

ADAPTER_CONFIG = "adapter_config.json"
TRL_ADAPTER_FILE = "pytorch_model.bin"

# Beside the weights, what a tokenizer, a processor, generation or a model's own code needs; no optimizer states.
_CARRIED = frozenset({".bpe", ".jinja", ".json", ".model", ".py", ".spm", ".tiktoken", ".txt", ".vocab"})
_NOT_CARRIED = re.compile(r"config\.json|trainer_state\.json|.*\.index(\..+)?\.json")
_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)|.*\.index\.json|value_head\.(.+)")

# What formats keep about their heads in a configuration; a head of another format has none of it.
_HEAD_SETTINGS = (
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "score_bias",
    "score_dim",
    "score_type",
    "do_normalize",
    "token_classification_bias",
    "value_head_prefix",
)


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        detection: What was found.
        format: What was written.
        path: Where.
        files: The names of the files written.
        notes: What a user must know: what was left out, and what is missing.
    """

    detection: Detection
    format: str
    path: Path
    files: tuple[str, ...]
    notes: tuple[str, ...]


def convert(
    source: str | Path,
    destination: str | Path,
    format: str | None = None,  # noqa: A002, as in `save`
    *,
    source_format: str | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Writes a checkpoint's head in another format: to a file of its own, or with its language model to a folder.

    In a folder, the language model's tensors get the names that transformers expects in that format, the configuration
    names the class, and tokenizer and generation files are copied. Weights are float32 for the head, and as they were
    for the language model. A folder with an adapter stays one.

    Args:
        source: A folder or a file on this machine.
        destination: A folder; or a file, `.safetensors`, `.bin`, `.pt` or `.pth`, for the head alone.
        format: The name of the format to write. None: TRL's, or where it cannot hold the head, this package's own.
        source_format: The name of the format to read. None: the one that the checkpoint shows signs of.
        overwrite: Whether existing files are replaced.

    Raises:
        FileNotFoundError: There is no such source on this machine.
        FileExistsError: The destination exists and is not to be replaced.
        HeadError: The format cannot hold the head, or the language model with it, or there is no head.
        HeadFileError: A file is truncated, malformed or hostile.
    """
    source, destination = Path(source), Path(destination)
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder; download a checkpoint before converting it")
    checkpoint = Checkpoint(source)
    head_format, sighting = chosen(checkpoint, source_format)
    head, detection = read(checkpoint, sighting, head_format), detection_of(checkpoint, head_format, sighting)
    target = _default_target(head) if format is None else format_named(format)
    if is_head_file(destination):
        file = save(head, destination, target.name, overwrite=overwrite)
        return Conversion(detection, target.name, file, (file.name,), ())
    _check_destination(source, destination, overwrite=overwrite)
    unfinished = destination.absolute().with_name(f".{destination.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        if (source / ADAPTER_CONFIG).is_file():
            notes = _write_adapter(source, unfinished, head, target)
        else:
            notes = _Rewriting(checkpoint, head_format, sighting, head, target).write(unfinished)
        files = tuple(sorted(path.name for path in unfinished.iterdir()))
        _put(unfinished, destination)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return Conversion(detection, target.name, destination, files, notes)


def _default_target(head: HeadWeights) -> Format:
    return TRL if len(head.layers) == head.num_outputs == 1 else VHEAD


def _check_destination(source: Path, destination: Path, *, overwrite: bool) -> None:
    if source.is_file():
        raise HeadError(f"{destination}: {source} is one file, whose head goes to one file (.safetensors, .bin, .pt)")
    if destination.exists() and not destination.is_dir():
        raise FileExistsError(f"{destination}: expected a folder, found a file")
    if destination.exists() and destination.samefile(source):
        raise HeadError(f"{destination}: expected another folder than the one that is read")
    if destination.is_dir() and any(destination.iterdir()) and not overwrite:
        raise FileExistsError(f"{destination}: the folder is not empty; --force (overwrite=True) replaces its files")


def _put(unfinished: Path, destination: Path) -> None:
    """Puts a finished folder in its place, or its files into a folder that is there, whose old weights go."""
    if not destination.exists():
        unfinished.rename(destination)
        return
    new = {path.name for path in unfinished.iterdir()}
    for path in list(destination.iterdir()):
        if path.name not in new and _WEIGHTS.fullmatch(path.name):
            path.unlink()
    for path in list(unfinished.iterdir()):
        if path.is_dir():
            shutil.rmtree(destination / path.name, ignore_errors=True)
        path.replace(destination / path.name)


def _write_adapter(source: Path, folder: Path, head: HeadWeights, target: Format) -> tuple[str, ...]:
    """Copies an adapter and writes the head beside it, where the format's framework looks for it."""
    files = {"trl": TRL_ADAPTER_FILE, "llama-factory": LLAMA_FACTORY_FILES[0], "vhead": LLAMA_FACTORY_FILES[0]}
    if target.name not in files:
        raise HeadError(f"{source}: beside an adapter, a head is written as {', '.join(files)}, not as {target.name}")
    for path in source.iterdir():
        if path.is_file() and path.name not in (TRL_ADAPTER_FILE, *LLAMA_FACTORY_FILES):
            shutil.copyfile(path, folder / path.name)
    write_tensors(head_tensors(head, target), folder / files[target.name])
    return ()


@dataclass(frozen=True)
class _Rewriting:
    """A checkpoint on its way into another format."""

    checkpoint: Checkpoint
    head_format: Format
    sighting: Sighting
    head: HeadWeights
    target: Format

    def write(self, folder: Path) -> tuple[str, ...]:
        """Writes all files and returns what a user must know."""
        if self.target.body is None:
            raise HeadError(
                f"{self.target.name} can be written for a head, not for a language model: name a file (.safetensors)"
            )
        sources = body_names(self.checkpoint, self.head_format, self.sighting)
        if not sources:
            raise HeadError(f"{self.checkpoint.location}: holds a head and no language model: name a file to write")
        architecture = Architecture(self._config(), self.checkpoint.location)
        names = self._target_names(sources, architecture)
        layers = architecture.head_layers(self.target, self.head)
        tensors = head_tensors(self.head, self.target, layers)
        self._write_weights(folder, names, [Entry.of(name, tensor) for name, tensor in tensors.items()])
        config = json.dumps(self._new_config(architecture), indent=2, ensure_ascii=False)
        (folder / "config.json").write_text(f"{config}\n", encoding="utf-8")
        for path in _carried(Path(self.checkpoint.location)):
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, folder / path.name)
        return tuple(self._notes(architecture, names))

    def _config(self) -> dict[str, Any]:
        if not self.checkpoint.config:
            raise HeadFileError(f"{self.checkpoint.location}: expected a config.json beside the language model")
        return self.checkpoint.config

    def _target_names(self, sources: Sequence[str], architecture: Architecture) -> dict[str, str]:
        """The new name of each of the language model's tensors that is kept."""
        adapter = next((name for name in sources if ".lora_" in name or ".base_layer." in name), None)
        if adapter is not None:
            raise HeadMismatchError(
                f"{self.checkpoint.location}: {adapter} is an adapter's: merge it into the model before converting"
            )
        prefix = body_prefix(sources)
        names = {name: name.removeprefix(prefix) for name in sources}
        if not any(architecture.is_base(name) for name in names.values()):
            names = {name: f"{architecture.base_prefix}{stripped}" for name, stripped in names.items()}
        if self.target.body is not None and self.target.body.base_only:
            names = {name: new for name, new in names.items() if architecture.is_base(new)}
        return names

    def _write_weights(self, folder: Path, names: dict[str, str], head: Sequence[Entry]) -> None:
        body = self.target.body
        shards = [*_shards(self.checkpoint, names)]
        if body is not None and body.head_file is not None:
            write_safetensors(head, folder / body.head_file)
        else:
            shards[-1] += head
        width = len(shards)
        files = (
            ["model.safetensors"]
            if width == 1
            else [f"model-{i + 1:05}-of-{width:05}.safetensors" for i in range(width)]
        )
        for file, entries in zip(files, shards, strict=True):
            write_safetensors(entries, folder / file)
        if width > 1:
            size = sum(entry.nbytes for entries in shards for entry in entries)
            places = {entry.name: file for file, entries in zip(files, shards, strict=True) for entry in entries}
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
            text = json.dumps(index, indent=2, ensure_ascii=False)
            (folder / "model.safetensors.index.json").write_text(f"{text}\n", encoding="utf-8")

    def _new_config(self, architecture: Architecture) -> dict[str, Any]:
        config = {name: value for name, value in self._config().items() if name not in _HEAD_SETTINGS}
        if self.head.std is not None:
            config.pop("var", None)
            config |= {"mean": self.head.mean or 0.0, "std": self.head.std}
        body = self.target.body
        if body is None:
            return config
        return {**config, "architectures": [architecture.class_name(body.architecture)], **body.configure(self.head)}

    def _notes(self, architecture: Architecture, names: dict[str, str]) -> Iterator[str]:
        kept = {*names, *self.sighting.found}
        left_out = sorted(name for name in self.checkpoint.weight_map if name not in kept)
        if left_out:
            more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
            yield f"left out, since {self.target.name} has no place for it: {', '.join(left_out[:3])}{more}"
        is_whole = self.target.body is not None and not self.target.body.base_only
        if is_whole and not architecture.ties_embeddings and all(architecture.is_base(new) for new in names.values()):
            yield "the checkpoint has no language-model head: values can be computed, log-probabilities cannot"


def _shards(checkpoint: Checkpoint, names: dict[str, str]) -> Iterator[list[Entry]]:
    """The tensors to write, file by file as the checkpoint has them."""
    files: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        files[checkpoint.weight_map[name]].append(name)
    for file, members in files.items():
        yield [
            Entry(names[name], checkpoint.info(name, file), partial(checkpoint.read, name, file)) for name in members
        ]


def _carried(source: Path) -> Iterator[Path]:
    for path in source.iterdir():
        if path.is_dir() and path.name == "additional_chat_templates":
            yield path
        if path.is_file() and path.suffix in _CARRIED and not _NOT_CARRIED.fullmatch(path.name):
            yield path
