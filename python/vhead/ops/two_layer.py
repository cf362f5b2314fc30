"""The value head of two layers, Linear-ReLU-Linear, as a torch operation."""

from typing import Any

import torch
from torch import Tensor

from vhead import _native
from vhead.ops.arguments import Seed, check_device, check_kind, seed_tensor
from vhead.ops.dispatch import Gradients, Implementation, Operation, own_precision
from vhead.ops.dropout import keep_mask, scale

# Bytes of activations that backward holds at once.
_CHUNK_BYTES = 8 << 20


def value_head_two_layer(
    hidden: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    dropout_p: float = 0.0,
    seed: Seed = None,
) -> Tensor:
    """Projects hidden states to values: `bias2 + weight2 @ relu(bias1 + scale * weight1 @ (keep * hidden))`.

    Both sums are accumulated in float32, on the CPU in one order of additions: there a row's value depends on that row
    and the weights alone, bit for bit. On CUDA the first layer is torch's own product, whose order of additions is
    torch's. Activations are never stored; backward computes them again. Dropout falls on the hidden states, with the
    mask of `value_head`. A NaN stays a NaN through the ReLU. Under autocast the result stays float32.

    Args:
        hidden: `[..., H]`, float32, bfloat16 or float16. float64 (here or in a weight) computes in float64, in plain
            torch.
        weight1: `[I, H]`; upcast exactly where it is a half precision.
        bias1: `[I]`.
        weight2: `[K, I]`.
        bias2: `[K]`.
        dropout_p: Probability in [0, 1) that an element of `hidden` is dropped, as in `value_head`.
        seed: What the mask is a function of, as in `value_head`.

    Returns:
        `[...]` for K = 1, else `[..., K]`; float32, or float64 as above.

    Raises:
        TypeError: An argument is no tensor or has a dtype that is not listed.
        ValueError: Shapes do not fit, devices differ, a tensor is not dense, `dropout_p` or `seed` is out of range.
    """
    return _TWO_LAYER(hidden, weight1, bias1, weight2, bias2, dropout_p, seed)


def value_head_two_layer_plain(
    hidden: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    dropout_p: float = 0.0,
    seed: Seed = None,
) -> Tensor:
    """`value_head_two_layer` in plain torch operations: the same mask bit for bit, the sums in torch's own order."""
    _check_tensors(hidden, weight1, bias1, weight2, bias2)
    return _plain(hidden, weight1, bias1, weight2, bias2, dropout_p, seed_tensor(dropout_p, seed, hidden.device))


def _check_tensors(
    hidden: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None
) -> None:
    check_kind("hidden", hidden)
    if hidden.dim() < 1 or hidden.shape[-1] < 1:
        raise ValueError(f"hidden: expected [..., H] with H >= 1, got {list(hidden.shape)}")
    _check_layer(("weight1", "I"), weight1, "bias1", bias1, hidden, hidden.shape[-1])
    _check_layer(("weight2", "K"), weight2, "bias2", bias2, hidden, weight1.shape[0])


def _check_layer(
    names: tuple[str, str], weight: Tensor, bias_name: str, bias: Tensor | None, hidden: Tensor, columns: int
) -> None:
    name, rows = names
    check_kind(name, weight)
    if weight.dim() != 2 or weight.shape[1] != columns or weight.shape[0] < 1:
        raise ValueError(f"{name}: expected [{rows}, {columns}], got {list(weight.shape)}")
    check_device(name, weight, hidden)
    if bias is not None:
        check_kind(bias_name, bias)
        if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
            raise ValueError(f"{bias_name}: expected [{weight.shape[0]}], got {list(bias.shape)}")
        check_device(bias_name, bias, hidden)


# --- Plain torch -----------------------------------------------------------------------------------------------------


