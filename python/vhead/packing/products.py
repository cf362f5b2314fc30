"""Products of half precisions in float32, where the processor multiplies float32 faster.

Many processors have no instructions for bfloat16 or float16, or slower ones than for float32. There a matrix is widened
part by part, multiplied in float32, and the products are rounded once, as torch's own half-precision products are.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vhead.ops.devices import SETTINGS
from vhead.ops.dispatch import is_plain
from vhead.ops.half_precision import is_float32_faster
from vhead.ops.matrix_unit import suits_matrix_unit

# Elements of a float32 part of the first matrix, and of the second one.
_FIRST, _SECOND = 2**23, 2**21


class WideProducts:
    """Multiplies half precisions in float32, one pair of matrices after the other.

    They share the memory of the parts, so that one object serves one thread at a time.
    """

    def __init__(self) -> None:
        self._memory = [torch.empty(0) for _ in range(3)]

    def linear(self, states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`states @ weight.T + bias`, `[..., N]` of `[..., K]` and `[N, K]`, rounded once."""
        found = self.multiply(states.flatten(0, -2), weight.t(), bias)
        return found.view(*states.shape[:-1], len(weight))

    def multiply(self, first: Tensor, second: Tensor, bias: Tensor | None = None) -> Tensor:
        """`first @ second + bias`, `[M, N]` of `[M, K]` and `[K, N]`, rounded once."""
        (rows, inner), columns = first.shape, second.shape[1]
        found = first.new_empty(rows, columns)
        added = None if bias is None else bias.float()
        for row in _parts(rows, _FIRST // max(inner, 1)):
            own = self._widened(0, first[row])
            for column in _parts(columns, _SECOND // max(inner, 1)):
                other = self._widened(1, second[:, column])
                products = self._part(2, len(own) * other.shape[1]).view(len(own), -1)
                torch.mm(own, other, out=products)
                if added is not None:
                    products += added[column]
                found[row, column] = products
        return found

    def _widened(self, which: int, part: Tensor) -> Tensor:
        """The part in float32, its elements in the order that they have."""
        is_turned = part.stride(-1) != 1
        own = part.t() if is_turned else part
        wide = self._part(which, own.numel()).view(own.shape).copy_(own)
        return wide.t() if is_turned else wide

    def _part(self, which: int, size: int) -> Tensor:
        if self._memory[which].numel() < size:
            self._memory[which] = torch.empty(size)
        return self._memory[which][:size]


def wide_linears(model: Any, modules: Iterable[nn.Module]) -> tuple[nn.Linear, ...]:
    """The linear layers among a model's modules that are multiplied faster in float32 here; not the one for logits."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linears = (module for module in modules if type(module) is nn.Linear and module is not output)
    return tuple(linear for linear in linears if _is_of_plain_memory(linear.weight) and suits_wide(linear.weight))


def _is_of_plain_memory(weight: Tensor) -> bool:
    """Neither in parts nor quantised nor turned."""
    return is_plain(weight) and weight.is_contiguous()


def suits_wide(tensor: Tensor) -> bool:
    """Whether products with this tensor, which is of a half precision then, are faster in float32."""
    half = tensor.is_cpu and tensor.dtype in (torch.bfloat16, torch.float16)
    return half and not suits_matrix_unit(tensor) and not SETTINGS.plain_torch and is_float32_faster(tensor.dtype)


def forward(module: nn.Linear, products: WideProducts, states: Tensor) -> Tensor:
    """The layer by float32 products, or by itself."""
    linear = products.linear if takes(module, states) else functional.linear
    return linear(states, module.weight, module.bias)


def takes(module: nn.Linear, states: Tensor) -> bool:
    """Whether float32 products give a layer's result: autocast has made no other dtype, and weights are in one part.

    Few rows go the same way as many, although it does not pay for them: a token's states would depend on its company.
    """
    return states.dtype == module.weight.dtype and states.dim() > 1 and is_plain(module.weight)


def _parts(count: int, most: int) -> Iterator[slice]:
    """About as many in each part, and at most so many."""
    number = -(-count // max(most, 1))
    bounds = [count * at // number for at in range(number + 1)] if number else []
    return (slice(start, stop) for start, stop in pairwise(bounds))
