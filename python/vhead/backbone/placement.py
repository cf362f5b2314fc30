"""On which devices a language model computes, and how tensors get there."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vhead.backbone.hidden_states import without_adapter


def last_hidden_device(model: nn.Module) -> torch.device | None:
    """The device on which a language model computes its last hidden state, or None where no parameter tells.

    For weights that are offloaded to the main memory or the disk, it is the device that they come to for a call.
    """
    for module in _from_the_end(without_adapter(model)):
        own = next((parameter for parameter in module._parameters.values() if parameter is not None), None)
        if own is not None:
            return _execution_device(module) or own.device
    return None


def uses_several_accelerators(model: nn.Module) -> bool:
    """Whether a device map puts a language model's layers on more than one accelerator."""
    places = getattr(model, "hf_device_map", {}).values()
    devices = {_device(place) for place in places if place != "disk"}
    return len({device for device in devices if device.type not in ("cpu", "meta")}) > 1


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Brings a tensor to a device; to CUDA from page-locked memory, so that neither side waits for the other."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Arriving:
    """Tensors on their way to the host, which does not wait for them before they are asked for.

    Args:
        tensors: By name; those on CUDA go to page-locked memory.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._copies = {name: _to_host(tensor) for name, tensor in tensors.items()}
        devices = {tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"}
        self._events = [_recorded(device) for device in devices]

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The same as arrays; waits until all are there."""
        for event in self._events:
            event.synchronize()
        return {name: copy.numpy() for name, copy in self._copies.items()}


def _to_host(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cuda":
        return tensor.cpu()
    return _page_locked(tensor).copy_(tensor, non_blocking=True)


def _page_locked(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)


def _recorded(device: torch.device) -> torch.cuda.Event:
    """An event after everything that the device has been given so far."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def _execution_device(module: nn.Module) -> torch.device | None:
    """Where accelerate brings a module's offloaded weights for a call, or None where it does not."""
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", [hook]):
        if getattr(part, "offload", False) and getattr(part, "execution_device", None) is not None:
            return _device(part.execution_device)
    return None


def _from_the_end(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of the part whose output is the last hidden state, last first."""
    base_model = getattr(model, "base_model", model)
    decoder = getattr(base_model, "decoder", None)
    trunk = decoder if isinstance(decoder, nn.Module) else base_model
    modules = list(trunk.modules())
    yield from reversed(modules)


def _device(place: int | str | torch.device) -> torch.device:
    """The device that an entry of a device map means; a number counts accelerators."""
    return torch.device(_accelerator(), place) if isinstance(place, int) else torch.device(place)


def _accelerator() -> str:
    """The kind of accelerator whose numbers stand in device maps."""
    kinds = (kind for kind in ("xpu", "npu") if getattr(torch, kind, None) and getattr(torch, kind).is_available())
    return next(kinds, "cuda")
