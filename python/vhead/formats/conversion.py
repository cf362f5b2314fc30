"""Converting a whole checkpoint: the head, the names of the language model's tensors, and the configuration.

Tensors pass one at a time and are not changed. The result is written beside its place, is read back, and then takes its
place in one step.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vhead.checkpoints import ADAPTER_CONFIG
from vhead.checkpoints.checkpoint import Checkpoint
from vhead.checkpoints.config_bounds import bounded_by, check_config
from vhead.checkpoints.replacing import replacing_folder
from vhead.errors import HeadError, HeadFileError, HeadMismatchError, loading
from vhead.formats.adapter_conversion import write_adapter
from vhead.formats.architecture import Architecture
from vhead.formats.carrying import carried, copy_files, keep_others
from vhead.formats.head_settings import ACTIVATION, SUPPORT
from vhead.formats.layout import Detection, Format, Sighting, read
from vhead.formats.registry import body_names, body_prefix, chosen, detection_of, format_named, load, same_weights
from vhead.formats.streaming import Entry, write_safetensors
from vhead.formats.trl import TRL, VHEAD
from vhead.formats.writing import head_tensors, is_head_file, save
from vhead.head_weights import HeadWeights

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
    SUPPORT,
    ACTIVATION,
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
    format: str | None = None,
    *,
    source_format: str | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Writes a checkpoint's head in another format: to a file of its own, or with its language model to a folder.

    In a folder, the language model's tensors get the names that transformers expects in that format, the configuration
    names the class, and tokenizer and generation files are copied. Weights are float32 for the head, and as they were
    for the language model. A folder with an adapter stays one, a classifier's adapter becomes a language model's. What
    was written is read back before it takes its place, in which the old model or the new one is whole at every moment.

    Args:
        source: A folder or a file on this machine.
        destination: A folder; or a file, `.safetensors`, `.bin`, `.pt` or `.pth`, for the head alone.
        format: The name of the format to write. None: TRL's, or where it cannot hold the head, this package's own.
        source_format: The name of the format to read. None: the one that the checkpoint shows signs of.
        overwrite: Whether existing files are replaced. Of a folder, files stay that belong to no checkpoint.

    Raises:
        FileNotFoundError: There is no such source on this machine.
        FileExistsError: The destination exists and is not to be replaced.
        BodyMismatchError: The language model's tensors are not those of the model that the configuration names.
        LoadError: The configuration is no model's.
        OSError: A file cannot be read or written, or the file system cannot swap two folders in one step.
        HeadError: The format cannot hold the head, or the language model with it, or there is no head.
        HeadFileError: A file is truncated, malformed or hostile.
    """
    source, destination = Path(source), Path(destination)
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder; download a checkpoint before converting it")
    checkpoint = Checkpoint(source)
    checkpoint.check()
    head_format, sighting = chosen(checkpoint, source_format)
    head, detection = read(checkpoint, sighting, head_format), detection_of(checkpoint, head_format, sighting)
    target = _default_target(head) if format is None else format_named(format)
    if is_head_file(destination):
        file = save(head, destination, target.name, overwrite=overwrite)
        return Conversion(detection, target.name, file, (file.name,), ())
    _check_destination(source, destination, overwrite=overwrite)
    with replacing_folder(destination, overwrite=overwrite) as folder:
        if (source / ADAPTER_CONFIG).is_file():
            notes = write_adapter(checkpoint, folder, sighting, head, target)
        else:
            notes = _Rewriting(checkpoint, head_format, sighting, head, target).write(folder)
        files = tuple(sorted(path.name for path in folder.iterdir()))
        notes = (*notes, *_check_head(folder, head, destination))
        keep_others(destination, folder)
    return Conversion(detection, target.name, destination, files, notes)


def _default_target(head: HeadWeights) -> Format:
    return TRL if len(head.layers) == head.num_outputs == 1 and head.support is None else VHEAD


def _check_destination(source: Path, destination: Path, *, overwrite: bool) -> None:
    if source.is_file():
        raise HeadError(f"{destination}: {source} is one file, whose head goes to one file (.safetensors, .bin, .pt)")
    if destination.exists() and not destination.is_dir():
        raise FileExistsError(f"{destination}: expected a folder, found a file")
    if destination.exists() and destination.samefile(source):
        raise HeadError(f"{destination}: expected another folder than the one that is read")
    place = destination.resolve()
    if place.is_mount():
        raise HeadError(
            f"{destination}: a file system is mounted here, and a mount point cannot be replaced; name a folder in it"
        )
    if place in (Path.cwd(), *Path.cwd().parents):
        raise HeadError(
            f"{destination}: this is the current folder or one around it, which cannot be replaced while you are in "
            "it; change to another folder first"
        )
    if destination.is_dir() and any(destination.iterdir()) and not overwrite:
        raise FileExistsError(f"{destination}: the folder is not empty; --force (overwrite=True) replaces its files")


def _check_head(folder: Path, head: HeadWeights, destination: Path) -> Iterator[str]:
    """Reads the head back from what was written, and compares it; says what a user must know."""
    try:
        written = load(folder)
    except HeadError as error:
        raise HeadMismatchError(f"{destination}: what would be written does not load: {error}") from error
    if not same_weights(written, head):
        raise HeadMismatchError(
            f"{destination}: the head that was read back differs from the one in the source, so nothing was written"
        )
    if head.activation is not None and written.activation is None:
        yield f"left out, since {written.format} has no place for it: the {head.activation} of the head's outputs"


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
                f"{self.target.name} holds a head alone, without its language model; name a file to write, such as "
                "head.safetensors"
            )
        sources = body_names(self.checkpoint, self.head_format, self.sighting)
        if not sources:
            raise HeadError(
                f"{self.checkpoint.location}: holds a head and no language model; name a file to write, not a folder"
            )
        check_config(self._config(), self.checkpoint.describe("config.json"))
        architecture = Architecture(self._config(), self.checkpoint.location)
        with loading(self.checkpoint.location), bounded_by(self.checkpoint):
            names = self._target_names(sources, architecture)
            untried = architecture.check({new: self._shape(name) for name, new in names.items()})
            layers = architecture.head_layers(self.target, self.head)
        tensors = head_tensors(self.head, self.target, layers)
        self._write_weights(folder, names, [Entry.of(name, tensor) for name, tensor in tensors.items()])
        config = json.dumps(self._new_config(architecture), indent=2, ensure_ascii=False)
        (folder / "config.json").write_text(f"{config}\n", encoding="utf-8")
        source = Path(self.checkpoint.location)
        copy_files(source, carried(source), folder)
        return (*self._notes(architecture, names), *untried)

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.checkpoint.shape(name, self.checkpoint.weight_map[name])

    def _config(self) -> dict[str, Any]:
        if not self.checkpoint.config:
            raise HeadFileError(f"{self.checkpoint.location}: expected a config.json beside the language model")
        return self.checkpoint.config

    def _target_names(self, sources: Sequence[str], architecture: Architecture) -> dict[str, str]:
        """The new name of each of the language model's tensors that is kept."""
        adapter = next((name for name in sources if ".lora_" in name or ".base_layer." in name), None)
        if adapter is not None:
            raise HeadMismatchError(
                f"{self.checkpoint.location}: {adapter} belongs to an adapter; merge the adapter into its model before "
                "you convert"
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
        name = architecture.class_name(body.architecture_for(self.head))
        return {**config, "architectures": [name], **body.configure(self.head)}

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
