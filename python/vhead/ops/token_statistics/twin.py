"""The same in plain torch operations: the twin, and the way of devices and dtypes without a kernel."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from vhead.ops.dispatch import own_precision
from vhead.ops.token_statistics.arguments import BackwardInputs, Inputs, Selection, check_range, precision
from vhead.ops.token_statistics.results import Gradients, Selected, TokenStatistics
from vhead.ops.token_statistics.selection import selected_of
from vhead.ops.token_statistics.tiles import Sums, Tile, over_temperature

# Bytes of logits that are there at once.
_LOGITS_BYTES = 32 << 20
# Stands for minus infinity where a product with a probability of zero has to be zero.
_NEVER = -200.0


def twin(inputs: Inputs) -> TokenStatistics:
    """All logits at once; every floating `[N]` has a gradient."""
    return of_logits(_logits(inputs, inputs.hidden), inputs.targets, inputs.selection)


def of_logits(z: Tensor, targets: Tensor, selection: Selection) -> TokenStatistics:
    """Statistics of logits over temperature, `[N, V]`."""
    logp = z.log_softmax(-1)
    clamped = logp.clamp(min=_NEVER)
    p = logp.exp()
    return TokenStatistics(
        logp.gather(-1, targets[:, None]).squeeze(-1),
        -(p * clamped).sum(-1),
        torch.logsumexp(2 * logp, -1),
        (z.argmax(-1) == targets) & ~logp.isnan().any(-1),
        *selected_of(z, logp, selection),
    )


def row_chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    """Chunks of rows whose logits are few."""
    size = max(1, _LOGITS_BYTES // (4 * vocabulary))
    return (slice(start, start + size) for start in range(0, rows, size))


def forward_in_rows(inputs: Inputs) -> tuple[Tensor, ...]:
    """The operator's results, so many rows at a time that their logits are few."""
    hidden, weight, targets = inputs[:3]
    check_range(targets, len(weight), inputs.candidates)
    parts = []
    with torch.no_grad():
        for rows in row_chunks(len(hidden), len(weight)):
            z = _logits(inputs, hidden[rows])
            peak = z.amax(-1) if z.numel() else z.new_empty(len(z))
            found = of_logits(z, targets[rows], inputs.selection.of_rows(rows))
            log_sum = torch.logsumexp(z, -1) - peak
            parts.append((*found[:4], peak, log_sum, *Selected(*found[4:]).whole(len(z), z)))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True)) if parts else empty_results(*inputs)


def empty_results(hidden: Tensor, weight: Tensor, *numbers: Any) -> tuple[Tensor, ...]:
    """Tensors of the shapes and dtypes of the operator's results, from its arguments."""
    *_, candidates, top = numbers
    rows, dtype = hidden.shape[0], precision(hidden, weight)
    of_rows = (hidden.new_empty(rows, dtype=kind) for kind in (dtype, dtype, dtype, torch.bool, dtype, dtype))
    columns = ((0 if candidates is None else candidates.shape[1], dtype), (top, torch.int64), (top, dtype))
    return (*of_rows, *(hidden.new_empty((rows, width), dtype=kind) for width, kind in columns))


def backward_in_rows(inputs: BackwardInputs, into: Tensor | None = None) -> Gradients:
    """The backward operator's results in the same way; with `into`, the weight's gradient is added there."""
    grad_logprobs, grad_entropy, hidden, weight, targets, _, peak, log_sum, entropy, *_ = inputs
    scale, softcap, temperature = inputs.forward.rule
    with torch.no_grad(), own_precision(hidden):
        sums, upcast = Sums(inputs, into=into), weight.to(precision(hidden, weight))
        for rows in row_chunks(len(hidden), len(weight)):
            z = _logits(inputs.forward, hidden[rows])
            logp = (z - (peak + log_sum)[rows, None]).clamp(min=_NEVER)
            pull = grad_entropy[rows, None] * (logp + entropy[rows, None]) + grad_logprobs[rows, None]
            grad_z = logp.exp().mul_(-pull)
            grad_z.scatter_add_(-1, targets[rows, None], grad_logprobs[rows, None].to(grad_z.dtype))
            slope = scale / temperature
            grad_products = grad_z * (slope if softcap is None else slope * (1 - (z * temperature / softcap) ** 2))
            sums.add(Tile(grad_products, hidden[rows].to(upcast.dtype), upcast, rows.start, 0))
        return sums.gradients()


def backward_again(inputs: BackwardInputs) -> Gradients:
    """Gradients by the twin, as a graph of their own: somebody differentiates them once more."""
    with torch.enable_grad():
        logprobs, entropy = twin(inputs.forward)[:2]
        leaves = (inputs.hidden, inputs.weight, inputs.bias)
        asked = [x for x, need in zip(leaves, inputs.needed, strict=True) if need and x is not None]
        upstream = (inputs.grad_logprobs, inputs.grad_entropy)
        found = iter(torch.autograd.grad((logprobs, entropy), asked, upstream, create_graph=True))
    return cast("Gradients", tuple(next(found) if need else None for need in inputs.needed))


def _logits(inputs: Inputs, hidden: Tensor) -> Tensor:
    """Logits over temperature of some rows' hidden states."""
    weight, bias, dtype = inputs.weight, inputs.bias, precision(hidden, inputs.weight)
    with own_precision(hidden):
        products = linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
        return over_temperature(products, inputs.rule)
