"""The public functions, and which way a call of them takes."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from vhead.ops.arguments import check_kind
from vhead.ops.dispatch import forward_mode, in_functorch, intercepted, is_plain, is_traced
from vhead.ops.token_statistics.arguments import (
    Inputs,
    Selection,
    check_targets,
    checked,
    checked_rule,
    checked_selection,
    precision,
)
from vhead.ops.token_statistics.kernels import TileStatistics, tiling_for
from vhead.ops.token_statistics.operator import OPERATOR, Accumulating, Differentiable, forward
from vhead.ops.token_statistics.results import TokenStatistics
from vhead.ops.token_statistics.tiles import over_temperature
from vhead.ops.token_statistics.twin import of_logits, row_chunks, twin


def token_logprobs(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float | None = None,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each distribution: `token_statistics`, the first two of them."""
    inputs = checked(hidden, lm_head_weight, targets, bias, temperature, softcap, scale, batch_invariant, None, 0)
    return _compute(inputs)[:2]


def accumulating_token_logprobs(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`token_logprobs`, whose backward adds the weight's gradient to the weight's `.grad` by itself, part by part.

    The weight is a parameter. Whatever asks autograd for its gradient gets none.
    """
    inputs = checked(hidden, lm_head_weight, targets, bias, temperature, softcap, scale, False, None, 0)  # noqa: FBT003
    logprobs, entropy, *_ = Accumulating.apply(*inputs)
    return logprobs, entropy


def token_statistics(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float | None = None,
    batch_invariant: bool = False,
    candidates: Tensor | None = None,
    top: int = 0,
) -> TokenStatistics:
    """What the distributions `softmax(logits / temperature)` say about the targets, without ever holding the logits.

    `logits = softcap * tanh(scale * (hidden @ lm_head_weight.T + bias) / softcap)`, the cap only where there is one.
    Products are accumulated in float32 from any dtype. The memory needed beside the results is some 10 MiB on a CPU,
    for half precisions 16 MiB and `4 KiB * H` more, and 64 MiB on a CUDA device. Log-probabilities and entropies are
    differentiable in hidden states, weight and bias; gradients are summed in float32, which takes another `[V, H]`.

    Candidates and the `top` likeliest tokens come from the same pass, and have no gradient, whatever needs one. While
    the call lasts they take 24 bytes a candidate and 16 a token of `top` beside the results on a CPU, and 4 and 12 on a
    CUDA device.

    A row's statistics are a function of its logits alone. Its logits come from torch's matrix multiplication, which may
    give other last bits with another number of rows or threads; with `batch_invariant` they come from this package's
    own, in the value head's order of additions, and depend on the row and the weight alone.

    Args:
        hidden: `[N, H]`, float32, bfloat16 or float16; float64 computes in float64, in plain torch.
        lm_head_weight: `[V, H]`.
        targets: Token ids `[N]`, int64 or int32, each in [0, V).
        bias: `[V]`.
        temperature: Above zero.
        softcap: Above zero, as Gemma 2's `final_logit_softcapping`.
        scale: As Cohere's `logit_scale`, or the inverse of Granite's `logits_scaling`; None is 1.
        batch_invariant: Whether a row's result must not depend on the other rows, bit for bit. CPU only.
        candidates: Further token ids `[N, M]`, int64 or int32, each in [0, V), in any order and also more than once.
        top: How many of the likeliest tokens are wanted: at most 128, and at most V.

    Returns:
        Float32 `[N]` (float64 as above); `is_top1` is bool. With candidates also `candidate_logprobs` `[N, M]`, with
        `top` also `top_tokens` and `top_logprobs`, `[N, top]`. In a row whose logits hold NaN or +infinity, all of it
        is NaN, and `top_tokens` are -1.

    Raises:
        TypeError: An argument is no tensor or has a dtype that is not listed.
        ValueError: Shapes do not fit, devices differ, a token is outside the vocabulary, or a number out of range. On
            a CUDA device a token outside the vocabulary is a device-side assertion instead, as in torch's indexing.
    """
    numbers = (temperature, softcap, scale, batch_invariant)
    return _compute(checked(hidden, lm_head_weight, targets, bias, *numbers, candidates, top))


def token_statistics_plain(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float | None = None,
    candidates: Tensor | None = None,
    top: int = 0,
) -> TokenStatistics:
    """`token_statistics` in plain torch operations, all logits at once; here every floating `[N]` has a gradient."""
    numbers = (temperature, softcap, scale, False)
    return twin(checked(hidden, lm_head_weight, targets, bias, *numbers, candidates, top))


def _compute(inputs: Inputs) -> TokenStatistics:
    """The way that fits."""
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    # Other subclasses know torch's own operations; the tracers' kinds know every operator.
    if forward_mode() or in_functorch() or not all(is_plain(x) or is_traced(x) for x in tensors):
        return twin(inputs)
    if is_dynamo_compiling() or intercepted():
        return _named(OPERATOR(*inputs), inputs.selection)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return _named(Differentiable.apply(*inputs), inputs.selection)
    return _named(forward(*inputs), inputs.selection)


def _named(outputs: Sequence[Tensor], selection: Selection) -> TokenStatistics:
    """The operator's results, without what was not asked for."""
    logprobs, entropy, log_sum_p_squared, is_top1, _, _, of_candidates, tokens, of_tokens = outputs
    return TokenStatistics(
        logprobs,
        entropy,
        log_sum_p_squared,
        is_top1,
        None if selection.candidates is None else of_candidates,
        tokens if selection.top else None,
        of_tokens if selection.top else None,
    )


def statistics_of_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float | None = None,
    candidates: Tensor | None = None,
    top: int = 0,
) -> TokenStatistics:
    """`token_statistics` where the logits are there already, in one pass over them; they stay as they are.

    Args:
        logits: `[N, V]`, any floating dtype; half precisions are upcast some rows at a time. Where they require a
            gradient, and on devices without a kernel, plain torch operations do the work.
        targets: Token ids `[N]`, int64 or int32, each in [0, V).
        temperature: Above zero.
        softcap: As `token_statistics`, where the logits have not been capped yet.
        scale: Likewise.
        candidates: As `token_statistics`.
        top: As `token_statistics`.

    Returns:
        As `token_statistics`.

    Raises:
        TypeError: An argument is no tensor or has a dtype that is not listed.
        ValueError: Shapes do not fit, devices differ, a token is outside the vocabulary, or a number out of range.
    """
    check_kind("logits", logits)
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits: expected [N, V] with V >= 1, got {list(logits.shape)}")
    check_targets(targets, logits)
    rule = checked_rule(temperature, softcap, scale)
    selection = checked_selection(candidates, top, logits, logits.shape[1])
    given = [x for x in (logits, targets, candidates) if x is not None]
    traced = is_dynamo_compiling() or intercepted() or not all(is_plain(x) for x in given)
    tiling = None if traced or (torch.is_grad_enabled() and logits.requires_grad) else tiling_for(logits)
    if tiling is None:
        return of_logits(over_temperature(logits.to(precision(logits, logits)), rule), targets.long(), selection)
    logits = logits.detach().resolve_neg()
    known = TileStatistics(tiling, targets.long(), logits.shape[1], None, rule, selection)
    for rows in row_chunks(*logits.shape):
        known.fold(logits[rows].float(), rows.start, 0)
    (logprobs, entropy, log_sum_p_squared, is_top1, _, _), selected = known.finish()
    return TokenStatistics(logprobs, entropy, log_sum_p_squared, is_top1.bool(), *selected)


