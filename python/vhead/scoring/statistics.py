"""Log-probabilities and entropies of tokens, without the logits of all of them."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vhead import ops
from vhead.backbone.placement import to_device
from vhead.heads import is_plain_linear
from vhead.scoring.logits import LogitsRule

_LOGITS_BYTES = 32 * 1024 * 1024
_FLOAT32_BYTES = 4
# exp of it is 0 in float32, so that it stands for minus infinity where a product with 0 has to be 0.
_NEVER = -200.0


def row_chunks(count: int, vocabulary: int) -> Iterator[slice]:
    """Slices of `count` rows such that each chunk's float32 logits take 32 MiB, or one row where that is more."""
    rows = max(1, _LOGITS_BYTES // (_FLOAT32_BYTES * vocabulary))
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))


def token_statistics(
    states: Tensor, rule: LogitsRule, targets: Tensor, *, temperature: float, entropy: bool
) -> dict[str, Tensor]:
    """Log-probability of each target, and the entropy of each distribution, in nats.

    Args:
        states: Hidden states `[N, H]`.
        rule: How the model makes logits of them.
        targets: Token ids `[N]`.
        temperature: The logits are divided by it.
        entropy: Whether the entropies are wanted too.

    Returns:
        `logprobs` `[N]`, and `entropy` `[N]` where it is wanted, float32.
    """
    output = rule.lm_head
    if not is_plain_linear(output) or output.weight.device != states.device:
        return _in_chunks(lambda rows: rule(states[rows]), targets, rule.vocabulary, temperature, entropy=entropy)
    logprobs, entropies = ops.token_logprobs(
        rule.readable(states),
        output.weight,
        to_device(targets, states.device),
        bias=output.bias,
        temperature=temperature,
        softcap=rule.softcap,
        scale=rule.scale,
    )
    return _fields(logprobs.float(), entropies.float() if entropy else None)


def statistics_of_logits(
    logits: Tensor, rows: Tensor, targets: Tensor, *, temperature: float, entropy: bool
) -> dict[str, Tensor]:
    """The same for some rows `[N]` of logits `[M, V]` that are there already; these stay as they are."""
    return _in_chunks(
        lambda chunk: logits[rows[chunk]].float(), targets, logits.shape[-1], temperature, entropy=entropy
    )


def _in_chunks(
    logits_of: Callable[[slice], Tensor], targets: Tensor, vocabulary: int, temperature: float, *, entropy: bool
) -> dict[str, Tensor]:
    logprobs, entropies = [], []
    for rows in row_chunks(len(targets), vocabulary):
        logits = logits_of(rows)
        logprob, of_rows = _statistics(logits, to_device(targets[rows], logits.device), temperature, entropy=entropy)
        logprobs.append(logprob)
        entropies.append(of_rows)
    return _fields(
        torch.cat(logprobs), torch.cat([part for part in entropies if part is not None]) if entropy else None
    )


def _fields(logprobs: Tensor, entropy: Tensor | None) -> dict[str, Tensor]:
    return {"logprobs": logprobs} | ({} if entropy is None else {"entropy": entropy})


def _statistics(logits: Tensor, targets: Tensor, temperature: float, *, entropy: bool) -> tuple[Tensor, Tensor | None]:
    if temperature != 1.0:
        logits /= temperature
    logits -= logits.amax(dim=-1, keepdim=True)
    target = logits.gather(-1, targets[:, None]).squeeze(-1)
    if not entropy:
        return target - logits.exp_().sum(dim=-1).log(), None
    weights = logits.exp()
    total = weights.sum(dim=-1)
    log_total = total.log()
    mean = weights.mul_(logits.clamp_(min=_NEVER)).sum(dim=-1) / total
    return target - log_total, log_total - mean
