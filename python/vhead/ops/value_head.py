"""The value head as a torch operation: native kernels where a device has some, plain torch everywhere else.

Whatever the way, backward keeps the hidden states, the weight and the seed. The dropout mask is a function of the seed
and the element's place, so backward computes it again.
"""

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from vhead import _native
from vhead.ops.arguments import Seed, check_device, check_kind, seed_tensor
from vhead.ops.devices import SETTINGS
from vhead.ops.dispatch import Gradients, Implementation, Operation, intercepted, own_precision
from vhead.ops.dropout import keep_mask, scale


def value_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, *, dropout_p: float = 0.0, seed: Seed = None
) -> Tensor:
    """The value of each hidden state: `bias + scale * sum(keep * hidden * weight)`, accumulated in float32.

    A row's value depends on that row, the weights and H alone, bit for bit: not on batch size, strides or threads. The
    kernels of CUDA devices give the CPU's bits as far as emulation shows; they have not been run on a GPU yet. NaN and
    infinities propagate, through dropped elements as well. Under autocast the result stays float32.

    Args:
        hidden: `[..., H]`, float32, bfloat16 or float16; any strides, though a last dimension that is not contiguous is
            copied first. float64 (here or in `weight`) computes in float64, in plain torch.
        weight: `[1, H]` or `[H]`, or `[K, H]` for K values a row; upcast exactly where it is a half precision.
        bias: `[1]`, or `[K]`.
        dropout_p: Probability in [0, 1) that an element of `hidden` is dropped, in steps of 1/65536; the kept ones are
            scaled by the exact inverse of the probability that this rounds to.
        seed: What the mask is a function of, on any device: an integer of 64 bits, or an int64 tensor with one element,
            on the CPU or where `hidden` is. None: drawn from torch's default generator, that of the CUDA device where
            `hidden` is on one; only where `dropout_p` is above zero.

    Returns:
        `[...]` for a weight `[1, H]` or `[H]`, else `[..., K]`; float32, or float64 as above.

    Raises:
        TypeError: An argument is no tensor or has a dtype that is not listed.
        ValueError: Shapes do not fit, devices differ, a tensor is not dense, `dropout_p` or `seed` is out of range.
        CudaError: A CUDA device that has kernels of this package did not take the work.
    """
    if dropout_p == 0.0 and not is_dynamo_compiling() and not intercepted():
        values = _try_value_head(hidden, weight, bias, torch.is_grad_enabled())
        if values is not None:
            return values
    return _VALUE_HEAD(hidden, weight, bias, dropout_p, seed)


def value_head_plain(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, *, dropout_p: float = 0.0, seed: Seed = None
) -> Tensor:
    """`value_head` in plain torch operations: the same mask bit for bit, the sums in torch's own order.

    It serves devices without a kernel, float64, forward-mode differentiation and tensor subclasses, and everything
    where `VHEAD_PLAIN_TORCH=1`. Arguments, result and errors are `value_head`'s.
    """
    _check_tensors(hidden, weight, bias)
    return _plain(hidden, weight, bias, dropout_p, seed_tensor(dropout_p, seed, hidden.device))


def _check_tensors(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_kind("hidden", hidden)
    check_kind("weight", weight)
    if hidden.dim() < 1 or hidden.shape[-1] < 1:
        raise ValueError(f"hidden: expected [..., H] with H >= 1, got {list(hidden.shape)}")
    columns = hidden.shape[-1]
    if weight.dim() not in (1, 2) or weight.shape[-1] != columns or weight.shape[0] < 1:
        raise ValueError(
            f"weight: expected [K, {columns}] or [{columns}] for hidden states {list(hidden.shape)}, "
            f"got {list(weight.shape)}"
        )
    check_device("weight", weight, hidden)
    if bias is not None:
        check_kind("bias", bias)
        if bias.dim() != 1 or bias.shape[0] != _outputs(weight):
            raise ValueError(f"bias: expected [{_outputs(weight)}], got {list(bias.shape)}")
        check_device("bias", bias, hidden)


def _outputs(weight: Tensor) -> int:
    return 1 if weight.dim() == 1 else weight.shape[0]


def _try_nothing(_hidden: Tensor, _weight: Tensor, _bias: Tensor | None, _grad_enabled: bool) -> Tensor | None:  # noqa: FBT001
    return None


_try_value_head = _try_nothing if SETTINGS.plain_torch else _native.try_value_head


def _plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, dropout_p: float, seed: Tensor | None) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    with own_precision(hidden):
        x = hidden.to(dtype)
        if seed is not None:
            x = x * keep_mask(hidden, dropout_p, seed)
        values = torch.matmul(x, weight.reshape(-1, weight.shape[-1]).to(dtype).t())
        if seed is not None:
            values = values * scale(dropout_p)
        if bias is not None:
            values = values + bias.to(dtype)
        return values.squeeze(-1) if _outputs(weight) == 1 else values


def _plain_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, dropout_p: float, seed: Tensor | None, needed: tuple[bool, ...]
) -> Gradients:
    with own_precision(hidden):
        grad = grad.unsqueeze(-1) if _outputs(weight) == 1 else grad
        scaled = grad if seed is None else grad * scale(dropout_p)
        keep = None if seed is None else keep_mask(hidden, dropout_p, seed)
        rows = tuple(range(hidden.dim() - 1))
        grad_hidden = grad_weight = grad_bias = None
        if needed[0]:
            grad_hidden = _masked(torch.matmul(scaled, weight.reshape(-1, weight.shape[-1]).float()), keep)
            grad_hidden = grad_hidden.to(hidden.dtype)
        if needed[1]:
            kept = _masked(hidden.float(), keep)
            grad_weight = torch.matmul(scaled.flatten(0, -2).t(), kept.flatten(0, -2)).reshape(weight.shape)
        if needed[2]:
            grad_bias = grad.sum(rows) if rows else grad
        return grad_hidden, grad_weight, grad_bias


def _masked(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else x * keep


def _fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, dropout_p: float, seed: Tensor | None) -> Tensor:
    outputs = _outputs(weight)
    sizes = hidden.shape[:-1] if outputs == 1 else (*hidden.shape[:-1], outputs)
    return hidden.new_empty(sizes, dtype=torch.float32)


def _fake_gradients(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return (
        hidden.new_empty(hidden.shape),
        hidden.new_empty(weight.shape, dtype=torch.float32),
        hidden.new_empty(_outputs(weight), dtype=torch.float32),
    )


_VALUE_HEAD = Operation(
    Implementation(
        name="value_head",
        tensors="Tensor hidden, Tensor weight, Tensor? bias",
        saved="Tensor hidden, Tensor weight",
        check=_check_tensors,
        forward=_native.value_head,
        plain=_plain,
        backward=_native.value_head_backward,
        plain_backward=_plain_backward,
        fake=_fake,
        fake_gradients=_fake_gradients,
    )
)
