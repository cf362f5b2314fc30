"""Tiles of products that are large enough for a GPU's multiplication, and small beside its memory."""

import torch
from torch import Tensor

from vhead.ops.token_statistics.tiles import Plan, can_widen, multiply


class CudaTiling:
    """Tiles for the kernels of CUDA devices. Nothing here waits for the device."""

    # Fewest columns of a tile: what the fold takes of a row in one round.
    COLUMNS = 8192
    # Most rows of a tile.
    ROWS = 2048
    # Most products of a tile: 64 MiB. Where rows are few, a tile has more columns.
    PRODUCTS = 16 << 20
    # Bytes of weight that are upcast at once, where torch cannot multiply half precisions into float32.
    UPCAST_BYTES = 64 << 20
    # To read targets would be to wait for the device.
    CHECKS_TARGETS = False

    def plan(self, hidden: Tensor, weight: Tensor, *, batch_invariant: bool) -> Plan:
        """Half precisions are multiplied as they are where torch can, else upcast."""
        if (hidden.dtype == weight.dtype == torch.float32) or can_widen(hidden, weight):
            rows = min(self.ROWS, max(1, len(hidden)))
            return Plan(self.COLUMNS * max(1, self.PRODUCTS // (rows * self.COLUMNS)), self.ROWS, None, multiply)
        block = self.COLUMNS // 8
        columns = block * max(1, self.UPCAST_BYTES // (4 * block * weight.shape[1]))
        return Plan(min(columns, self.COLUMNS), self.ROWS, self.ROWS, multiply)
