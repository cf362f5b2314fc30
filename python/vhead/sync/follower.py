"""Bringing published weights into a model: all of them, verified, or none."""

import logging
import os
import stat
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vhead import _native
from vhead.checkpoints.mapping import mapped_bytes, mapped_tensor
from vhead.checkpoints.tensor_files import TORCH_DTYPES
from vhead.errors import PublicationError, PublicationMissingError, SyncFileError, WrongBaseError
from vhead.sync.matching import Match, Placed, matched
from vhead.sync.publications import Publication, staging_folder
from vhead.sync.stores import opened
from vhead.sync.swapping import TURNS, uninterrupted
from vhead.sync.weights import MODEL, Source, Weight, as_bytes, weights_of

logger = logging.getLogger("vhead")

# A publication can be removed while it is read; there is a newer one then.
_TRIES = 5
# Bytes that are brought to a device, or into another dtype, at a time.
_PIECE = 32 << 20
_LONGEST_LATEST = 256


class Follower:
    """Brings what a publisher publishes into a model.

    Everything is read once, into room that nobody else can reach, and verified there; then it is copied over the
    weights in use. Parameters keep their storage, so that optimisers and compiled graphs stay valid. Whatever goes
    wrong before that, the weights are the old ones, bit for bit.

    While weights are swapped, no `Scorer` of this process computes, and no process is forked. An interrupt (Ctrl-C)
    that comes in these milliseconds is raised when the swap is done.

    With `share_weights`, the files of a full publication are mapped in place of being copied, so that all followers of
    a machine have one copy of the weights. Parameters are the same objects then, with new storage. Publishers never
    write to a file that they have published, and nobody else may. Changes make what they touch a follower's own.

    Args:
        directory: The publisher's directory, or its address in a store that fsspec reaches, such as `s3://bucket/run`;
            it need not be there yet.
        staging: A folder on a disk of this machine for a copy, without a name, of weights that are too large for
            memory; None: the system's for temporary files.
        convert: Whether weights of another dtype are converted to the model's.
        share_weights: Whether the files of full publications are mapped.

    Attributes:
        directory: The directory; of a store, the folder that publications pass through.
        publication: What was brought into the model last, or None.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        staging: str | Path | None = None,
        convert: bool = False,
        share_weights: bool = False,
    ) -> None:
        self._staging = staging_folder(staging)
        self.directory, self._store = opened(directory, self._staging)
        self.publication: Publication | None = None
        self._convert = convert
        self._share_weights = share_weights
        self._of: Any = lambda: None
        self._seen = b""

    @property
    def step(self) -> int | None:
        """The step that the model has, or None."""
        return None if self.publication is None else self.publication.step

    def apply(self, model: Source, *, step: int | None = None) -> int | None:
        """Brings the newest weights into a model, or those of a step.

        Args:
            model: The model, its value head, or tensors by name. After the first call, the same one again.
            step: Which publication; None: the newest. An older one than the model has is a way back, and has to be
                asked for again each time: without a step, the newest is applied.

        Returns:
            The step, or None where there is nothing new.

        Raises:
            PublicationError: The publication is damaged, or its tensors are not the model's.
            SyncStepError: The directory's newest step is below the model's.
            SyncError: The publication that was asked for is not there, or cannot be read.
        """
        for left in reversed(range(_TRIES)):
            try:
                return self._apply(model, step)
            except PublicationMissingError:
                if step is not None or not left or not self.directory.is_dir():
                    raise
        return None

    def _apply(self, model: Source, step: int | None) -> int | None:
        named = self._named() if step is None else b""
        if named is None or (step is None and named == self._seen and self._of() is model):
            return None
        ready = self._ready(model, step, self._have(model))
        if ready is None:
            return None
        self._swap(*ready, model, named)
        return self.step

    def _named(self) -> bytes | None:
        """What `LATEST` says; None where nothing has been published."""
        if self._store is not None:
            return self._store.latest()
        latest = self.directory / "LATEST"
        try:
            # Whoever opens a pipe waits for its other end.
            if not stat.S_ISREG(latest.stat().st_mode):
                raise PublicationError(f"{latest}: expected a file, got something else; nothing of it was installed")
            with latest.open("rb") as file:
                return file.read(_LONGEST_LATEST)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise SyncFileError(error.errno, error.strerror, str(latest)) from error

    def _have(self, model: Source) -> tuple[int, str] | None:
        """What the model has, over which changes can be put."""
        if self.publication is None or self._of() is not model:
            return None
        return self.publication.step, self.publication.digest

    def _ready(
        self, model: Source, step: int | None, have: tuple[int, str] | None
    ) -> "tuple[_native.SyncStage, Match] | None":
        """The publication, verified, and where each of its tensors goes; None where the model has it."""
        if self._store is not None:
            self._store.bring(step, have)
        stage = _native.SyncStage.open(self.directory, step, have, self._staging, self._share_weights)
        if stage is None:
            return None
        match = matched(stage, _weights_for(stage, model), convert=self._convert)
        if stage.is_over_weights_in_use and match.others:
            # Changes are of bytes that lie elsewhere, or otherwise.
            return self._ready(model, step, None)
        try:
            _verify(stage, match)
        except WrongBaseError as error:
            if have is None:
                raise
            logger.warning("%s; all weights are read instead", error)
            return self._ready(model, step, None)
        return stage, match

    def _swap(self, stage: "_native.SyncStage", match: Match, model: Source, named: bytes) -> None:
        in_files = _in_files(stage)
        places = match.direct if in_files is None else []
        direct = [(tensor, as_bytes(weight.tensor)) for tensor, weight in places]
        mapped, others = _mapped(in_files, match)
        for _, weight in (*match.direct, *match.others):
            # Autograd notices what has changed between forward and backward.
            if not weight.tensor.is_inference():
                torch.autograd.graph.increment_version(weight.tensor)
        published, tensors = Publication.of(stage.summary), stage.tensors
        same: Any = weakref.ref(model) if isinstance(model, nn.Module) else lambda: model

        def swap() -> None:
            with TURNS.swapping(), torch.no_grad():
                undo = _Undo(others, self._staging)
                try:
                    for tensor, weight in others:
                        _bring(stage, tensor, tensors[tensor], weight.tensor)
                    stage.install(direct)
                    for owner, in_file in mapped:
                        owner.data = in_file
                except BaseException:
                    undo.run()
                    raise
                self.publication, self._of, self._seen = published, same, named

        uninterrupted(swap)


def _weights_for(stage: "_native.SyncStage", model: Source) -> list[Weight]:
    """The model's weights of the parts that a publication holds."""
    parts = Publication.of(stage.summary).parts
    return weights_of(model) if MODEL in parts else weights_of(model, parts)


