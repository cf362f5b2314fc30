"""Log-probabilities and entropies of a batch's tokens with gradients, without the logits of all rows."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding, log_softmax
from torch.utils.checkpoint import checkpoint

from vhead import ops
from vhead.heads import is_plain_linear
from vhead.ops.token_statistics import accumulating_token_logprobs
from vhead.packing.checkpointing import Within
from vhead.scoring.logits import LogitsRule

# Logits of rows that are there at once, where the language-model head has to be called as a module.
_LOGITS_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """What is found of W rows: log-probabilities and entropies `[W]`, and `[W, M]` of candidates, or None."""

    logprobs: Tensor
    entropy: Tensor
    candidate_logprobs: Tensor | None = None


def of_states(
    states: Tensor,
    rule: LogitsRule,
    targets: Tensor,
    candidates: Tensor | None,
    temperature: float,
    weight: Tensor | None = None,
    *,
    in_place: bool = False,
    within: Within = nullcontext,
) -> Statistics:
    """The statistics of hidden states `[W, H]`, by a rule for logits that the model has confirmed.

    `weight` is the language-model head's where its gradient goes another way than to the parameter. With `in_place`,
    backward adds that gradient to the parameter's by itself. A module in its place runs in `within`, which chooses the
    adapter.
    """
    lm_head = rule.lm_head
    if not is_plain_linear(lm_head) or lm_head.weight.device != states.device:
        return _in_chunks(states, rule, targets, candidates, temperature, within)
    readable = rule.readable(states)
    weight = lm_head.weight if weight is None else weight
    adds = in_place and torch.is_grad_enabled() and weight.requires_grad
    logprobs, entropy = (accumulating_token_logprobs if adds else ops.token_logprobs)(
        readable,
        weight,
        targets,
        bias=lm_head.bias,
        temperature=temperature,
        softcap=rule.softcap,
        scale=rule.scale,
    )
    if candidates is None:
        return Statistics(logprobs, entropy)
    # Candidates have no gradient in the operation, but the target has one: theirs is the difference of the logits.
    tokens = torch.cat([targets[:, None], candidates], dim=1)
    chosen = embedding(tokens, weight).float() @ readable.float()[:, :, None]
    logits = chosen.squeeze(-1) if lm_head.bias is None else chosen.squeeze(-1) + lm_head.bias[tokens]
    logits = _ruled(logits, rule) / temperature
    return Statistics(logprobs, entropy, logits[:, 1:] - logits[:, :1] + logprobs[:, None])


def of_logits(logits: Tensor, targets: Tensor, candidates: Tensor | None, temperature: float) -> Statistics:
    """The same of logits `[W, V]` that are there already."""
    distribution = log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, dim=-1)
    return Statistics(
        distribution.gather(-1, targets[:, None]).squeeze(-1),
        -(distribution.exp() * distribution).sum(-1),
        None if candidates is None else distribution.gather(-1, candidates),
    )


def _in_chunks(
    states: Tensor, rule: LogitsRule, targets: Tensor, candidates: Tensor | None, temperature: float, within: Within
) -> Statistics:
    """Through the language-model head's module, whose logits are computed again for the gradients."""

    def chunk(hidden: Tensor, own: Tensor, others: Tensor | None) -> Statistics:
        with within():
            logits = rule.lm_head(rule.readable(hidden)).float()
        return of_logits(_ruled(logits, rule), own, others, temperature)

    count = max(1, _LOGITS_BYTES // (4 * rule.vocabulary))
    parts = [
        checkpoint(
            chunk,
            states[start : start + count],
            targets[start : start + count],
            None if candidates is None else candidates[start : start + count],
            use_reentrant=False,
        )
        for start in range(0, max(len(states), 1), count)
    ]
    return Statistics(
        torch.cat([part.logprobs for part in parts]),
        torch.cat([part.entropy for part in parts]),
        None
        if candidates is None
        else torch.cat([part.candidate_logprobs for part in parts if part.candidate_logprobs is not None]),
    )


def _ruled(logits: Tensor, rule: LogitsRule) -> Tensor:
    """Logits, scaled and capped."""
    logits = logits * rule.scale
    return logits if rule.softcap is None else torch.tanh(logits / rule.softcap) * rule.softcap
