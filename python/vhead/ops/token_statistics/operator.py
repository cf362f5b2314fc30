"""The operators: forward and backward with kernels or without, autograd, and registration with torch's dispatcher."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.compiler import is_dynamo_compiling

from vhead.ops.dispatch import intercepted, is_plain, own_precision
from vhead.ops.token_statistics.arguments import BackwardInputs, Inputs, precision
from vhead.ops.token_statistics.kernels import TileGradients, TileStatistics, tiling_for
from vhead.ops.token_statistics.results import Gradients
from vhead.ops.token_statistics.tiles import Sums
from vhead.ops.token_statistics.twin import backward_again, backward_in_rows, empty_results, forward_in_rows


def forward(*arguments: Any) -> tuple[Tensor, ...]:
    """The four statistics, the largest logits and the logarithms of the sums for backward, and what is selected.

    Of the last three, those that are not asked for are `[N, 0]`.
    """
    inputs = Inputs(*arguments)
    hidden, weight = inputs.hidden, inputs.weight
    tiling = tiling_for(hidden, weight, inputs.bias)
    if tiling is None:
        return forward_in_rows(inputs)
    known = TileStatistics(tiling, inputs.targets, len(weight), inputs.bias, inputs.rule, inputs.selection)
    with torch.no_grad(), own_precision(hidden):
        hidden, weight = hidden.resolve_neg(), weight.resolve_neg()
        if tiling.multiplies(hidden, weight) and not inputs.batch_invariant:
            known.fold_products(hidden, weight)
        else:
            plan = tiling.plan(hidden, weight, batch_invariant=inputs.batch_invariant)
            for tile in plan.tiles(hidden, weight):
                known.fold(tile.products, tile.row, tile.column)
        (logprobs, entropy, log_sum_p_squared, is_top1, peak, log_sum), selected = known.finish()
    further = selected.whole(len(hidden), logprobs)
    return logprobs, entropy, log_sum_p_squared, is_top1.bool(), peak, log_sum, *further


def backward(*arguments: Any, into: Tensor | None = None) -> Gradients:
    """Gradients for (hidden, weight, bias) where needed, from tiles that are computed again.

    With `into`, of the weight's dtype, the weight's gradient is added there, and not returned.
    """
    inputs = BackwardInputs(*arguments)
    hidden, weight = inputs.hidden, inputs.weight
    tiling = tiling_for(hidden, weight, inputs.bias)
    if tiling is None:
        return backward_in_rows(inputs, into)
    plan = tiling.plan(hidden, weight, batch_invariant=False)
    if plan.chunk is not None:
        # All rows in one chunk, so that all tiles of a token come together.
        plan = plan._replace(chunk=max(1, len(hidden)))
    gradients = TileGradients(inputs, plan)
    with torch.no_grad(), own_precision(hidden):
        # The bias's gradient, which few models need, is a sum over tiles that only torch's way has.
        if tiling.multiplies(hidden, weight) and not inputs.needed[2]:
            return gradients.of_products(hidden.resolve_neg(), weight.resolve_neg(), inputs.needed, into)
        sums = Sums(inputs, gradients.factor, into)
        for tile in plan.tiles(hidden.resolve_neg(), weight.resolve_neg()):
            sums.add(tile._replace(products=gradients.differentiate(tile.products, tile.row, tile.column)))
        return sums.gradients()


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, bias, *ctx.numbers, _, _, _ = inputs
    entropy, peak, log_sum = output[1], output[4], output[5]
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(hidden, weight, targets, bias, peak, log_sum, entropy)


def _differentiate(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor, *_: Any) -> tuple[Any, ...]:
    needed = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
    arguments = BackwardInputs._make((grad_logprobs, grad_entropy, *ctx.saved_tensors, *ctx.numbers, needed))
    if torch.is_grad_enabled():
        gradients = backward_again(arguments)
    elif is_dynamo_compiling() or intercepted() or not all(is_plain(t) for t in arguments if isinstance(t, Tensor)):
        every = _BACKWARD_OPERATOR(*arguments)
        gradients = cast("Gradients", tuple(g if n else None for g, n in zip(every, needed, strict=True)))
    else:
        gradients = backward(*arguments)
    grad_hidden, grad_weight, grad_bias = gradients
    return grad_hidden, grad_weight, None, grad_bias, *[None] * 6


class Differentiable(torch.autograd.Function):
    """Eager autograd."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        """The operator's results."""
        output = forward(*inputs)
        _save(ctx, inputs, output)
        return output

    backward = staticmethod(_differentiate)


class Accumulating(torch.autograd.Function):
    """Eager autograd, whose backward adds the weight's gradient to the weight's `.grad` by itself, part by part."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        """The operator's results."""
        output = forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor, *_: Any) -> tuple[Any, ...]:
        """Gradients of hidden states and bias."""
        needed = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        arguments = (grad_logprobs, grad_entropy, *ctx.saved_tensors, *ctx.numbers, needed)
        into = gradient_of(ctx.saved_tensors[1]) if needed[1] else None
        grad_hidden, _weight, grad_bias = backward(*arguments, into=into)
        return grad_hidden, None, None, grad_bias, *[None] * 6


def gradient_of(parameter: Tensor) -> Tensor:
    """What a parameter's gradients have added up to, zeros in the beginning."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


# --- The dispatcher --------------------------------------------------------------------------------------------------


def _whole_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """Gradients as an operator must return them: an empty tensor where one is not needed."""
    hidden = arguments[2]
    return tuple(hidden.new_empty(0) if g is None else g for g in backward(*arguments))


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, weight, needed = arguments[2], arguments[3], arguments[-1]
    grad_bias = hidden.new_empty(weight.shape[:1], dtype=precision(hidden, weight))
    whole = (hidden.new_empty(hidden.shape), weight.new_empty(weight.shape), grad_bias)
    return tuple(w if need else hidden.new_empty(0) for w, need in zip(whole, needed, strict=True))


def _register() -> tuple[Any, Any, Any]:
    library: Any = torch.library.Library("vhead", "FRAGMENT")  # type: ignore[no-untyped-call]
    tags = (torch.Tag.pt2_compliant_tag,)
    tensors = "Tensor hidden, Tensor weight, Tensor targets, Tensor? bias"
    numbers = "float temperature, float? softcap, float scale"
    library.define(
        f"token_statistics({tensors}, {numbers}, bool batch_invariant, Tensor? candidates, int top) -> "
        f"({', '.join(['Tensor'] * 9)})",
        tags=tags,
    )
    tensors = f"Tensor grad_logprobs, Tensor grad_entropy, {tensors}, Tensor peak, Tensor log_sum, Tensor entropy"
    library.define(
        f"token_statistics_backward({tensors}, {numbers}, bool[3] needed) -> (Tensor, Tensor, Tensor)", tags=tags
    )
    library.impl("token_statistics", forward, "CompositeExplicitAutograd")
    library.impl("token_statistics_backward", _whole_backward, "CompositeExplicitAutograd")
    name = "vhead::token_statistics"
    torch.library.register_fake(name, empty_results, lib=library)
    torch.library.register_fake(f"{name}_backward", _fake_backward, lib=library)
    torch.library.register_autograd(name, _differentiate, setup_context=_save, lib=library)
    operators = torch.ops.vhead
    return library, operators.token_statistics.default, operators.token_statistics_backward.default


_LIBRARY, OPERATOR, _BACKWARD_OPERATOR = _register()
