"""The value head as a torch function, on native kernels where there are some and on plain torch everywhere else."""

import math

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_OCTET = 8


def value_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Projects hidden states to values: `bias + scale * sum(keep * hidden * weight)`, accumulated in float32."""
    return value_head_plain(hidden, weight, bias, dropout_p=dropout_p, seed=seed)


def value_head_plain(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """`value_head` in plain torch operations: the same mask bit for bit, the sums in torch's own order."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p}")
    dtype = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
    threshold = min(math.floor(dropout_p * 65536.0 + 0.5), 65535)
    squeeze = weight.dim() == 1 or weight.shape[0] == 1
    with torch.autocast(hidden.device.type, enabled=False):
        x, w = hidden.to(dtype), weight.reshape(-1, weight.shape[-1]).to(dtype)
        if threshold:
            if seed is None:
                seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64).to(hidden.device)
            x = x * _keep(hidden.shape, threshold, seed, hidden.device)
        values = torch.matmul(x, w.t())
        if threshold:
            values = values * (65536.0 / (65536.0 - threshold))
        if bias is not None:
            values = values + bias.to(dtype)
        return values.squeeze(-1) if squeeze else values


def _keep(shape: torch.Size, threshold: int, seed: int | Tensor, device: torch.device) -> Tensor:
    columns, rows = shape[-1], math.prod(shape[:-1])
    row = torch.arange(rows, device=device)[:, None]
    octet = torch.arange((columns + _OCTET - 1) // _OCTET, device=device)[None, :]
    words = torch.stack(_philox(octet, row & _WORD, row >> 32, seed), -1)
    bits = torch.stack((words & 0xFFFF, words >> 16), -1).flatten(-3)
    return (bits[:, :columns] >= threshold).reshape(shape)


def _philox(octet: Tensor, row_low: Tensor, row_high: Tensor, seed: int | Tensor) -> tuple[Tensor, ...]:
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    c0, c1, c2, c3 = torch.broadcast_tensors(octet, row_low, row_high, torch.zeros_like(octet))
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    low, high = b * (a & 0xFFFF), b * (a >> 16)
    return (high + (low >> 16)) >> 16, (((high & 0xFFFF) << 16) + low) & _WORD


def init_linear_(weight: Tensor, bias: Tensor | None) -> None:
    """Fills in place with `nn.Linear`'s default distribution: uniform within `1 / sqrt(in_features)` of zero."""
    bound = 1.0 / math.sqrt(weight.shape[-1])
    with torch.no_grad():
        for parameter in (weight, bias):
            if parameter is not None:
                parameter.uniform_(-bound, bound)


def init_normal_(weight: Tensor, bias: Tensor | None, std: float) -> None:
    """Fills the weight in place with N(0, std), the bias with zeros."""
    with torch.no_grad():
        weight.normal_(0.0, std)
        if bias is not None:
            bias.zero_()


def backends() -> dict[str, object]:
    """What runs where."""
    return {"cpu": "plain torch"}