def _verify(stage: "_native.SyncStage", match: Match) -> None:
    by_tensor = dict((*match.direct, *match.also))
    while (tensor := stage.next) is not None:
        stage.verify_next(as_bytes(by_tensor[tensor].tensor) if stage.is_over_weights_in_use else None)


def _in_files(stage: "_native.SyncStage") -> dict[int, Tensor | None] | None:
    """The verified tensors, by their places, in the pages of their files; None where they were copied."""
    found = stage.places()
    if found is None:
        return None
    descriptors, places = found
    try:
        files = [mapped_bytes(descriptor) for descriptor in descriptors]
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    return {
        tensor: mapped_tensor(files[file], start, TORCH_DTYPES[dtype], tuple(shape))
        for tensor, ((file, start), (_, dtype, shape)) in enumerate(zip(places, stage.tensors, strict=True))
        if dtype in TORCH_DTYPES
    }


def _mapped(in_files: dict[int, Tensor | None] | None, match: Match) -> tuple[list[tuple[Tensor, Tensor]], Placed]:
    """Which of the model's tensors is to lie in which pages, and what has to be copied all the same."""
    if in_files is None:
        return [], match.others
    mapped, others = [], [*match.others]
    for place, weight in match.direct:
        tensor = in_files.get(place)
        if tensor is None or weight.tensor.is_inference():
            others.append((place, weight))
        else:
            mapped += [(owner, tensor) for owner in weight.owners]
    return mapped, others


def _bring(stage: "_native.SyncStage", tensor: int, described: tuple[str, str, list[int]], into: Tensor) -> None:
    """Brings verified bytes to where torch alone can put them: a device, another dtype, another order."""
    _, dtype, shape = described
    source = TORCH_DTYPES[dtype]
    rows = into.reshape(1) if not shape else into
    per_row = max(1, int(np.prod(shape[1:], dtype=np.int64))) * source.itemsize
    step = max(1, _PIECE // per_row)
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        room = np.empty(part.numel() * source.itemsize, np.uint8)
        stage.copy(tensor, start * per_row, room)
        part.copy_(torch.from_numpy(room).view(source).reshape(part.shape))


class _Undo:
    """What some weights were before, in a file without a name: torch's copies, unlike the extension's, can fail."""

    def __init__(self, weights: list[tuple[int, Weight]], staging: Path) -> None:
        self._kept: list[tuple[Tensor, Tensor]] = []
        if not weights:
            return
        size = sum(-(-weight.tensor.nbytes // 64) * 64 for _, weight in weights)
        with tempfile.TemporaryFile(dir=staging) as file:
            file.truncate(max(size, 1))
            flat, at = np.memmap(file, np.uint8, "r+", shape=(max(size, 1),)), 0
        for _, weight in weights:
            old = weight.tensor
            kept = torch.from_numpy(flat[at : at + old.nbytes]).view(old.dtype).reshape(old.shape)
            kept.copy_(old)
            self._kept.append((old, kept))
            at += -(-old.nbytes // 64) * 64

    def run(self) -> None:
        """Puts it back."""
        for tensor, kept in self._kept:
            tensor.copy_(kept)
