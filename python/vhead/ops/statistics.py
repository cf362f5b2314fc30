"""Log-probabilities and entropies of tokens from hidden states, without their logits.

Products of hidden states and the lm_head's weight are computed a tile at a time, by torch's own matrix
multiplication, into one small buffer; the extension reads each tile once, while it is in the cache. The vocabulary is
the outer loop, so that the weight is read once. Backward computes the tiles again.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn.functional import linear

from vhead import _native
from vhead.ops.arguments import bare, check_device, check_kind
from vhead.ops.dispatch import SETTINGS, forward_mode, in_functorch, intercepted, is_plain, is_traced, own_precision

Gradients: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]

# Columns of a tile: whole blocks of the kernel's, and one multiplication's worth of work with few rows.
_TILE_COLUMNS = 1024
# Most rows of a tile: with the columns, 5 MiB of products.
_TILE_ROWS = 1280
# Bytes of hidden states that are upcast at once; each such chunk of rows reads the weight anew.
_UPCAST_BYTES = 16 << 20
# Bytes of logits that are there at once where there is no kernel.
_LOGITS_BYTES = 32 << 20
# Stands for minus infinity where a product with a probability of zero has to be zero.
_NEVER = -200.0


class TokenStatistics(NamedTuple):
    """What a distribution over the vocabulary says about a token, `[N]` each.

    Attributes:
        logprobs: Log-probability of the target.
        entropy: Entropy of the distribution, in nats.
        log_sum_p_squared: Logarithm of the sum of squared probabilities (minus the Rényi entropy of order 2). No
            gradient flows through it.
        is_top1: Whether the target is the most probable token, the first one where several are.
    """

    logprobs: Tensor
    entropy: Tensor
    log_sum_p_squared: Tensor
    is_top1: Tensor


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
    statistics = token_statistics(
        hidden,
        lm_head_weight,
        targets,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        scale=scale,
        batch_invariant=batch_invariant,
    )
    return statistics.logprobs, statistics.entropy


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
) -> TokenStatistics:
    """What the distributions `softmax(logits / temperature)` say about the targets, without ever holding the logits.

    `logits = softcap * tanh(scale * (hidden @ lm_head_weight.T + bias) / softcap)`, the cap only where there is one.
    Products are accumulated in float32 from any dtype. The memory needed beside the results is some 10 MiB, for half
    precisions 16 MiB and `4 KiB * H` more. Log-probabilities and entropies are differentiable in hidden states, weight
    and bias.

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

    Returns:
        Float32 `[N]` (float64 as above); `is_top1` is bool. A row whose logits hold NaN or +infinity gives NaN.

    Raises:
        TypeError: An argument is no tensor or has a dtype that is not listed.
        ValueError: Shapes do not fit, devices differ, a target is outside the vocabulary, or a number out of range.
    """
    arguments = _checked(hidden, lm_head_weight, targets, bias, temperature, softcap, scale, batch_invariant)
    if forward_mode() or in_functorch() or not all(_is_known(x) for x in arguments if isinstance(x, Tensor)):
        return _twin(*arguments[:-1])
    if is_dynamo_compiling() or intercepted():
        return TokenStatistics(*_OPERATOR(*arguments)[:4])
    if torch.is_grad_enabled() and any(x.requires_grad for x in arguments if isinstance(x, Tensor)):
        return TokenStatistics(*_Differentiable.apply(*arguments)[:4])
    return TokenStatistics(*_forward(*arguments)[:4])


def token_statistics_plain(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float | None = None,
) -> TokenStatistics:
    """`token_statistics` in plain torch operations, all logits at once; here every floating output has a gradient."""
    return _twin(*_checked(hidden, lm_head_weight, targets, bias, temperature, softcap, scale, False)[:-1])  # noqa: FBT003


def statistics_of_logits(logits: Tensor, targets: Tensor, *, temperature: float = 1.0) -> TokenStatistics:
    """`token_statistics` where the logits are there already, in one pass over them; they stay as they are.

    Args:
        logits: `[N, V]`, any floating dtype; half precisions are upcast some rows at a time. Where they require a
            gradient, and on devices without a kernel, plain torch operations do the work.
        targets: Token ids `[N]`, int64 or int32, each in [0, V).
        temperature: Above zero.

    Returns:
        As `token_statistics`.

    Raises:
        TypeError: An argument is no tensor or has a dtype that is not listed.
        ValueError: Shapes do not fit, devices differ, a target is outside the vocabulary, or a number out of range.
    """
    check_kind("logits", logits)
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits: expected [N, V] with V >= 1, got {list(logits.shape)}")
    _check_targets(targets, logits)
    _check_positive("temperature", temperature)
    traced = is_dynamo_compiling() or intercepted() or not (is_plain(logits) and is_plain(targets))
    if traced or (torch.is_grad_enabled() and logits.requires_grad) or not (logits.is_cpu and _is_native(logits)):
        return _statistics(logits.to(_precision(logits, logits)) / temperature, targets.long())
    statistics = _native.LogitStatistics(targets.long(), logits.shape[1], None, 1.0, None, temperature)
    logits = logits.detach().resolve_neg()
    for rows in _row_chunks(logits, logits.t()):
        statistics.fold(logits[rows].float(), rows.start, 0)
    logprobs, entropy, log_sum_p_squared, is_top1, _, _ = statistics.finish()
    return TokenStatistics(logprobs, entropy, log_sum_p_squared, is_top1.bool())


# --- Arguments -------------------------------------------------------------------------------------------------------


def _checked(  # noqa: PLR0917, the operator's schema
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    scale: float | None,
    batch_invariant: bool,  # noqa: FBT001
) -> tuple[Any, ...]:
    """The operator's arguments."""
    check_kind("hidden", hidden)
    check_kind("lm_head_weight", weight)
    if hidden.dim() != 2 or hidden.shape[1] < 1:
        raise ValueError(f"hidden: expected [N, H] with H >= 1, got {list(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] < 1:
        raise ValueError(f"lm_head_weight: expected [V, {hidden.shape[1]}], got {list(weight.shape)}")
    check_device("lm_head_weight", weight, hidden)
    _check_targets(targets, hidden)
    if bias is not None:
        check_kind("bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias: expected [{weight.shape[0]}], got {list(bias.shape)}")
        check_device("bias", bias, hidden)
    _check_positive("temperature", temperature)
    if softcap is not None:
        _check_positive("softcap", softcap)
    factor = 1.0 if scale is None else float(scale)
    if not -math.inf < factor < math.inf:
        raise ValueError(f"scale: expected a finite number, got {scale}")
    if batch_invariant and not (hidden.is_cpu and _is_native(hidden, weight, bias)):
        got = f"{bare(_precision(hidden, weight))} on {hidden.device.type}"
        raise ValueError(f"batch_invariant: expected float32, bfloat16 or float16 on cpu, got {got}")
    return hidden, weight, targets.long(), bias, float(temperature), softcap, factor, batch_invariant


def _check_targets(targets: Tensor, hidden: Tensor) -> None:
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets: expected a torch.Tensor, got {type(targets).__qualname__}")
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"targets: expected int64 or int32, got {bare(targets.dtype)}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets: expected [{hidden.shape[0]}], got {list(targets.shape)}")
    check_device("targets", targets, hidden)


