"""The extension's kernels, which read tiles of products, and how each type of device has them cut."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from vhead import _native
from vhead.ops.devices import has_kernels
from vhead.ops.token_statistics.arguments import BackwardInputs, Rule, Selection, are_of_kernels, check_range
from vhead.ops.token_statistics.cpu import CpuTiling
from vhead.ops.token_statistics.cuda import CudaTiling
from vhead.ops.token_statistics.results import Gradients, Selected
from vhead.ops.token_statistics.tiles import Plan


class Tiling(Protocol):
    """How products are cut into tiles on a type of device."""

    CHECKS_TARGETS: bool  # whether the kernel there refuses tokens outside the vocabulary

    def multiplies(self, hidden: Tensor, weight: Tensor) -> bool:
        """Whether the kernel there makes the products of these itself, where their order of additions is free."""

    def plan(self, hidden: Tensor, weight: Tensor, *, batch_invariant: bool) -> Plan:
        """For these hidden states and this weight."""


# The sizes of tiles that suit each type of device. A new backend adds its row here.
TILINGS: dict[str, Tiling] = {"cpu": CpuTiling(), "cuda": CudaTiling()}


def tiling_for(first: Tensor, *others: Tensor | None) -> Tiling | None:
    """The tiles for hidden states or logits and what goes with them; None where plain torch does the work."""
    if not are_of_kernels(first, *others) or not has_kernels(first):
        return None
    return TILINGS[first.device.type]


# Between two calls a signal is heard. Each packs the hidden states anew, which costs little beside so many columns.
_COLUMNS_OF_A_CALL = 16 * 1024


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

    def fold_products(self, hidden: Tensor, weight: Tensor) -> None:
        """Adds the products of all rows with a whole weight, where the tiling's backend multiplies by itself."""
        for column in range(0, len(weight), _COLUMNS_OF_A_CALL):
            self._native.fold_products(hidden, weight[column : column + _COLUMNS_OF_A_CALL], column)

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

    def of_products(
        self, hidden: Tensor, weight: Tensor, needed: Sequence[bool], into: Tensor | None = None
    ) -> Gradients:
        """Those of hidden states and weight, from all products, where the tiling's backend multiplies by itself.

        With `into`, the weight's is added there, and not returned.
        """
        of_hidden = hidden.new_zeros(hidden.shape, dtype=torch.float32) if needed[0] else None
        rows = len(weight) if into is None else min(_COLUMNS_OF_A_CALL, len(weight))
        of_weight = weight.new_empty(rows, weight.shape[1]) if needed[1] else None
        for start in range(0, len(weight), _COLUMNS_OF_A_CALL):
            part = weight[start : start + _COLUMNS_OF_A_CALL]
            first = start if into is None else 0
            to = None if of_weight is None else of_weight[first : first + len(part)]
            self._gradients.add_products(hidden, part, start, of_hidden, to)
            if into is not None and to is not None:
                into[start : start + len(part)] += to
        return None if of_hidden is None else of_hidden.to(hidden.dtype), of_weight if into is None else None, None

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
