"""Tiles of products that stay in the processor's cache."""

import torch
from torch import Tensor

from vhead import _native
from vhead.ops.token_statistics.tiles import Plan, multiply


class CpuTiling:
    """Tiles for the CPU's kernels."""

    # Columns of a tile: whole blocks of the kernel's, and one multiplication's worth of work with few rows.
    COLUMNS = 1024
    # Most rows of a tile: with the columns, 5 MiB of products.
    ROWS = 1280
    # Bytes of hidden states that are upcast at once.
    UPCAST_BYTES = 16 << 20
    # The kernel checks tokens as it reads them.
    CHECKS_TARGETS = True

    def plan(self, hidden: Tensor, weight: Tensor, *, batch_invariant: bool) -> Plan:
        """Torch multiplies float32 only: half precisions are upcast, a chunk of rows and a tile's weight at a time."""
        half = hidden.dtype != torch.float32
        chunk = max(1, self.UPCAST_BYTES // (4 * hidden.shape[1]) if half else len(hidden))
        return Plan(self.COLUMNS, self.ROWS, chunk, _multiply_in_order if batch_invariant else multiply)


def _multiply_in_order(hidden: Tensor, weight: Tensor, products: Tensor) -> Tensor:
    """The products in the value head's order of additions."""
    _native.linear(hidden, weight, None, 1.0, relu=False, out=products)
    return products