def _plain(
    hidden: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    dtype = _precision(hidden, weight1, weight2)
    with own_precision(hidden):
        kept = _kept(hidden, dtype, dropout_p, seed)
        activations = _before_relu(kept, weight1, bias1, dropout_p, seed).relu()
        values = torch.matmul(activations, weight2.to(dtype).t())
        if bias2 is not None:
            values = values + bias2.to(dtype)
        return values.squeeze(-1) if weight2.shape[0] == 1 else values


def _precision(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _kept(hidden: Tensor, dtype: torch.dtype, dropout_p: float, seed: Tensor | None) -> Tensor:
    return hidden.to(dtype) if seed is None else hidden.to(dtype) * keep_mask(hidden, dropout_p, seed)


def _before_relu(kept: Tensor, weight1: Tensor, bias1: Tensor | None, dropout_p: float, seed: Tensor | None) -> Tensor:
    sums = torch.matmul(kept, weight1.to(kept.dtype).t())
    if seed is not None:
        sums = sums * scale(dropout_p)
    return sums if bias1 is None else sums + bias1.to(kept.dtype)


def _plain_backward(
    grad: Tensor,
    hidden: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    needed: tuple[bool, ...],
) -> Gradients:
    dtype = _precision(hidden, weight1, weight2)
    with own_precision(hidden):
        grad = (grad.unsqueeze(-1) if weight2.shape[0] == 1 else grad).to(dtype)
        kept = _kept(hidden, dtype, dropout_p, seed)
        activations = _before_relu(kept, weight1, bias1, dropout_p, seed).relu()
        before = torch.matmul(grad, weight2.to(dtype)) * (activations > 0)
        grad_first = _first_layer_gradients(before, kept, hidden, weight1, dropout_p, seed, needed[:3])
        grad_weight2 = grad_bias2 = None
        if needed[3]:
            rows = activations.reshape(-1, activations.shape[-1])
            grad_weight2 = torch.matmul(grad.reshape(-1, grad.shape[-1]).t(), rows)
        if needed[4]:
            grad_bias2 = grad.reshape(-1, grad.shape[-1]).sum(0)
        return *grad_first, grad_weight2, grad_bias2


def _first_layer_gradients(
    before: Tensor,
    kept: Tensor,
    hidden: Tensor,
    weight1: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    needed: tuple[bool, ...],
) -> Gradients:
    """Gradients of hidden, weight1 and bias1 by that of what the ReLU takes."""
    scaled = before if seed is None else before * scale(dropout_p)
    grad_hidden = grad_weight1 = grad_bias1 = None
    if needed[0]:
        grad_hidden = torch.matmul(scaled, weight1.to(before.dtype))
        grad_hidden = (grad_hidden if seed is None else grad_hidden * keep_mask(hidden, dropout_p, seed)).to(
            hidden.dtype
        )
    if needed[1]:
        grad_weight1 = torch.matmul(scaled.reshape(-1, scaled.shape[-1]).t(), kept.reshape(-1, kept.shape[-1]))
    if needed[2]:
        grad_bias1 = before.reshape(-1, before.shape[-1]).sum(0)
    return grad_hidden, grad_weight1, grad_bias1


# --- Where the extension has no kernel for both layers: torch's product for the first, the kernel for the second ------


def _composed_forward(
    hidden: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    with torch.no_grad(), own_precision(hidden):
        kept = _kept(hidden, torch.float32, dropout_p, seed)
        activations = _before_relu(kept, weight1, bias1, dropout_p, seed).relu_()
        return _native.value_head(activations, weight2, bias2)


def _composed_backward(
    grad: Tensor,
    hidden: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    needed: tuple[bool, ...],
) -> Gradients:
    with torch.no_grad(), own_precision(hidden):
        kept = _kept(hidden, torch.float32, dropout_p, seed)
        activations = _before_relu(kept, weight1, bias1, dropout_p, seed).relu_()
        needed2 = (any(needed[:3]), needed[3], needed[4])
        before, grad_weight2, grad_bias2 = _native.value_head_backward(grad, activations, weight2, 0.0, None, needed2)
        if before is None:
            return None, None, None, grad_weight2, grad_bias2
        before.mul_(activations > 0)
        grad_first = _first_layer_gradients(before, kept, hidden, weight1, dropout_p, seed, needed[:3])
        return *grad_first, grad_weight2, grad_bias2


# --- The CPU ---------------------------------------------------------------------------------------------------------


def _chunked_backward(
    grad: Tensor,
    hidden: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    needed: tuple[bool, ...],
) -> Gradients:
    """Chunk by chunk of rows, so that few activations are there at once; the large products are torch's."""
    width, columns = weight1.shape
    with torch.autocast("cpu", enabled=False):
        sums = _Sums(hidden, weight1, weight2, needed)
        rows, grads = hidden.reshape(-1, columns), grad.reshape(-1, weight2.shape[0])
        chunk = max(1, _CHUNK_BYTES // (4 * width))
        for first in range(0, len(rows), chunk):
            kept = _native.apply_dropout(rows[first : first + chunk], dropout_p, seed, first)
            factor = 1.0 if seed is None else scale(dropout_p)
            activations = kept.new_empty((len(kept), width))
            _native.linear(kept, weight1, bias1, factor, relu=True, out=activations)
            grad_kept = sums.add(grads[first : first + chunk], kept, activations, factor)
            if grad_kept is not None:
                masked = _native.apply_dropout(grad_kept, dropout_p, seed, first)
                sums.hidden[first : first + chunk] = masked
        return sums.gradients()


class _Sums:
    """Gradients of the parameters, summed over chunks of rows, and the hidden states'."""

    def __init__(self, hidden: Tensor, weight1: Tensor, weight2: Tensor, needed: tuple[bool, ...]) -> None:
        self._weight1, self._weight2, self._needed, self._shape = weight1.float(), weight2.float(), needed, hidden.shape
        self.hidden = hidden.new_empty((hidden.numel() // hidden.shape[-1], hidden.shape[-1]) if needed[0] else 0)
        shapes = (weight1.shape, weight1.shape[:1], weight2.shape, weight2.shape[:1])
        self._sums = [torch.zeros(s) if need else None for s, need in zip(shapes, needed[1:], strict=True)]

    def add(self, grad: Tensor, kept: Tensor, activations: Tensor, factor: float) -> Tensor | None:
        """Adds a chunk's share; the gradient of its kept hidden states, where needed."""
        grad_weight1, grad_bias1, grad_weight2, grad_bias2 = self._sums
        if grad_weight2 is not None:
            grad_weight2.addmm_(grad.t(), activations)
        if grad_bias2 is not None:
            grad_bias2 += grad.sum(0)
        before = torch.mm(grad, self._weight2).mul_(activations > 0)
        if grad_bias1 is not None:
            grad_bias1 += before.sum(0)
        scaled = before.mul_(factor)
        if grad_weight1 is not None:
            grad_weight1.addmm_(scaled.t(), kept)
        return torch.mm(scaled, self._weight1) if self._needed[0] else None

    def gradients(self) -> Gradients:
        """What is needed, in the operator's order."""
        return (self.hidden.view(self._shape) if self._needed[0] else None, *self._sums)


# --- The dispatcher --------------------------------------------------------------------------------------------------


def _forward(hidden: Tensor, *rest: Any) -> Tensor:
    if hidden.is_cpu:
        return _native.value_head_two_layer(hidden, *rest)
    _check_tensors(hidden, *rest[:4])
    return _composed_forward(hidden, *rest)


def _backward(grad: Tensor, hidden: Tensor, *rest: Any) -> Gradients:
    return (_chunked_backward if hidden.is_cpu else _composed_backward)(grad, hidden, *rest)


def _fake(
    hidden: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    outputs = weight2.shape[0]
    sizes = hidden.shape[:-1] if outputs == 1 else (*hidden.shape[:-1], outputs)
    return hidden.new_empty(sizes, dtype=torch.float32)


def _fake_gradients(hidden: Tensor, weight1: Tensor, _bias1: Tensor | None, weight2: Tensor) -> tuple[Tensor, ...]:
    shapes = (weight1.shape, weight1.shape[:1], weight2.shape, weight2.shape[:1])
    return hidden.new_empty(hidden.shape), *(hidden.new_empty(shape, dtype=torch.float32) for shape in shapes)


_TWO_LAYER = Operation(
    Implementation(
        name="value_head_two_layer",
        tensors="Tensor hidden, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2",
        saved="Tensor hidden, Tensor weight1, Tensor? bias1, Tensor weight2",
        check=_check_tensors,
        forward=_forward,
        plain=_plain,
        backward=_backward,
        plain_backward=_plain_backward,
        fake=_fake,
        fake_gradients=_fake_gradients,
    )
)
