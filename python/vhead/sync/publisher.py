"""Publishing a model's weights."""

import json
import tempfile
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vhead import _native
from vhead.errors import SyncError
from vhead.formats.head_settings import in_config
from vhead.sync.publications import KEPT, Publication, made_folder, staging_folder
from vhead.sync.stores import opened
from vhead.sync.weights import ADAPTER, MODEL, STEMS, Source, Weight, parts_of, pieces, weights_of

# Publications of which one holds everything.
FULL_EVERY = 20


class Publisher:
    """Publishes weights in a directory, from which followers take them.

    A publication appears under its name when it is complete and on the disk, and `LATEST` names it from then on.
    Readers see the old one or the new one. A full publication is an ordinary checkpoint.

    One publisher works in a directory. It goes on after what is there already; a second one that publishes in
    between is noticed by the first, which then stops.

    Args:
        directory: The directory, which is made if need be, or its address in a store that fsspec reaches, such as
            `s3://bucket/run`.
        delta: Whether a publication holds only the elements that have changed since the last one. The publisher then
            keeps a copy of the last weights in a file without a name, in `staging`.
        full_every: With `delta`: one publication of so many holds everything, and so does a new publisher's first.
        keep: How many of the last publications stay, beside those that they are changes to.
        parts: Which parts of a model are published: `("head",)`, `("adapter",)`, both, or `("model",)`; None: all of a
            model, head and adapter of one with an adapter.
        staging: A folder on a disk of this machine; None: the system's for temporary files.

    Raises:
        SyncError: The directory cannot be made, or what is in it is damaged.
        ValueError: A number is below 1.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        delta: bool = False,
        full_every: int = FULL_EVERY,
        keep: int = KEPT,
        parts: tuple[str, ...] | None = None,
        staging: str | Path | None = None,
    ) -> None:
        for name, number in {"full_every": full_every, "keep": keep}.items():
            if number < 1:
                raise ValueError(f"{name}: expected at least 1, got {number}")
        place = staging_folder(staging)
        self.directory, self._store = opened(directory, place)
        if self._store is None:
            made_folder(self.directory)
        else:
            self._store.resume()
        self._parts = parts
        self._native = _native.SyncPublisher(self.directory, delta, full_every, keep, place)

    @property
    def step(self) -> int | None:
        """The step that was published last, or None."""
        return self._native.last_step

    def publish(self, source: Source, *, step: int, metadata: Mapping[str, Any] | None = None) -> Publication:
        """Publishes a model's weights, or tensors by name.

        Where the model's tensors are sharded over processes (DTensor, as FSDP2 makes them), every process calls this;
        the tensors are gathered one after the other, and the first process writes them.

        Args:
            source: The model, its value head, or the tensors by name.
            step: Above the last one.
            metadata: What is to be said beside the weights, of what JSON has.

        Returns:
            What was published.

        Raises:
            SyncStepError: The step is not above the last one.
            PublisherConflictError: Another publisher is at work in the directory.
            SyncError: It cannot be written; readers then see what they saw before.
        """
        weights = weights_of(source, self._parts)
        if not weights:
            raise ValueError("source: expected a model with weights, or tensors by name, got none")
        said = json.dumps(dict(metadata or {}), allow_nan=False)
        is_sharded = any(weight.is_sharded for weight in weights)
        write = _publish_sharded if is_sharded else _publish
        published = write(self._native, weights, step, said, lambda: _attachments(source, weights))
        if self._store is not None and not (is_sharded and torch.distributed.get_rank()):
            self._store.send()
        return published


def _begin(native: "_native.SyncPublisher", weights: list[Weight], step: int, said: str) -> list[str]:
    parts = parts_of(weights)
    stem = {weight.name: STEMS[MODEL if MODEL in parts else weight.part] for weight in weights}
    described = [(w.name, w.dtype, list(w.tensor.shape), stem[w.name]) for w in weights]
    return [name for name, _, _ in native.begin(step, described, list(parts), said)]


def _publish(
    native: "_native.SyncPublisher", weights: list[Weight], step: int, said: str, attachments: Any
) -> Publication:
    by_name = {weight.name: weight.tensor for weight in weights}
    try:
        for name in _begin(native, weights, step, said):
            for piece in pieces(by_name[name]):
                native.append(piece)
        return Publication.of(native.finish(attachments()))
    except BaseException:
        native.abandon()
        raise


def _publish_sharded(
    native: "_native.SyncPublisher", weights: list[Weight], step: int, said: str, attachments: Any
) -> Publication:
    """The same where each process has a piece of each tensor. A failure of the first one reaches all of them."""
    writer = _Writer(native) if torch.distributed.get_rank() == 0 else None
    order = _shared(None if writer is None else writer.tried(_begin, native, weights, step, said))
    by_name = {weight.name: weight for weight in weights}
    for name in order:
        weight = by_name[name]
        whole: Any = weight.tensor.full_tensor() if weight.is_sharded else weight.tensor  # type: ignore[attr-defined]
        if writer is not None:
            writer.tried(writer.append, whole)
        # Gone before the next one is gathered.
        del whole
    published: Publication = _shared(
        None if writer is None else writer.tried(lambda: Publication.of(native.finish(attachments())))
    )
    return published


class _Writer:
    """The process that writes. After a failure it goes on gathering, as the other processes wait for it."""

    def __init__(self, native: "_native.SyncPublisher") -> None:
        self._native = native
        self._failure: Exception | None = None

    def append(self, tensor: torch.Tensor) -> None:
        for piece in pieces(tensor):
            self._native.append(piece)

    def tried(self, work: Any, *arguments: Any) -> tuple[Any, Exception | None]:
        """What the work gives, or what has gone wrong with it or before."""
        if self._failure is None:
            try:
                return work(*arguments), None
            except Exception as error:  # Raised again in every process.
                self._native.abandon()
                self._failure = error
        return None, self._failure


def _shared(outcome: tuple[Any, Exception | None] | None) -> Any:
    """What the first process has, in every process; raises in all of them what went wrong in it."""
    box = [outcome]
    torch.distributed.broadcast_object_list(box, src=0)
    if box[0] is None:
        raise SyncError("the process that writes has given nothing")
    result, failure = box[0]
    if failure is not None:
        raise failure
    return result


def _attachments(source: Source, weights: list[Weight]) -> list[tuple[str, bytes]]:
    """The configurations without which the weights are no checkpoint."""
    body: Any = getattr(source, "pretrained_model", source)
    parts = parts_of(weights)
    with tempfile.TemporaryDirectory() as folder:
        if (
            MODEL in parts
            and hasattr(getattr(body, "config", None), "save_pretrained")
            and isinstance(source, nn.Module)
        ):
            config = deepcopy(body.config)
            config.architectures = [type(body).__name__]
            head = getattr(source, "v_head", None)
            config.__dict__.update({} if head is None else in_config(head))
            config.save_pretrained(folder)
        if ADAPTER in parts and hasattr(body, "peft_config"):
            body.peft_config[body.active_adapter].save_pretrained(folder)
        return [(path.name, path.read_bytes()) for path in sorted(Path(folder).iterdir())]