def _check_positive(name: str, number: float) -> None:
    if not 0.0 < number < math.inf:  # which Dynamo can trace, as it cannot isfinite
        raise ValueError(f"{name}: expected a finite number above zero, got {number}")


def _is_known(tensor: Tensor) -> bool:
    """Whether the operator can take a tensor: plain ones, and those of tracers, which know every operation."""
    return is_plain(tensor) or is_traced(tensor)


def _is_native(*tensors: Tensor | None) -> bool:
    return not SETTINGS.plain_torch and all(t is None or t.dtype != torch.float64 for t in tensors)


# --- Forward ---------------------------------------------------------------------------------------------------------


def _forward(  # noqa: PLR0917, the operator's schema
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    scale: float,
    batch_invariant: bool,  # noqa: FBT001
) -> tuple[Tensor, ...]:
    """The four statistics, and for backward the largest logits and the logarithms of the sums relative to them."""
    if not (hidden.is_cpu and _is_native(hidden, weight, bias)):
        return _forward_in_rows(hidden, weight, targets, bias, temperature, softcap, scale)
    statistics = _native.LogitStatistics(targets, weight.shape[0], bias, scale, softcap, temperature)
    with torch.no_grad(), own_precision(hidden):
        for tile in _tiles(hidden.resolve_neg(), weight.resolve_neg(), batch_invariant=batch_invariant):
            statistics.fold(tile.products, tile.row, tile.column)
    logprobs, entropy, log_sum_p_squared, is_top1, peak, log_sum = statistics.finish()
    return logprobs, entropy, log_sum_p_squared, is_top1.bool(), peak, log_sum


