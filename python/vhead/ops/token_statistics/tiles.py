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
    """Gradients, summed over tiles. All tiles of a token come one after the other, whatever their rows.

    So the weight's sums, which have more digits than a half precision's gradient, are kept for the tokens of one tile.

    Args:
        inputs: What they are of.
        factor: What the sums have to be multiplied by.
        into: Where the weight's are added, of the weight's dtype; they are then not among `gradients`.
    """

    def __init__(self, inputs: BackwardInputs, factor: Tensor | None = None, into: Tensor | None = None) -> None:
        hidden, weight = inputs.hidden, inputs.weight
        self._dtype, self._factor, self._returns_weight = precision(hidden, weight), factor, into is None
        self._hidden = hidden.new_zeros(hidden.shape, dtype=self._dtype) if inputs.needed[0] else None
        self._bias = hidden.new_zeros(len(weight), dtype=self._dtype) if inputs.needed[2] else None
        self._weight = (torch.zeros_like(weight) if into is None else into) if inputs.needed[1] else None
        self._is_direct = factor is None and weight.dtype == self._dtype
        # The sums of some tokens' weights, and where their gradients are.
        self._part, self._place, self._column = hidden.new_empty(0), hidden.new_empty(0), -1
        self._of_hidden = hidden.dtype

    def add(self, tile: Tile) -> None:
        """Adds a tile whose products are gradients by now."""
        rows, columns = (slice(start, start + n) for start, n in zip(tile[3:], tile.products.shape, strict=True))
        if self._hidden is not None:
            _add_product(self._hidden[rows], tile.products, tile.weight)
        if self._weight is not None:
            if tile.column != self._column:
                self._begin(self._weight[columns], tile.column)
            _add_product(self._part, tile.products.t(), tile.hidden)
        if self._bias is not None:
            self._bias[columns] += tile.products.sum(0, dtype=self._dtype)

    def gradients(self) -> Gradients:
        """The sums, in the dtypes of what they are gradients of; the bias's in the sums' own."""
        self._end()
        of_hidden, of_bias = (
            s if s is None or self._factor is None else s.mul_(self._factor) for s in (self._hidden, self._bias)
        )
        of_weight = self._weight if self._returns_weight else None
        return None if of_hidden is None else of_hidden.to(self._of_hidden), of_weight, of_bias

    def _begin(self, place: Tensor, column: int) -> None:
        self._end()
        self._place, self._column = place, column
        self._part = place if self._is_direct else torch.zeros_like(place, dtype=self._dtype)

    def _end(self) -> None:
        """Adds what is summed to the gradient: rounded once."""
        if self._column >= 0 and not self._is_direct:
            self._place += self._part if self._factor is None else self._part.mul_(self._factor)
        self._column = -1


def _add_product(to: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == to.dtype:
        to.addmm_(a, b)
    else:
        # Not addmm: in some releases what it adds to must have the dtype of what it multiplies.
        to += _mm(a, b, out_dtype=to.dtype)
