"""The CPU's kernels, between torch's multiplications."""

import torch
from torch import Tensor

from vhead import _native
from vhead.ops.statistics.arguments import BackwardInputs, Rule
from vhead.ops.statistics.tiles import Plan, multiply


class CpuKernels:
    """Tiles that stay in the processor's cache."""

    # Columns of a tile: whole blocks of the kernel's, and one multiplication's worth of work with few rows.
    COLUMNS = 1024
    # Most rows of a tile: with the columns, 5 MiB of products.
    ROWS = 1280
    # Bytes of hidden states that are upcast at once.
    UPCAST_BYTES = 16 << 20

    def plan(self, hidden: Tensor, weight: Tensor, *, batch_invariant: bool) -> Plan:
        """Torch multiplies float32 only: half precisions are upcast, a chunk of rows and a tile's weight at a time."""
        half = hidden.dtype != torch.float32
        chunk = max(1, self.UPCAST_BYTES // (4 * hidden.shape[1]) if half else len(hidden))
        return Plan(self.COLUMNS, self.ROWS, chunk, _multiply_in_order if batch_invariant else multiply)

    def statistics(self, targets: Tensor, vocabulary: int, bias: Tensor | None, rule: Rule) -> _native.LogitStatistics:
        """Nothing known yet."""
        return _native.LogitStatistics(targets, vocabulary, bias, *rule)

    def differences(self, inputs: BackwardInputs) -> "_Differences":
        """Of the gradients that came from above."""
        return _Differences(inputs)


def _multiply_in_order(hidden: Tensor, weight: Tensor, products: Tensor) -> Tensor:
    """The products in the value head's order of additions."""
    _native.linear(hidden, weight, None, 1.0, relu=False, out=products)
    return products


class _Differences:
    factor = None

    def __init__(self, inputs: BackwardInputs) -> None:
        statistics = (inputs.peak, inputs.log_sum, inputs.entropy)
        upstream = (inputs.grad_logprobs, inputs.grad_entropy)
        vocabulary, rule = len(inputs.weight), inputs.forward.rule
        self._of = _native.LogitGradients(inputs.targets, vocabulary, inputs.bias, *rule, statistics, upstream)

    def differentiate(self, products: Tensor, row: int, column: int) -> Tensor:
        """The gradients, in place."""
        self._of.differentiate(products, row, column)
        return products
