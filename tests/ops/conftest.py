"""Random heads and hidden states, and what the promises are judged by."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]


@dataclass
class Case:
    """Arguments of `value_head`, random."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.bias

    def leaves(self) -> "Case":
        """Fresh leaves with the same numbers, which require grad."""
        return Case(*(tensor.detach().clone().requires_grad_() for tensor in self.tensors))

    def double(self) -> "Case":
        return Case(*(tensor.detach().double() for tensor in self.tensors))

    def gradients(self) -> tuple[Tensor | None, ...]:
        return tuple(tensor.grad for tensor in self.tensors)


@pytest.fixture
def case() -> Callable[..., Case]:
    """Makes a case: hidden `sizes`, a weight `[outputs, H]`."""

    def make(*sizes: int, outputs: int = 1, dtype: torch.dtype = torch.float32) -> Case:
        hidden = torch.randn(sizes).to(dtype)
        return Case(hidden, torch.randn(outputs, sizes[-1]), torch.randn(outputs))

    return make


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal as bits: NaN equals NaN, -0 differs from +0."""
    kind = torch.int32 if a.dtype == torch.float32 else torch.int16
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(kind), b.view(kind))
