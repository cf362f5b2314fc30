"""The mask in plain torch operations: a function of the seed and the element's place (`rust/core/src/dropout.rs`)."""

import math
import sys
from typing import Any, cast

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF
_OCTET = 8


def threshold(dropout_p: float) -> int:
    """An element is dropped where its 16 bits are below this."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p}")
    return min(math.floor(dropout_p * 65536.0 + 0.5), 65535)


def scale(dropout_p: float) -> float:
    """What the sum over kept elements is multiplied by."""
    return 65536.0 / (65536.0 - threshold(dropout_p))


def keep_mask(hidden: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    """Which elements of `hidden` `[..., H]` are kept, in its shape: `rust/core/src/dropout.rs` in torch operations."""
    columns, rows = hidden.shape[-1], math.prod(hidden.shape[:-1])
    row = torch.arange(rows, device=hidden.device)[:, None]
    octet = torch.arange((columns + _OCTET - 1) // _OCTET, device=hidden.device)[None, :]
    words = torch.stack(_philox((octet, row & _WORD, row >> 32, torch.zeros_like(row)), seed), -1)
    bits = torch.stack((words & 0xFFFF, words >> 16), -1).flatten(-3)
    return _replicated_like(hidden, (bits[:, :columns] >= threshold(dropout_p)).reshape(hidden.shape))


def _philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., SC 2011), each 32-bit word in an int64; counter words broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a product, by halves: the whole of it does not fit an int64."""
    low, high = word * (constant & 0xFFFF), word * (constant >> 16)
    return (high + (low >> 16)) >> 16, (((high & 0xFFFF) << 16) + low) & _WORD


def _replicated_like(hidden: Tensor, keep: Tensor) -> Tensor:
    """A mask that every rank computed whole, as a DTensor where `hidden` is one; ranks must have the same seed."""
    sharding = sharding_module()
    if sharding is None or not isinstance(hidden, sharding.DTensor):
        return keep
    placements = [sharding.Replicate()] * hidden.device_mesh.ndim
    return cast("Tensor", sharding.DTensor.from_local(keep, hidden.device_mesh, placements, run_check=False))


def sharding_module() -> Any:
    """Where DTensor lives, in programs that use it."""
    module = sys.modules.get("torch.distributed.tensor")
    # Torch 2.4 has a module of this name as well, and DTensor elsewhere.
    return module if hasattr(module, "DTensor") else sys.modules.get("torch.distributed._tensor")
