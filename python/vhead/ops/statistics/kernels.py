"""Which kernels read tiles of products: those of the CPU, those of CUDA devices, or none."""

from typing import Protocol

from torch import Tensor

from vhead.ops.cuda import has_cuda_kernels
from vhead.ops.statistics.arguments import BackwardInputs, Rule, are_of_kernels
from vhead.ops.statistics.cpu import CpuKernels
from vhead.ops.statistics.cuda import CudaKernels
from vhead.ops.statistics.tiles import Plan


class Statistics(Protocol):
    """Statistics of `[N]` targets, a tile of products at a time."""

    def fold(self, products: Tensor, row: int, column: int) -> None:
        """Adds float32 products `[n, v]` of the rows from `row` on with the tokens from `column` on."""

    def finish(self) -> list[Tensor]:
        """Log-probabilities, entropies, log Σp², whether top-1 (1 or 0), largest logits, log-sums relative to them."""


class Differences(Protocol):
    """Gradients of log-probabilities and entropies by the products, a tile at a time."""

    @property
    def factor(self) -> Tensor | None:
        """What the gradients have to be multiplied by in the end, where there is something."""

    def differentiate(self, products: Tensor, row: int, column: int) -> Tensor:
        """The gradients of products `[n, v]`, which may be overwritten."""


class Kernels(Protocol):
    """What a kind of device has."""

    def plan(self, hidden: Tensor, weight: Tensor, *, batch_invariant: bool) -> Plan:
        """How products are cut into tiles."""

    def statistics(self, targets: Tensor, vocabulary: int, bias: Tensor | None, rule: Rule) -> Statistics:
        """Nothing known yet of `[N]` int64 targets."""

    def differences(self, inputs: BackwardInputs) -> Differences:
        """Of the gradients that came from above."""


def kernels_for(first: Tensor, *others: Tensor | None) -> Kernels | None:
    """The kernels for hidden states or logits and what goes with them; None where plain torch does the work."""
    if not are_of_kernels(first, *others):
        return None
    if first.is_cpu:
        return _CPU
    return _CUDA if has_cuda_kernels(first) else None


_CPU, _CUDA = CpuKernels(), CudaKernels()
