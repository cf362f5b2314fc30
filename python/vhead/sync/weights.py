"""A model's weights by the names that a checkpoint gives them, each tensor once, and their bytes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vhead.checkpoints.tensor_files import SAFETENSORS_DTYPES
from vhead.errors import PublicationMismatchError
from vhead.formats.layout import PRIVATE_WRAPPER
from vhead.heads import ValueHead

HEAD, ADAPTER, MODEL = "head", "adapter", "model"
_HEAD_PREFIX = "v_head."
_DATA_PARALLEL = "module."

# The stem of the file in which each part lies, as readers of checkpoints look for it.
STEMS = {HEAD: "v_head", ADAPTER: "adapter_model", MODEL: "model"}

# Bytes that go to the extension in one call, between which an interrupt is noticed: a multiple of its blocks.
_PIECE = 256 << 20
# The same from a device, through memory of this process.
_DEVICE_PIECE = 32 << 20

Source = nn.Module | Mapping[str, Tensor]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Weight:
    """A tensor of a model.

    Attributes:
        names: Its names: several where weights are tied.
        owners: The tensors of these names, as the model has them; several where they only share their memory.
        part: Which part of the model it belongs to.
    """

    names: tuple[str, ...]
    owners: tuple[Tensor, ...]
    part: str

    @property
    def tensor(self) -> Tensor:
        """The tensor, without its gradients."""
        return self.owners[0].detach()

    @property
    def name(self) -> str:
        """Its first name, by which it is published."""
        return self.names[0]

    @property
    def dtype(self) -> str:
        """Its dtype, by safetensors' name.

        Raises:
            PublicationMismatchError: safetensors has no such dtype.
        """
        found = SAFETENSORS_DTYPES.get(str(self.tensor.dtype))
        if found is None or self.tensor.layout is not torch.strided or self.tensor.is_meta:
            what = "meta tensor" if self.tensor.is_meta else f"{self.tensor.layout} tensor of {self.tensor.dtype}"
            raise PublicationMismatchError(f"{self.name}: expected a tensor that safetensors can hold, got a {what}")
        return found

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a piece of it (a DTensor)."""
        return hasattr(self.tensor, "full_tensor")

    @property
    def is_plain(self) -> bool:
        """Whether its bytes lie in this machine's memory, one after the other."""
        tensor = self.tensor
        return (
            type(tensor) in (Tensor, nn.Parameter)
            and tensor.device.type == "cpu"
            and tensor.layout is torch.strided
            and tensor.is_contiguous()
            and not tensor.is_conj()
            and not tensor.is_neg()
        )


def weights_of(source: Source, parts: tuple[str, ...] | None = None) -> list[Weight]:
    """The weights of a model, or tensors by name.

    Args:
        source: The model, a value head, or the tensors.
        parts: Which parts are wanted; None: what the model is saved with: all, or head and adapter.
    """
    named = dict(_named(source, with_body=parts is None or MODEL in parts))
    names: dict[object, list[str]] = {}
    for name, (tensor, _) in named.items():
        names.setdefault(_place(tensor), []).append(name)
    weights = [
        Weight(tuple(same), tuple(named[name][0] for name in same), named[same[0]][1]) for same in names.values()
    ]
    if parts is None or MODEL in parts:
        return weights
    return [weight for weight in weights if weight.part in parts]


def parts_of(weights: list[Weight]) -> tuple[str, ...]:
    """The parts that weights belong to; a head within a whole model is no part of its own."""
    found = {weight.part for weight in weights}
    return (MODEL,) if MODEL in found else tuple(part for part in (HEAD, ADAPTER) if part in found)


def _named(source: Source, *, with_body: bool) -> Iterator[tuple[str, tuple[Tensor, str]]]:
    if isinstance(source, Mapping):
        state: Mapping[str, Any] = source
    elif isinstance(source, ValueHead):
        state = {f"{_HEAD_PREFIX}{name}": tensor for name, tensor in source.state_dict(keep_vars=True).items()}
    else:
        state = source.state_dict(keep_vars=True)
        adapted = getattr(source, "pretrained_model", source)
        if hasattr(adapted, "peft_config"):
            head = {name: value for name, value in state.items() if name.startswith(_HEAD_PREFIX)}
            yield from _adapter(adapted)
            state = head
    for name, tensor in state.items():
        plain = PRIVATE_WRAPPER.sub("", name).removeprefix(_DATA_PARALLEL)
        if isinstance(tensor, Tensor):
            yield plain, (tensor, HEAD if plain.startswith(_HEAD_PREFIX) else MODEL)


def _adapter(model: Any) -> Iterator[tuple[str, tuple[Tensor, str]]]:
    """The active adapter's tensors, by the names that peft gives them in its files."""
    from peft import get_peft_model_state_dict  # an optional package

    state = get_peft_model_state_dict(
        model,
        state_dict=model.state_dict(keep_vars=True),
        adapter_name=model.active_adapter,
        save_embedding_layers=False,
    )
    for name, tensor in state.items():
        yield name, (tensor, ADAPTER)


def _place(tensor: Any) -> object:
    """What two names of one tensor have in common."""
    local: Tensor = tensor.detach().to_local() if hasattr(tensor, "full_tensor") else tensor
    if local.is_meta or not local.numel():
        return id(tensor)
    return tensor.device, local.data_ptr(), tensor.dtype, tensor.shape, local.stride()


def as_bytes(tensor: Tensor) -> Bytes:
    """The bytes of a contiguous tensor in this machine's memory, where they lie."""
    array: Bytes = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return array


def pieces(tensor: Tensor) -> Iterator[Bytes]:
    """The bytes of a tensor, wherever and however it lies, a piece at a time."""
    if tensor.device.type == "cpu":
        whole = as_bytes(tensor.resolve_conj().resolve_neg().contiguous())
        for start in range(0, len(whole), _PIECE):
            yield whole[start : start + _PIECE]
        return
    flat = tensor.detach().reshape(-1)
    step = max(1, _DEVICE_PIECE // tensor.element_size())
    for start in range(0, flat.numel(), step):
        yield as_bytes(flat[start : start + step].cpu())