def statistics_in_chunks(
    logits_of: Callable[[slice], Tensor],
    targets: Tensor,
    vocabulary: int,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float | None = None,
    candidates: Tensor | None = None,
    top: int = 0,
) -> TokenStatistics:
    """`statistics_of_logits` where logits are made some rows at a time, such that 32 MiB of them are there at once.

    Args:
        logits_of: Makes the logits `[n, V]` of a slice of the `N` rows.
        targets: Token ids `[N]`, int64 or int32, each in [0, V), on any device: they follow the logits.
        vocabulary: `V`.
        temperature: As `statistics_of_logits`.
        softcap: As `statistics_of_logits`.
        scale: As `statistics_of_logits`.
        candidates: As `token_statistics`, on any device.
        top: As `statistics_of_logits`.

    Returns:
        As `token_statistics`, where the logits are.

    Raises:
        TypeError: As `statistics_of_logits`.
        ValueError: As `statistics_of_logits`.
    """

    def chunk(rows: slice) -> TokenStatistics:
        logits = logits_of(rows)
        here = targets[rows].to(logits.device)
        of_rows = None if candidates is None else candidates[rows].to(logits.device)
        return statistics_of_logits(
            logits, here, temperature=temperature, softcap=softcap, scale=scale, candidates=of_rows, top=top
        )

    if candidates is not None and len(candidates) != len(targets):
        raise ValueError(f"candidates: expected [{len(targets)}, M], got {list(candidates.shape)}")

    # Without rows the logits still say where the results are, and of which dtype.
    parts = [chunk(rows) for rows in row_chunks(len(targets), vocabulary)] or [chunk(slice(0, 0))]
    whole = (None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True))
    return TokenStatistics(*cast("Any", whole))
