"""The formats, and what is done with each of them.

Formats are tried in the order of `FORMATS`, so the first one that a checkpoint shows signs of decides: if the head then
does not fit, that is an error, never a reason to go on to the next.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from vhead.checkpoint import Checkpoint, LocationArguments
from vhead.errors import HeadMismatchError
from vhead.formats.trl import BIAS_KEY, WEIGHT_KEY
from vhead.formats.weights import HeadWeights, LinearWeights

LLAMA_FACTORY_FILES = ("value_head.safetensors", "value_head.bin")

_EXPECTED = f"{WEIGHT_KEY} [1, H] and {BIAS_KEY} [1]"
_TRL_ROOT = re.compile(r"^((?:.+\.)?v_head)(?:\.|$)")
_HEAD_LIKE = re.compile(r"(?:^|\.)(?:(?:v|value|reward|rm|critic)_?heads?|score)(?:\.|$)")


@dataclass(frozen=True)
class Format:
    """One framework's way to store a head.

    Attributes:
        name: Its name in messages and on the command line.
        sniff: Whether a checkpoint shows signs of it, from names alone.
        read: Reads the head, or raises `HeadMismatchError` where it does not fit the format.
    """

    name: str
    sniff: Callable[[Checkpoint], bool]
    read: Callable[[Checkpoint], HeadWeights]


def find_head(location: str | Path, **options: Unpack[LocationArguments]) -> HeadWeights | None:
    """Finds the trained value head of a checkpoint and reads its two tensors, nothing else.

    Args:
        location: A folder, one file, or a hub repository's id; an existing path is never looked up on the hub.
        **options: Those of `vhead.checkpoint.LocationArguments`, as `from_pretrained` takes them.

    Returns:
        The head, or None for a plain language model that holds nothing like one.

    Raises:
        HeadMismatchError: The checkpoint holds something like a head that fits no known format.
        HeadFileError: A file is truncated, malformed or hostile.
    """
    checkpoint = Checkpoint(location, **options)
    for head_format in FORMATS:
        if head_format.sniff(checkpoint):
            return head_format.read(checkpoint)
    suspects = {name: file for name, file in checkpoint.weight_map.items() if _HEAD_LIKE.search(name)}
    if suspects:
        raise _mismatch(checkpoint, suspects)
    return None


def save_beside_adapter(state: Mapping[str, Tensor], folder: Path) -> None:
    """Writes the head of a model with adapters where TRL looks for it: pickled, in `pytorch_model.bin`.

    Args:
        state: The model's state dict; only its two head tensors are written.
        folder: The adapter's folder, which exists.
    """
    head = {name: state[name].detach().cpu() for name in (WEIGHT_KEY, BIAS_KEY)}
    unfinished = folder / ".pytorch_model.bin.unfinished"
    torch.save(head, unfinished)
    unfinished.replace(folder / "pytorch_model.bin")


def _sniff_trl(checkpoint: Checkpoint) -> bool:
    return any(_TRL_ROOT.match(name) for name in checkpoint.weight_map)


def _read_trl(checkpoint: Checkpoint) -> HeadWeights:
    """TRL merges the head into the model's own weights; raw saves of a module put a prefix before the same names."""
    return _read_pair(checkpoint, checkpoint.weight_map, "trl")


def _sniff_llama_factory(checkpoint: Checkpoint) -> bool:
    return _llama_factory_file(checkpoint) is not None


def _read_llama_factory(checkpoint: Checkpoint) -> HeadWeights:
    """LLaMA-Factory splits the head into a file of its own, beside the model or the adapter."""
    file_name = _llama_factory_file(checkpoint)
    return _read_pair(checkpoint, checkpoint.names_in(file_name) if file_name else {}, "llama-factory")


def _llama_factory_file(checkpoint: Checkpoint) -> str | None:
    return next((name for name in LLAMA_FACTORY_FILES if checkpoint.path(name) is not None), None)


FORMATS: tuple[Format, ...] = (
    Format("trl", _sniff_trl, _read_trl),
    Format("llama-factory", _sniff_llama_factory, _read_llama_factory),
)


def _read_pair(checkpoint: Checkpoint, files: Mapping[str, str], format_name: str) -> HeadWeights:
    """Reads weight and bias after everything about them that a header tells has been checked."""
    rooted = {name: match.group(1) for name in files if (match := _TRL_ROOT.match(name))}
    found = {name: files[name] for name in (rooted or files)}
    root = next(iter(rooted.values()), "v_head")
    weight_name, bias_name = f"{root}.summary.weight", f"{root}.summary.bias"
    if set(found) != {weight_name, bias_name}:
        raise _mismatch(checkpoint, found)
    weight_shape = checkpoint.shape(weight_name, files[weight_name])
    if len(weight_shape) != 2 or weight_shape[0] != 1 or checkpoint.shape(bias_name, files[bias_name]) != (1,):
        raise _mismatch(checkpoint, found)
    layer = LinearWeights(
        weight=_read_float32(checkpoint, weight_name, files[weight_name]),
        bias=_read_float32(checkpoint, bias_name, files[bias_name]),
    )
    return HeadWeights(
        layers=(layer,),
        format=format_name,
        source=f"{checkpoint.describe(files[weight_name])} ({format_name})",
    )


def _read_float32(checkpoint: Checkpoint, name: str, file_name: str) -> Tensor:
    tensor = checkpoint.read(name, file_name)
    if not tensor.is_floating_point():
        raise HeadMismatchError(
            f"{checkpoint.describe(file_name)}: {name}: expected a floating-point dtype, got {tensor.dtype}"
        )
    return tensor.to(torch.float32)


def _mismatch(checkpoint: Checkpoint, found: Mapping[str, str]) -> HeadMismatchError:
    listing = ", ".join(f"{name} {list(checkpoint.shape(name, file))}" for name, file in sorted(found.items()))
    return HeadMismatchError(
        f"{checkpoint.location}: the checkpoint holds something like a value head that does not fit: "
        f"found {listing or 'nothing'}; expected {_EXPECTED}. "
        "To start from a new head all the same, load the language model yourself and pass the object."
    )