class _Tile(NamedTuple):
    """Products `[n, v]` of rows and tokens, what they are products of (float32), and where they start."""

    products: Tensor
    hidden: Tensor
    weight: Tensor
    row: int
    column: int


def _tiles(hidden: Tensor, weight: Tensor, *, batch_invariant: bool) -> Iterator[_Tile]:
    """Every tile; each is overwritten by the next."""
    rows = len(hidden) if hidden.dtype == torch.float32 else max(1, _UPCAST_BYTES // (4 * hidden.shape[1]))
    columns = min(_TILE_COLUMNS, len(weight))
    half = weight.dtype != torch.float32
    upcast = torch.empty((columns, weight.shape[1]), dtype=torch.float32) if half else None
    products = torch.empty(min(_tile_rows(min(rows, len(hidden))), len(hidden)) * columns)
    for first in range(0, len(hidden), max(rows, 1)):
        chunk = hidden[first : first + rows].float()
        block = _tile_rows(len(chunk))
        for column in range(0, len(weight), columns):
            part = weight[column : column + columns]
            part = part if upcast is None else upcast[: len(part)].copy_(part)
            for row in range(0, len(chunk), block):
                x = chunk[row : row + block]
                yield _Tile(_multiply(x, part, products, batch_invariant), x, part, first + row, column)


def _tile_rows(rows: int) -> int:
    """Rows of each tile: about as many in each."""
    return math.ceil(rows / math.ceil(rows / _TILE_ROWS)) if rows else 1


def _multiply(hidden: Tensor, weight: Tensor, products: Tensor, batch_invariant: bool) -> Tensor:  # noqa: FBT001
    size = (len(hidden), len(weight))
    products = products[: size[0] * size[1]].view(size)
    if not batch_invariant:
        return torch.mm(hidden, weight.t(), out=products)
    _native.linear(hidden, weight, None, 1.0, relu=False, out=products)
    return products


def _forward_in_rows(  # noqa: PLR0917, the operator's schema
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    scale: float,
) -> tuple[Tensor, ...]:
    """In plain torch operations, so many rows at a time that their logits are few."""
    _check_range(targets, len(weight))
    parts = []
    with torch.no_grad():
        for rows in _row_chunks(hidden, weight):
            z = _logits(hidden[rows], weight, bias, temperature, softcap, scale)
            peak = z.amax(-1) if z.numel() else z.new_empty(len(z))
            statistics = _statistics(z, targets[rows])
            parts.append((*statistics, peak, torch.logsumexp(z, -1) - peak))
    if parts:
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))
    empty = hidden.new_empty(0, dtype=_precision(hidden, weight))
    return empty, empty.clone(), empty.clone(), empty.bool(), empty.clone(), empty.clone()


def _check_range(targets: Tensor, vocabulary: int) -> None:
    outside = ((targets < 0) | (targets >= vocabulary)).nonzero()
    if len(outside):
        row = int(outside[0])
        raise ValueError(f"targets: expected token ids below {vocabulary}, got {int(targets[row])} in row {row}")


def _row_chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    rows = max(1, _LOGITS_BYTES // (4 * len(weight)))
    return (slice(start, start + rows) for start in range(0, len(hidden), rows))


def _precision(hidden: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


def _logits(  # noqa: PLR0917, the operator's schema
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, softcap: float | None, scale: float
) -> Tensor:
    """Logits over temperature, `[N, V]`."""
    dtype = _precision(hidden, weight)
    with own_precision(hidden):
        logits = linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)) * scale
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        return logits / temperature


def _statistics(z: Tensor, targets: Tensor) -> TokenStatistics:
    logp = z.log_softmax(-1)
    clamped = logp.clamp(min=_NEVER)
    p = logp.exp()
    return TokenStatistics(
        logp.gather(-1, targets[:, None]).squeeze(-1),
        -(p * clamped).sum(-1),
        torch.logsumexp(2 * logp, -1),
        (z.argmax(-1) == targets) & ~logp.isnan().any(-1),
    )


