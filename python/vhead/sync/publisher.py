"""Publishing a model's weights."""

import json
import pickle
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vhead import _native
from vhead.errors import PublicationMismatchError, SyncError
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
        # Of a sharded model, by another process.
        self._published: int | None = None

    @property
    def step(self) -> int | None:
        """The step that was published last, or None."""
        return max((step for step in (self._native.last_step, self._published) if step is not None), default=None)

    def publish(self, source: Source, *, step: int, metadata: Mapping[str, Any] | None = None) -> Publication:
        """Publishes a model's weights, or tensors by name.

        Where the model's tensors are sharded over processes (DTensor, as FSDP2 makes them), every process calls this;
        the tensors are gathered one after the other, and the first process writes them. What goes wrong in one of them
        is raised in all, and nothing is published then.

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
        write = _publish_sharded if any(weight.is_sharded for weight in weights) else _publish
        publication = write(self._native, weights, step, said, lambda: _attachments(source, weights), self._send)
        self._published = publication.step
        return publication

    def _send(self) -> None:
        if self._store is not None:
            self._store.send()


def _begin(native: "_native.SyncPublisher", weights: list[Weight], step: int, said: str) -> list[str]:
    parts = parts_of(weights)
    stem = {weight.name: STEMS[MODEL if MODEL in parts else weight.part] for weight in weights}
    described = [(w.name, w.dtype, list(w.tensor.shape), stem[w.name]) for w in weights]
    return [name for name, _, _ in native.begin(step, described, list(parts), said)]


def _publish(
    native: "_native.SyncPublisher", weights: list[Weight], step: int, said: str, attachments: Any, send: Any
) -> Publication:
    by_name = {weight.name: weight.tensor for weight in weights}
    try:
        for name in _begin(native, weights, step, said):
            for piece in pieces(by_name[name]):
                native.append(piece)
        published = Publication.of(native.finish(attachments()))
    except BaseException:
        native.abandon()
        raise
    send()
    return published


def _publish_sharded(
    native: "_native.SyncPublisher", weights: list[Weight], step: int, said: str, attachments: Any, send: Any
) -> Publication:
    """The same where each process has a piece of each tensor."""
    member = _Member(native if torch.distributed.get_rank() == 0 else None)
    order = member.first(lambda: _begin(native, weights, step, said))
    by_name = {weight.name: weight for weight in weights}
    with member.noting():
        _check_names(order, by_name)
    member.agree()
    for name in order:
        member.take(by_name[name])
    member.agree()

    def finish() -> Publication:
        published = Publication.of(native.finish(attachments()))
        send()
        return published

    published: Publication = member.first(finish)
    return published


def _check_names(order: list[str], by_name: Mapping[str, Weight]) -> None:
    if set(order) != set(by_name):
        rank, other = torch.distributed.get_rank(), sorted({*order} ^ {*by_name})
        raise PublicationMismatchError(
            f"source: expected the same tensors in all processes, got others in process {rank}: {', '.join(other[:8])}"
        )


class _Member:
    """A process of those that publish together. All of them gather to the end, as each waits for the others."""

    def __init__(self, writes: "_native.SyncPublisher | None") -> None:
        self._writes = writes
        self._failure: Exception | None = None

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Keeps what goes wrong for `agree`."""
        try:
            yield
        except Exception as error:  # Raised again in every process.
            self._failure = self._failure or _sendable(error)
            if self._writes is not None:
                self._writes.abandon()

    def take(self, weight: Weight) -> None:
        """Gathers a tensor, which the process that writes appends."""
        with self.noting():
            tensor: Any = weight.tensor
            whole = tensor.full_tensor() if weight.is_sharded else tensor
            if self._writes is not None and self._failure is None:
                for piece in pieces(whole):
                    self._writes.append(piece)

    def agree(self) -> None:
        """Raises in all processes what has gone wrong in the first one that it did in."""
        failures: list[Exception | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(failures, self._failure)
        failure = next((failure for failure in failures if failure is not None), None)
        if failure is not None:
            if self._writes is not None:
                self._writes.abandon()
            raise failure

    def first(self, work: Callable[[], Any]) -> Any:
        """What work in the process that writes gives, in every process."""
        box: list[Any] = [None]
        if self._writes is not None:
            with self.noting():
                box = [work()]
        self.agree()
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]


def _sendable(error: Exception) -> Exception:
    """The error, or one that says the same and can be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301, made in the line itself
    except Exception:  # Whatever the error's class does there.
        return SyncError(f"{type(error).__name__}: {error}")
    return error


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
