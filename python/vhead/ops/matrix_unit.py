"""Layers of a language model by the processor's own unit for bfloat16 matrices (Intel AMX), added in float32."""

import os

import torch
from torch import Tensor

from vhead import _native
from vhead.ops.devices import SETTINGS

# The variable that keeps oneDNN, and thereby torch, from instructions, and what it says where it keeps it from none.
_ONEDNN_ISA = "ONEDNN_MAX_CPU_ISA"
_WITH_ALL = ("", "ALL", "DEFAULT")
# Rows of a packed row that `RowAttention` tells apart.
MOST_ROWS = 2**24


def has_matrix_unit() -> bool:
    """Whether this process multiplies bfloat16 matrices by the processor's matrix unit.

    It does where the processor has Intel AMX, the system lets processes use it, and oneDNN's variable
    `ONEDNN_MAX_CPU_ISA` does not forbid it.
    """
    return not SETTINGS.plain_torch and onednn_allows("AMX") and _native.has_matrix_unit()


def onednn_allows(*parts: str) -> bool:
    """Whether `ONEDNN_MAX_CPU_ISA` allows all instructions, or has a name of which one of these is a part."""
    allowed = os.environ.get(_ONEDNN_ISA, "").upper()
    return allowed in _WITH_ALL or any(part in allowed for part in parts)


def suits_matrix_unit(*tensors: Tensor) -> bool:
    """Whether the matrix unit multiplies these tensors: bfloat16 ones in the main memory, where there is the unit."""
    return all(x.is_cpu and x.dtype == torch.bfloat16 for x in tensors) and has_matrix_unit()


class GatedLayers:
    """Computes `down(silu(gate(x)) * up(x))` by the matrix unit, without gradients, for one layer after the other.

    The layers share the memory between their products, so that one object serves one thread at a time.
    """

    def __init__(self) -> None:
        self._native = _native.FeedForward()

    def __call__(self, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """One layer; gate, silu, up, their product and the result are rounded to bfloat16, as torch's layers round.

        Args:
            x: `[..., H]`, bfloat16, as the weights.
            gate: `[I, H]`.
            up: `[I, H]`.
            down: `[H, I]`.

        Returns:
            `[..., H]`, bfloat16.

        Raises:
            ValueError: Sizes do not fit.
        """
        return self._native.apply(x.contiguous(), gate.detach(), up.detach(), down.detach())


class RowAttention:
    """Attention over one packed row by the matrix unit, without gradients, for one layer after the other.

    Row q sees row k where `k <= q < ends[k]`. The layers share memory, so that one object serves one thread at a time.

    Args:
        ends: int64 `[T]`.
        positions: Tokens before each row on its path, by which windows are counted, int64 `[T]`.

    Raises:
        ValueError: There are 2^24 rows or more, or not as many positions.
    """

    def __init__(self, ends: Tensor, positions: Tensor) -> None:
        self._native = _native.Attention(ends, positions)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """One layer; weights are rounded to bfloat16, and sums are float32.

        Args:
            query: `[heads, T, D]`, bfloat16, as the others.
            key: `[key heads, T, D]`, whose heads each serve the same number of query heads.
            value: `[key heads, T, E]`.
            scale: What products are multiplied by, above 0.
            window: Rows that each row sees on its path, itself among them; None: all.

        Returns:
            `[T, heads, E]`, bfloat16.

        Raises:
            ValueError: Sizes do not fit.
        """
        return self._native.apply(query, key, value, scale, window)
