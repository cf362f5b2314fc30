"""Layers with gradients of their own: gated feed-forward layers, norms, and linear layers of half precisions.

The first two keep less than autograd would. What they keep nothing of is found again from what is kept, some rows at a
time, so that it stays in the cache. The last ones multiply in float32 where that is faster.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from vhead.ops.norm import rms_norm
from vhead.packing.checkpointing import recomputed_within
from vhead.packing.gates import Fused, is_gated, is_untouched
from vhead.packing.products import WideProducts, takes

Forward = Callable[[Any, Tensor], Tensor]

# Elements of a tensor that are worked on at once.
_BLOCK = 2**17


@contextmanager
def keeping_less(model: nn.Module, fused: Fused) -> Iterator[None]:
    """Lets modules that a check has recognised run so while the block lasts, where gradients are wanted.

    A module that was given a hook or another forward since is left alone, and so are all of them under autocast, whose
    dtypes torch's own steps know. Layers that gradient checkpointing computes again run in the same way.

    Args:
        model: The language model.
        fused: Its modules that are computed by kernels of this package where there are no gradients.
    """
    if not torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        yield
        return
    wide = WideProducts()
    chosen: list[tuple[nn.Module, Forward]] = [
        (layer, partial(_gated, wide if layer.down_proj in fused.linears else None))
        for layer in fused.gates
        if is_gated(layer)
    ]
    chosen += [(norm, _normed) for norm in fused.norms if is_untouched(norm)]
    chosen += [(linear, partial(_linear, wide)) for linear in fused.linears if is_untouched(linear)]
    within = partial(_running, chosen)
    with within(), recomputed_within(model, within):
        yield


@contextmanager
def _running(chosen: Sequence[tuple[nn.Module, Forward]]) -> Iterator[None]:
    # Layers that will be computed again run in such a block within another one.
    before = [module.__dict__.get("forward") for module, _ in chosen]
    try:
        for module, forward in chosen:
            module.forward = partial(forward, module)
        yield
    finally:
        for (module, _), own in zip(chosen, before, strict=True):
            if own is None:
                del module.forward
            else:
                module.forward = own


def _gated(wide: WideProducts | None, layer: Any, states: Tensor) -> Tensor:
    down = layer.down_proj
    result: Tensor = _GatedProduct.apply(layer.gate_proj(states), layer.up_proj(states), down.weight, down.bias, wide)
    return result


def _linear(wide: WideProducts, linear: nn.Linear, states: Tensor) -> Tensor:
    if not takes(linear, states):
        return functional.linear(states, linear.weight, linear.bias)
    result: Tensor = _Linear.apply(states, linear.weight, linear.bias, wide)
    return result


def _product(wide: WideProducts | None, first: Tensor, second: Tensor) -> Tensor:
    return first @ second if wide is None else wide.multiply(first, second)


def _normed(norm: Any, states: Tensor) -> Tensor:
    # The kernel knows no float64, which a model may have been made since.
    if states.dtype != norm.weight.dtype or states.dtype == torch.float64:
        own: Tensor = type(norm).forward(norm, states)
        return own
    result: Tensor = _Norm.apply(states, norm.weight, norm.variance_epsilon)
    return result


def _blocks(tensor: Tensor) -> Iterator[slice]:
    rows, columns = tensor.shape
    size = max(1, _BLOCK // max(columns, 1))
    return (slice(start, start + size) for start in range(0, rows, size))


class _GatedProduct(torch.autograd.Function):
    """`down(silu(gate) * up)`, which keeps gate and up, and neither what silu makes of one nor their product."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, wide: WideProducts | None = None
    ) -> Tensor:
        """`[..., H]` of `[..., I]`."""
        ctx.save_for_backward(gate, up, weight)
        ctx.has_bias, ctx.wide = bias is not None, wide
        gates, ups = gate.flatten(0, -2), up.flatten(0, -2)
        product = torch.empty_like(gates)
        for rows in _blocks(gates):
            torch.mul(functional.silu(gates[rows]), ups[rows], out=product[rows])
        linear = functional.linear if wide is None else wide.linear
        return linear(product.view_as(gate), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Each step as torch's own, with the same roundings."""
        gate, up, weight = ctx.saved_tensors
        gates, ups, wanted = gate.flatten(0, -2), up.flatten(0, -2), grad_output.flatten(0, -2)
        of_product = _product(ctx.wide, wanted, weight)
        product, of_gate = torch.empty_like(gates), torch.empty_like(gates)
        for rows in _blocks(gates):
            own, other, upstream = gates[rows], ups[rows], of_product[rows]
            activated = functional.silu(own)
            torch.mul(activated, other, out=product[rows])
            of_gate[rows] = torch.ops.aten.silu_backward(upstream * other, own)
            upstream.mul_(activated)
        of_weight = _product(ctx.wide, wanted.t(), product) if ctx.needs_input_grad[2] else None
        of_bias = wanted.sum(0) if ctx.has_bias and ctx.needs_input_grad[3] else None
        return of_gate.view_as(gate), of_product.view_as(up), of_weight, of_bias, None


class _Linear(torch.autograd.Function):
    """A linear layer of a half precision, with all three products in float32."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, wide: WideProducts) -> Tensor:
        """`[..., N]` of `[..., K]`."""
        ctx.save_for_backward(states, weight)
        ctx.has_bias, ctx.wide = bias is not None, wide
        return wide.linear(states, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Rounded once each, as torch's own."""
        states, weight = ctx.saved_tensors
        wanted, needed = grad_output.flatten(0, -2), ctx.needs_input_grad
        of_states = ctx.wide.multiply(wanted, weight).view_as(states) if needed[0] else None
        of_weight = ctx.wide.multiply(wanted.t(), states.flatten(0, -2)) if needed[1] else None
        of_bias = wanted.sum(0) if ctx.has_bias and needed[2] else None
        return of_states, of_weight, of_bias, None


class _Norm(torch.autograd.Function):
    """A root-mean-square norm that keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """`[..., H]`, by the kernel."""
        ctx.save_for_backward(states, weight)
        ctx.epsilon = epsilon
        return rms_norm(states, weight, epsilon)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """In float32 at least."""
        states, weight = ctx.saved_tensors
        x, wanted = states.flatten(0, -2), grad_output.flatten(0, -2)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        found, of_weight = torch.empty_like(x), torch.zeros(weight.shape, dtype=dtype)
        scale = weight.to(dtype)
        for rows in _blocks(x):
            own, upstream = x[rows].to(dtype), wanted[rows].to(dtype)
            inverse = own.square().mean(-1, keepdim=True).add_(ctx.epsilon).rsqrt_()
            normed = own * inverse
            of_weight += (upstream * normed.to(x.dtype)).sum(0)
            upstream = upstream * scale
            shared = (upstream * normed).mean(-1, keepdim=True)
            found[rows] = upstream.addcmul_(normed, shared, value=-1).mul_(inverse)
        return found.view_as(states), of_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None, None