def _twin(  # noqa: PLR0917, the operator's schema
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    scale: float,
) -> TokenStatistics:
    return _statistics(_logits(hidden, weight, bias, temperature, softcap, scale), targets)


# --- Backward --------------------------------------------------------------------------------------------------------


def _backward(  # noqa: PLR0917, the operator's schema
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    peak: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    temperature: float,
    softcap: float | None,
    scale: float,
    needed: tuple[bool, ...],
) -> Gradients:
    """Gradients for (hidden, weight, bias) where needed, from tiles that are computed again."""
    rest = (temperature, softcap, scale, needed)
    if not (hidden.is_cpu and _is_native(hidden, weight, bias)):
        statistics = (peak + log_sum, entropy)
        return _backward_in_rows(grad_logprobs, grad_entropy, hidden, weight, targets, bias, statistics, *rest)
    of = _native.LogitGradients(
        targets,
        weight.shape[0],
        bias,
        scale,
        softcap,
        temperature,
        (peak, log_sum, entropy),
        (grad_logprobs, grad_entropy),
    )
    with torch.no_grad(), own_precision(hidden):
        sums = _Sums(hidden, weight, needed)
        for tile in _tiles(hidden.resolve_neg(), weight.resolve_neg(), batch_invariant=False):
            of.differentiate(tile.products, tile.row, tile.column)
            sums.add(tile)
        return sums.gradients()


class _Sums:
    """Gradients, summed over tiles."""

    def __init__(self, hidden: Tensor, weight: Tensor, needed: tuple[bool, ...]) -> None:
        dtype = _precision(hidden, weight)
        shapes, self._dtypes = (hidden.shape, weight.shape, weight.shape[:1]), (hidden.dtype, weight.dtype, dtype)
        self._sums = [
            hidden.new_zeros(shape, dtype=dtype) if need else None for shape, need in zip(shapes, needed, strict=True)
        ]

    def add(self, tile: _Tile) -> None:
        """Adds a tile whose products are gradients by now."""
        of_hidden, of_weight, of_bias = self._sums
        rows, columns = (slice(start, start + n) for start, n in zip(tile[3:], tile.products.shape, strict=True))
        if of_hidden is not None:
            of_hidden[rows].addmm_(tile.products, tile.weight)
        if of_weight is not None:
            of_weight[columns].addmm_(tile.products.t(), tile.hidden)
        if of_bias is not None:
            of_bias[columns] += tile.products.sum(0)

    def gradients(self) -> Gradients:
        """In the dtypes of what they are gradients of; the bias's in the sums' own."""
        cast_ = (None if s is None else s.to(dtype) for s, dtype in zip(self._sums, self._dtypes, strict=True))
        return cast("Gradients", tuple(cast_))


def _backward_in_rows(  # noqa: PLR0917, the operator's schema
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    statistics: tuple[Tensor, Tensor],
    temperature: float,
    softcap: float | None,
    scale: float,
    needed: tuple[bool, ...],
) -> Gradients:
    """The same in plain torch operations."""
    log_total, entropy = statistics
    with torch.no_grad(), own_precision(hidden):
        sums, upcast = _Sums(hidden, weight, needed), weight.to(_precision(hidden, weight))
        for rows in _row_chunks(hidden, weight):
            z = _logits(hidden[rows], weight, bias, temperature, softcap, scale)
            logp = (z - log_total[rows, None]).clamp(min=_NEVER)
            pull = grad_entropy[rows, None] * (logp + entropy[rows, None]) + grad_logprobs[rows, None]
            of_z = logp.exp().mul_(-pull)
            of_z.scatter_add_(-1, targets[rows, None], grad_logprobs[rows, None].to(of_z.dtype))
            slope = scale / temperature
            of_products = of_z * (slope if softcap is None else slope * (1 - (z * temperature / softcap) ** 2))
            sums.add(_Tile(of_products, hidden[rows].to(upcast.dtype), upcast, rows.start, 0))
        return sums.gradients()


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ANN401, torch's protocol
    hidden, weight, targets, bias, *ctx.numbers, _ = inputs
    _, entropy, log_sum_p_squared, is_top1, peak, log_sum = output
    ctx.mark_non_differentiable(log_sum_p_squared, is_top1, peak, log_sum)
    ctx.save_for_backward(hidden, weight, targets, bias, peak, log_sum, entropy)


