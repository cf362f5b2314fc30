"""Tokens that are asked for besides the target, in plain torch: given candidates, and the likeliest."""

import torch
from torch import Tensor

from vhead.ops.token_statistics.arguments import Selection
from vhead.ops.token_statistics.results import Selected


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
