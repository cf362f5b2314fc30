"""What arguments may be: named errors for what they may not."""

from typing import TypeAlias

import torch
from torch import Tensor

from vhead.ops.dropout import threshold

Seed: TypeAlias = int | Tensor | None

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_kind(name: str, tensor: Tensor) -> None:
    """Raises unless `tensor` is a dense tensor of floating-point numbers."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__qualname__}")
    if tensor.dtype not in _FLOATS:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {bare(tensor.dtype)}")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got layout {bare(tensor.layout)}")


def check_device(name: str, tensor: Tensor, hidden: Tensor) -> None:
    """Raises unless `tensor` is where the hidden states are."""
    if tensor.device != hidden.device:
        raise ValueError(f"{name}: expected a tensor on {hidden.device} like hidden, got one on {tensor.device}")


def bare(torch_name: object) -> str:
    """The name of a dtype or layout without `torch.`."""
    return str(torch_name).removeprefix("torch.")


def seed_tensor(dropout_p: float, seed: Seed, device: torch.device) -> Tensor | None:
    """The seed as an int64 scalar tensor, for hidden states on `device`; None where nothing is dropped."""
    if not threshold(dropout_p):
        return None
    if seed is None:
        # On CUDA it is drawn and read on the device: nothing waits for it, and a captured graph draws anew.
        return draw_seed(device if device.type == "cuda" else torch.device("cpu"))
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed: expected int64, got {bare(seed.dtype)}")
        if seed.numel() != 1:
            raise ValueError(f"seed: expected one element, got {list(seed.shape)}")
        return seed.reshape(())
    if not isinstance(seed, int):
        raise TypeError(f"seed: expected an int or an int64 torch.Tensor, got {type(seed).__qualname__}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: expected an integer of 64 bits, got {seed}")
    return torch.tensor(seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device="cpu")


def draw_seed(device: torch.device) -> Tensor:
    """64 bits from torch's default generator of `device`."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)
