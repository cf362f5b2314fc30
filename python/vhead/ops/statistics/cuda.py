"""CUDA's kernels, between torch's multiplications. Nothing here waits for the device."""

import torch
from torch import Tensor

from vhead import _native
from vhead.ops.statistics.arguments import BackwardInputs, Rule, check_range
from vhead.ops.statistics.tiles import Plan, can_widen, multiply


class CudaKernels:
    """Tiles that are large enough for a GPU's multiplication, and small beside its memory."""

    # Fewest columns of a tile: what the fold takes of a row in one round.
    COLUMNS = 8192
    # Most rows of a tile.
    ROWS = 2048
    # Most products of a tile: 64 MiB. Where rows are few, a tile has more columns.
    PRODUCTS = 16 << 20
    # Bytes of weight that are upcast at once, where torch cannot multiply half precisions into float32.
    UPCAST_BYTES = 64 << 20

    def plan(self, hidden: Tensor, weight: Tensor, *, batch_invariant: bool) -> Plan:
        """Half precisions are multiplied as they are where torch can, else upcast."""
        if _are_multiplied_as_they_are(hidden, weight):
            rows = min(self.ROWS, max(1, len(hidden)))
            return Plan(self.COLUMNS * max(1, self.PRODUCTS // (rows * self.COLUMNS)), self.ROWS, None, multiply)
        block = self.COLUMNS // 8
        columns = block * max(1, self.UPCAST_BYTES // (4 * block * weight.shape[1]))
        return Plan(min(columns, self.COLUMNS), self.ROWS, self.ROWS, multiply)

    def statistics(
        self, targets: Tensor, vocabulary: int, bias: Tensor | None, rule: Rule
    ) -> _native.CudaLogitStatistics:
        """Nothing known yet."""
        check_range(targets, vocabulary)
        return _native.CudaLogitStatistics(targets, vocabulary, bias, *rule)

    def differences(self, inputs: BackwardInputs) -> "_Differences":
        """Of the gradients that came from above."""
        return _Differences(inputs)


def _are_multiplied_as_they_are(hidden: Tensor, weight: Tensor) -> bool:
    return (hidden.dtype == weight.dtype == torch.float32) or can_widen(hidden, weight)


class _Differences:
    """Gradients of products, in the dtype of the multiplications that they go into: torch's own too."""

    def __init__(self, inputs: BackwardInputs) -> None:
        as_they_are = _are_multiplied_as_they_are(inputs.hidden, inputs.weight)
        self._dtype = inputs.hidden.dtype if as_they_are else torch.float32
        self._buffer = inputs.hidden.new_empty(0, dtype=self._dtype)
        self.factor = _power_of_two(inputs) if self._dtype == torch.float16 else None
        upstream = tuple(
            g if self.factor is None else g / self.factor for g in (inputs.grad_logprobs, inputs.grad_entropy)
        )
        statistics = (inputs.peak, inputs.log_sum, inputs.entropy)
        vocabulary, rule = len(inputs.weight), inputs.forward.rule
        self._of = _native.CudaLogitGradients(inputs.targets, vocabulary, inputs.bias, *rule, statistics, upstream)

    def differentiate(self, products: Tensor, row: int, column: int) -> Tensor:
        """The gradients: in place in float32, else in a buffer that the next tile's overwrite."""
        if self._dtype == torch.float32:
            to = products
        else:
            if self._buffer.numel() < products.numel():
                self._buffer = products.new_empty(products.numel(), dtype=self._dtype)
            to = self._buffer[: products.numel()].view(products.shape)
        self._of.differentiate(products, row, column, to)
        return to


def _power_of_two(inputs: BackwardInputs) -> Tensor | None:
    """What the gradients from above are divided by, so that those of products fill float16's few exponents."""
    if not len(inputs.hidden):
        return None
    largest = torch.maximum(inputs.grad_logprobs.abs().amax(), inputs.grad_entropy.abs().amax())
    _, exponent = torch.frexp(largest * abs(inputs.scale / inputs.temperature))
    return torch.ldexp(torch.ones_like(largest), exponent)
