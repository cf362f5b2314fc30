"""One copy of a model's weights for all processes of a machine: parameters that lie in the pages of the checkpoint."""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from vhead.checkpoints.checkpoint import Checkpoint
from vhead.checkpoints.mapping import mapped_tensors
from vhead.errors import LoadError, VheadError
from vhead.modeling.adapters import find_adapter

logger = logging.getLogger("vhead")

# Prefixes of names by which a checkpoint and a model can differ, at most.
_MOST_PREFIXES = 3
# Where peft puts the layer that an adapter changes.
_ADAPTED = ".base_layer."
# What need not be shared: less than this is nobody's memory.
_SMALL_BYTES = 1 << 20


def share_weights(model: nn.Module, path: str | Path) -> None:
    """Has a loaded model's parameters lie in the pages of its checkpoint's files.

    A parameter is shared where the checkpoint has the same bytes in the same dtype; the log names the others. In a
    folder with an adapter, the files of the language model that it names are looked through as well. Parameters are the
    same objects, with new storage.

    Raises:
        VheadError: The model is not on the CPU.
        LoadError: Most of it cannot be shared: the files are not safetensors, or of another dtype.
    """
    devices = {parameter.device.type for parameter in model.parameters()}
    if devices != {"cpu"}:
        raise VheadError(f"share_weights: expected a model on the CPU, got one on {', '.join(sorted(devices))}")
    found, private = _by_ending(_checkpoints(path)), 0
    shared = 0
    for name, parameter in model.named_parameters():
        same = next(
            (tensor for tensor in _candidates(found, name.replace(_ADAPTED, ".")) if _same(tensor, parameter)), None
        )
        if same is not None:
            parameter.data = same
            shared += parameter.nbytes
        elif parameter.nbytes > _SMALL_BYTES:
            private += parameter.nbytes
            logger.warning("share_weights: %s is not in the checkpoint as it is in the model, so it is a copy", name)
    if not shared or shared < private:
        raise LoadError(
            f"{path}: share_weights: expected safetensors files of the model's own dtype, which can be mapped, found "
            "none"
        )
    logger.info("share_weights: %d bytes shared, %d bytes of this process alone", shared, private)


def _checkpoints(path: str | Path) -> Iterator[Checkpoint]:
    """The checkpoint, and that of the language model that an adapter is for."""
    checkpoint = Checkpoint(path)
    yield checkpoint
    adapter = find_adapter(checkpoint)
    if adapter is not None and adapter.base is not None:
        yield Checkpoint(adapter.base, revision=adapter.base_revision)


def _by_ending(checkpoints: Iterable[Checkpoint]) -> dict[str, list[Tensor]]:
    """The mapped tensors of checkpoints, by their names and by what is left of these without prefixes."""
    found: dict[str, list[Tensor]] = {}
    for checkpoint in checkpoints:
        for file in sorted(set(checkpoint.weight_map.values())):
            path = checkpoint.path(file) if file.endswith(".safetensors") else None
            for name, tensor in mapped_tensors(path).items() if path is not None else ():
                for ending in _endings(name):
                    found.setdefault(ending, []).append(tensor)
    return found


def _endings(name: str) -> Iterator[str]:
    parts = name.split(".")
    for left_out in range(min(_MOST_PREFIXES, len(parts) - 2) + 1):
        yield ".".join(parts[left_out:])


def _candidates(found: dict[str, list[Tensor]], name: str) -> Iterator[Tensor]:
    for ending in _endings(name):
        yield from found.get(ending, ())


def _same(tensor: Tensor, parameter: Tensor) -> bool:
    """Whether the bytes are the same, which settles what names leave open."""
    if tensor.dtype != parameter.dtype or tensor.shape != parameter.shape or not parameter.is_contiguous():
        return False
    return torch.equal(tensor.reshape(-1).view(torch.uint8), parameter.detach().reshape(-1).view(torch.uint8))
