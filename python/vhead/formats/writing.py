"""Writing a head in any format that can hold it."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from vhead.checkpoints.replacing import replacing_file
from vhead.errors import HeadError
from vhead.formats.head_settings import in_metadata
from vhead.formats.layout import Format, LinearNames
from vhead.formats.registry import format_named
from vhead.formats.trl import BIAS_KEY, VHEAD, WEIGHT_KEY
from vhead.head_weights import HeadWeights, LinearWeights

_SAFETENSORS = ".safetensors"
_PICKLED = (".bin", ".pt", ".pth")

_OWN = f"{VHEAD.name} holds heads of one or two projections and any number of outputs"


def save(head: HeadWeights, path: str | Path, format: str = "trl", *, overwrite: bool = False) -> Path:
    """Writes a head to a file of its own, with the names that a framework gives its tensors.

    Args:
        head: The head, float32.
        path: A file, `.safetensors` or pickled by torch (`.bin`, `.pt`, `.pth`), or a folder for a format that has a
            head file of its own. Readers and other writers see the old file or the new one, whole.
        format: The name of the format.
        overwrite: Whether an existing file is replaced.

    Returns:
        The file.

    Raises:
        HeadError: The format cannot hold the head, has no file of its own for it, or does not exist.
        FileExistsError: The file exists and is not to be replaced, or something else has its name.
        FileNotFoundError: There is no folder for the file.
    """
    head_format = format_named(format)
    tensors = head_tensors(head, head_format)
    file = _head_file(Path(path), head_format)
    if file.exists() and not overwrite:
        raise FileExistsError(f"{file}: exists already; overwrite=True replaces it")
    write_tensors(tensors, file, in_metadata(head))
    return file


def is_head_file(path: Path) -> bool:
    """Whether a path names a file for a head, not a folder."""
    return path.suffix in (_SAFETENSORS, *_PICKLED) and not path.is_dir()


def head_tensors(
    head: HeadWeights, head_format: Format, layers: tuple[LinearNames, ...] | None = None
) -> dict[str, Tensor]:
    """The head's tensors by the format's names, or an error that says what the format cannot hold.

    Args:
        head: The head.
        head_format: The format.
        layers: The names, where they are not the ones that the format has for every model.

    Raises:
        HeadError: The format has another number of projections or outputs, or no bias where the head's is not zero.
    """
    layouts = head_format.layouts if layers is None else (layers,)
    layers = next((layers for layers in layouts if len(layers) == len(head.layers)), None)
    if layers is None:
        raise HeadError(f"{head_format.name} cannot hold a head of {len(head.layers)} projections; {_OWN}")
    if head.support is not None and head_format is not VHEAD:
        raise HeadError(f"{head_format.name} cannot hold the support of a distributional head; {VHEAD.name} does")
    if head_format.outputs not in (None, head.num_outputs):
        raise HeadError(f"{head_format.name} holds heads of one output; this head has {head.num_outputs}; {_OWN}")
    multiple = head_format.intermediate
    if multiple is not None and head.intermediate_size != multiple * head.hidden_size:
        raise HeadError(
            f"{head_format.name} has {multiple * head.hidden_size} elements between its projections; "
            f"this head has {head.intermediate_size}; {_OWN}"
        )
    tensors = {}
    for names, layer in zip(layers, head.layers, strict=True):
        tensors[names.weight] = layer.weight.detach().cpu().contiguous()
        bias = _stored_bias(names, layer, head_format)
        if names.bias is not None and bias is not None:
            tensors[names.bias] = bias
    return tensors


def write_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a file of tensors, safetensors or pickled as its name says, that takes its place when it is complete.

    Args:
        tensors: The tensors by name.
        file: The file.
        metadata: What a safetensors file is to say beside them.

    Raises:
        HeadError: There is something to say, and a pickled file has no place for it.
    """
    if metadata and file.suffix != _SAFETENSORS:
        raise HeadError(
            f"{file}: a pickled file has no place for the support or the activation of this head; name a "
            f"{_SAFETENSORS} file"
        )
    with replacing_file(file) as stream:
        if file.suffix == _SAFETENSORS:
            stream.write(to_safetensors(dict(tensors), metadata={"format": "pt", **(metadata or {})}))
        else:
            torch.save(dict(tensors), stream)


def save_beside_adapter(state: Mapping[str, Tensor], folder: Path) -> None:
    """Writes the head of a model with adapters where TRL looks for it: pickled, in `pytorch_model.bin`.

    Args:
        state: The model's state dict; only its two head tensors are written.
        folder: The adapter's folder, which exists.
    """
    write_tensors({name: state[name].detach().cpu() for name in (WEIGHT_KEY, BIAS_KEY)}, folder / "pytorch_model.bin")


def _stored_bias(names: LinearNames, layer: LinearWeights, head_format: Format) -> Tensor | None:
    """A bias of zeros is the same as none, and is added or left out as the format asks for it."""
    bias = None if layer.bias is None else layer.bias.detach().cpu().contiguous()
    if names.bias is None and bias is not None and bias.any():
        raise HeadError(
            f"{head_format.name} has no place for a bias beside {names.weight}, and this head's is not zero: "
            f"{bias.tolist()}"
        )
    if names.bias is not None and not names.bias_optional and bias is None:
        return layer.bias_or_zeros
    return bias


def _head_file(path: Path, head_format: Format) -> Path:
    if is_head_file(path):
        return path
    name = head_format.body.head_file if head_format.body else None
    if path.is_dir() and name is not None:
        return path / name
    kinds = ", ".join((_SAFETENSORS, *_PICKLED))
    folder = "" if name is None else f", or a folder for {name}"
    raise HeadError(f"{path}: {head_format.name} expects a file ({kinds}){folder}")
