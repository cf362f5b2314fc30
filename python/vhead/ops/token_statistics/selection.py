"""Tokens that are asked for besides the target, in plain torch: given candidates, and the likeliest."""

import torch
from torch import Tensor

from vhead.ops.token_statistics.arguments import Rule, Selection
from vhead.ops.token_statistics.results import Selected
from vhead.ops.token_statistics.tiles import over_temperature


def likeliest(z: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The largest logits of each row `[N, V]` and their tokens, `[N, top]`; of equals the smaller id first.

    NaN counts as minus infinity. `torch.topk` leaves open which of equals it takes, and whether one is taken at all.
    """
    z = z.masked_fill(z.isnan(), -torch.inf)
    vocabulary = z.shape[-1]
    least = z.topk(top, -1).values[:, -1:]
    above, equal = z > least, z == least
    enough = equal.cumsum(-1, dtype=torch.int32) <= top - above.sum(-1, keepdim=True)
    tokens = torch.arange(vocabulary, device=z.device)
    rising = torch.where(above | (equal & enough), tokens, vocabulary).topk(top, -1, largest=False).values
    logits, order = z.gather(-1, rising).sort(dim=-1, descending=True, stable=True)
    return logits, rising.gather(-1, order)


def selected_of(z: Tensor, logp: Tensor, selection: Selection) -> Selected:
    """Of logits over temperature `[N, V]` and their log-probabilities; without gradients."""
    z, logp = z.detach(), logp.detach()
    candidates, top = selection
    of_candidates = None if candidates is None else logp.gather(-1, candidates)
    if not top:
        return Selected(of_candidates, None, None)
    _, tokens = likeliest(z, top)
    unknown = logp.isnan().any(-1, keepdim=True)
    return Selected(of_candidates, tokens.masked_fill(unknown, -1), logp.gather(-1, tokens))


class TileSelection:
    """The selected tokens of `[N]` rows, a tile of products at a time, on devices whose kernels know none.

    Tiles come as for the kernels; the first of a row holds at least `top` tokens.
    """

    def __init__(self, selection: Selection, rows: int, bias: Tensor | None, rule: Rule, device: torch.device) -> None:
        self._candidates, self._top = selection
        self._bias, self._rule = bias, rule
        shape = (rows, 0) if self._candidates is None else self._candidates.shape
        self._logits = torch.full(shape, torch.nan, device=device)
        self._largest = torch.empty((rows, self._top), device=device)
        self._tokens = torch.empty((rows, self._top), dtype=torch.int64, device=device)

    def fold(self, products: Tensor, row: int, column: int) -> None:
        """Adds float32 products `[n, v]`."""
        rows, width = slice(row, row + len(products)), products.shape[1]
        if self._bias is not None:
            products = products + self._bias[column : column + width]
        z = over_temperature(products, self._rule)
        if self._candidates is not None:
            places = self._candidates[rows] - column
            inside = (places >= 0) & (places < width)
            found = z.gather(-1, places.clamp(0, width - 1))
            self._logits[rows] = torch.where(inside, found, self._logits[rows])
        if self._top:
            self._merge(z, rows, column)

    def _merge(self, z: Tensor, rows: slice, column: int) -> None:
        largest, tokens = likeliest(z, min(self._top, z.shape[1]))
        tokens = tokens + column
        if column:  # what is there already has smaller ids, so that a stable sort keeps it in front
            largest, order = torch.cat((self._largest[rows], largest), -1).sort(dim=-1, descending=True, stable=True)
            tokens = torch.cat((self._tokens[rows], tokens), -1).gather(-1, order)
        self._largest[rows], self._tokens[rows] = largest[:, : self._top], tokens[:, : self._top]

    def finish(self, peak: Tensor, log_sum: Tensor) -> Selected:
        """Log-probabilities by the rows' largest logits and the logarithms of the sums relative to them."""
        peak, log_sum = peak[:, None], log_sum[:, None]
        of_candidates = None if self._candidates is None else (self._logits - peak) - log_sum
        if not self._top:
            return Selected(of_candidates, None, None)
        tokens = self._tokens.masked_fill(log_sum.isnan(), -1)
        return Selected(of_candidates, tokens, (self._largest - peak) - log_sum)