def _differentiate(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor, *_: Any) -> tuple[Any, ...]:  # noqa: ANN401
    tensors = ctx.saved_tensors
    needed = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
    arguments = (grad_logprobs, grad_entropy, *tensors, *ctx.numbers, needed)
    if torch.is_grad_enabled():
        gradients = _again(*arguments)
    elif is_dynamo_compiling() or intercepted() or not all(is_plain(t) for t in arguments if isinstance(t, Tensor)):
        every = _BACKWARD_OPERATOR(*arguments)
        gradients = cast("Gradients", tuple(g if n else None for g, n in zip(every, needed, strict=True)))
    else:
        gradients = _backward(*arguments)
    of_hidden, of_weight, of_bias = gradients
    return of_hidden, of_weight, None, of_bias, None, None, None, None


def _again(*arguments: Any) -> Gradients:  # noqa: ANN401, the backward operator's arguments
    """Gradients by the twin, as a graph of their own: somebody differentiates them once more."""
    grad_logprobs, grad_entropy, hidden, weight, targets, bias, _, _, _, *numbers, needed = arguments
    with torch.enable_grad():
        logprobs, entropy, _, _ = _twin(hidden, weight, targets, bias, *numbers)
        inputs = [x for x, need in zip((hidden, weight, bias), needed, strict=True) if need]
        found = iter(torch.autograd.grad((logprobs, entropy), inputs, (grad_logprobs, grad_entropy), create_graph=True))
    return cast("Gradients", tuple(next(found) if need else None for need in needed))


class _Differentiable(torch.autograd.Function):
    """Eager autograd."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:  # noqa: ANN401, torch's protocol
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output

    backward = staticmethod(_differentiate)


# --- The dispatcher --------------------------------------------------------------------------------------------------


def _fake(hidden: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, ...]:  # noqa: ANN401, the operator's schema
    dtype = _precision(hidden, weight)
    kinds = (dtype, dtype, dtype, torch.bool, dtype, dtype)
    return tuple(hidden.new_empty(hidden.shape[:1], dtype=kind) for kind in kinds)


def _whole_backward(*arguments: Any) -> tuple[Tensor, ...]:  # noqa: ANN401, the operator's schema
    """Gradients as an operator must return them: an empty tensor where one is not needed."""
    hidden = arguments[2]
    return tuple(hidden.new_empty(0) if g is None else g for g in _backward(*arguments))


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:  # noqa: ANN401, the operator's schema
    hidden, weight, needed = arguments[2], arguments[3], arguments[-1]
    of_bias = hidden.new_empty(weight.shape[:1], dtype=_precision(hidden, weight))
    whole = (hidden.new_empty(hidden.shape), weight.new_empty(weight.shape), of_bias)
    return tuple(w if need else hidden.new_empty(0) for w, need in zip(whole, needed, strict=True))


def _register() -> tuple[Any, Any, Any]:
    library: Any = torch.library.Library("vhead", "FRAGMENT")  # type: ignore[no-untyped-call]
    tags = (torch.Tag.pt2_compliant_tag,)
    tensors = "Tensor hidden, Tensor weight, Tensor targets, Tensor? bias"
    numbers = "float temperature, float? softcap, float scale"
    library.define(
        f"token_statistics({tensors}, {numbers}, bool batch_invariant) -> ({', '.join(['Tensor'] * 6)})", tags=tags
    )
    tensors = f"Tensor grad_logprobs, Tensor grad_entropy, {tensors}, Tensor peak, Tensor log_sum, Tensor entropy"
    library.define(
        f"token_statistics_backward({tensors}, {numbers}, bool[3] needed) -> (Tensor, Tensor, Tensor)", tags=tags
    )
    library.impl("token_statistics", _forward, "CompositeExplicitAutograd")
    library.impl("token_statistics_backward", _whole_backward, "CompositeExplicitAutograd")
    name = "vhead::token_statistics"
    torch.library.register_fake(name, _fake, lib=library)
    torch.library.register_fake(f"{name}_backward", _fake_backward, lib=library)
    torch.library.register_autograd(name, _differentiate, setup_context=_save, lib=library)
    operators = torch.ops.vhead
    return library, operators.token_statistics.default, operators.token_statistics_backward.default


_LIBRARY, _OPERATOR, _BACKWARD_OPERATOR = _register()
