"""Products of hidden states and the lm_head's weight, a tile at a time, and gradients summed over tiles."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from vhead.ops.token_statistics.arguments import BackwardInputs, Rule, precision
from vhead.ops.token_statistics.results import Gradients

Multiply: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


class Tile(NamedTuple):
    """Products `[n, v]` of rows and tokens, what they are products of, and where they start."""

    products: Tensor
    hidden: Tensor
    weight: Tensor
    row: int
    column: int


class Plan(NamedTuple):
    """How products are cut into tiles.

    Attributes:
        columns: Tokens of a tile: whole blocks of the kernels'.
        rows: Most rows of a tile.
        chunk: Rows of hidden states that are upcast at once; each such chunk reads the weight anew. None upcasts
            nothing: hidden states and weight are multiplied as they are.
        multiply: Writes `hidden @ weight.T` to its third argument, float32 `[n, v]`.
    """

    columns: int
    rows: int
    chunk: int | None
    multiply: Multiply

    def tiles(self, hidden: Tensor, weight: Tensor) -> Iterator[Tile]:
        """Every tile; each is overwritten by the next."""
        columns, chunk_rows = min(self.columns, len(weight)), self.chunk or len(hidden)
        buffer = hidden.new_empty(self._block(min(chunk_rows, len(hidden))) * columns, dtype=torch.float32)
        upcast = None
        if self.chunk is not None and weight.dtype != torch.float32:
            upcast = weight.new_empty((columns, weight.shape[1]), dtype=torch.float32)
        for first in range(0, len(hidden), max(chunk_rows, 1)):
            chunk = hidden[first : first + chunk_rows]
            chunk = chunk if self.chunk is None else chunk.float()
            block = self._block(len(chunk))
            for column in range(0, len(weight), columns):
                part = weight[column : column + columns]
                part = part if upcast is None else upcast[: len(part)].copy_(part)
                for row in range(0, len(chunk), block):
                    x = chunk[row : row + block]
                    products = buffer[: len(x) * len(part)].view(len(x), len(part))
                    yield Tile(self.multiply(x, part, products), x, part, first + row, column)

    def _block(self, rows: int) -> int:
        """Rows of each tile: about as many in each."""
        return math.ceil(rows / math.ceil(rows / self.rows)) if rows else 1


def multiply(hidden: Tensor, weight: Tensor, products: Tensor) -> Tensor:
    """The products by torch's own multiplication, in float32: of half precisions too, where torch can."""
    if hidden.dtype == torch.float32:
        return torch.mm(hidden, weight.t(), out=products)
    return cast("Tensor", _mm(hidden, weight.t(), out_dtype=torch.float32, out=products))


def over_temperature(products: Tensor, rule: Rule) -> Tensor:
    """What a rule makes of products with their biases, in plain torch: logits over temperature."""
    scale, softcap, temperature = rule
    logits = products * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return logits / temperature


def can_widen(hidden: Tensor, weight: Tensor) -> bool:
    """Whether torch multiplies these half precisions into float32: newer releases do, on CUDA devices."""
    return hidden.is_cuda and hidden.dtype == weight.dtype and hasattr(torch.ops.aten.mm, "dtype_out")


# Its overload with an output dtype is newer than the oldest torch.
_mm: Any = torch.mm


class Sums:
    """Gradients, summed over tiles.

    Args:
        inputs: What they are of.
        into: Where the weight's are added up, if it has the dtype of sums; they are then not among `gradients`.

    Attributes:
        are_added: Whether they are added up there.
    """

    def __init__(self, inputs: BackwardInputs, into: Tensor | None = None) -> None:
        hidden, weight = inputs.hidden, inputs.weight
        dtype = precision(hidden, weight)
        shapes, self._dtypes = (hidden.shape, weight.shape, weight.shape[:1]), (hidden.dtype, weight.dtype, dtype)
        self.are_added = into is not None and inputs.needed[1] and into.dtype == dtype
        needed = (inputs.needed[0], inputs.needed[1] and not self.are_added, inputs.needed[2])
        self._sums = [
            hidden.new_zeros(shape, dtype=dtype) if need else None for shape, need in zip(shapes, needed, strict=True)
        ]
        if self.are_added:
            self._sums[1] = into

    def add(self, tile: Tile) -> None:
        """Adds a tile whose products are gradients by now."""
        grad_hidden, grad_weight, grad_bias = self._sums
        rows, columns = (slice(start, start + n) for start, n in zip(tile[3:], tile.products.shape, strict=True))
        if grad_hidden is not None:
            _add_product(grad_hidden[rows], tile.products, tile.weight)
        if grad_weight is not None:
            _add_product(grad_weight[columns], tile.products.t(), tile.hidden)
        if grad_bias is not None:
            grad_bias[columns] += tile.products.sum(0, dtype=grad_bias.dtype)

    def gradients(self, factor: Tensor | None = None) -> Gradients:
        """The sums times `factor`, in the dtypes of what they are gradients of; the bias's in the sums' own."""
        own = [self._sums[0], None if self.are_added else self._sums[1], self._sums[2]]
        sums = [s if s is None or factor is None else s.mul_(factor) for s in own]
        cast_ = (None if s is None else s.to(dtype) for s, dtype in zip(sums, self._dtypes, strict=True))
        return cast("Gradients", tuple(cast_))


def _add_product(to: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == to.dtype:
        to.addmm_(a, b)
    else:
        # Not addmm: in some releases what it adds to must have the dtype of what it multiplies.
        to += _mm(a, b, out_dtype=to.dtype)
