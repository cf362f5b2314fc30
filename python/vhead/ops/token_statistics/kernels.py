"""The extension's kernels, which read tiles of products, and how each type of device has them cut."""

from typing import Protocol

import torch
from torch import Tensor

from vhead import _native
from vhead.ops.devices import has_kernels
from vhead.ops.token_statistics.arguments import BackwardInputs, Rule, Selection, are_of_kernels, check_range
from vhead.ops.token_statistics.cpu import CpuTiling
from vhead.ops.token_statistics.cuda import CudaTiling
from vhead.ops.token_statistics.results import Selected
from vhead.ops.token_statistics.tiles import Plan


class Tiling(Protocol):
    """How products are cut into tiles on a type of device."""

    CHECKS_TARGETS: bool  # whether the kernel there refuses tokens outside the vocabulary

    def plan(self, hidden: Tensor, weight: Tensor, *, batch_invariant: bool) -> Plan:
        """For these hidden states and this weight."""


# The sizes of tiles that suit each type of device. A new backend adds its row here.
TILINGS: dict[str, Tiling] = {"cpu": CpuTiling(), "cuda": CudaTiling()}


def tiling_for(first: Tensor, *others: Tensor | None) -> Tiling | None:
    """The tiles for hidden states or logits and what goes with them; None where plain torch does the work."""
    if not are_of_kernels(first, *others) or not has_kernels(first):
        return None
    return TILINGS[first.device.type]


class TileStatistics:
    """Statistics of `[N]` int64 targets, and what is selected, a tile of products at a time."""

    def __init__(
        self,
        tiling: Tiling,
        targets: Tensor,
        vocabulary: int,
        bias: Tensor | None,
        rule: Rule,
        selection: Selection,
    ) -> None:
        if not tiling.CHECKS_TARGETS:
            check_range(targets, vocabulary, selection.candidates)
        self._native = _native.LogitStatistics(targets, vocabulary, bias, *rule, *selection)

    def fold(self, products: Tensor, row: int, column: int) -> None:
        """Adds products `[n, v]`; each row's columns come in rising order."""
        self._native.fold(products, row, column)

    def finish(self) -> tuple[list[Tensor], Selected]:
        """The kernel's six tensors, and what was selected."""
        return self._native.finish(), Selected(*self._native.finish_selected())


class TileGradients:
    """Gradients of log-probabilities and entropies by the products, a tile at a time.

    Attributes:
        factor: What the gradients have to be multiplied by in the end, where there is something.
    """

    def __init__(self, inputs: BackwardInputs, plan: Plan) -> None:
        # Gradients are of the dtype of the multiplications that they go into.
        self._dtype = inputs.hidden.dtype if plan.chunk is None else torch.float32
        self._buffer = inputs.hidden.new_empty(0, dtype=self._dtype)
        self.factor = _power_of_two(inputs) if self._dtype == torch.float16 else None
        upstream = tuple(
            g if self.factor is None else g / self.factor for g in (inputs.grad_logprobs, inputs.grad_entropy)
        )
        statistics = (inputs.peak, inputs.log_sum, inputs.entropy)
        vocabulary, rule = len(inputs.weight), inputs.forward.rule
        self._gradients = _native.LogitGradients(inputs.targets, vocabulary, inputs.bias, *rule, statistics, upstream)

    def differentiate(self, products: Tensor, row: int, column: int) -> Tensor:
        """The gradients of products `[n, v]`: in place in float32, else in a buffer that the next tile overwrites."""
        if self._dtype == torch.float32:
            self._gradients.differentiate(products, row, column)
            return products
        if self._buffer.numel() < products.numel():
            self._buffer = products.new_empty(products.numel(), dtype=self._dtype)
        to = self._buffer[: products.numel()].view(products.shape)
        self._gradients.differentiate(products, row, column, to)
        return to


def _power_of_two(inputs: BackwardInputs) -> Tensor | None:
    """What the gradients from above are divided by, so that those of products fill float16's few exponents."""
    if not len(inputs.hidden):
        return None
    largest = torch.maximum(inputs.grad_logprobs.abs().amax(), inputs.grad_entropy.abs().amax())
    _, exponent = torch.frexp(largest * abs(inputs.scale / inputs.temperature))
    return torch.ldexp(torch.ones_like(largest), exponent)
