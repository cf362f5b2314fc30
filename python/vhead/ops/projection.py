"""The value head as a torch operation: native kernels where a device has some, plain torch everywhere else.

`vhead::value_head` is registered with the dispatcher for everything that watches, traces or transforms operations
(compile, export, dispatch modes, fake tensors). Plain eager tensors take a shorter way to the same kernel: one call
into the extension, wrapped in an autograd function where a gradient is needed.

Whatever the way, backward keeps the hidden states, the weight and the seed. The dropout mask is a function of the seed
and the element's place (`rust/core/src/dropout.rs`), so backward computes it again.
"""

import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from vhead import _native
from vhead.env import read_settings

Seed: TypeAlias = int | Tensor | None
Gradients: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]

_SETTINGS = read_settings()
_native.configure(
    libtorch_cpu=str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"),
    num_threads=_SETTINGS.num_threads,
    read_attributes=_SETTINGS.tensor_view == "attributes",
)

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def value_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, *, dropout_p: float = 0.0, seed: Seed = None
) -> Tensor:
    """Projects hidden states to values: `bias + scale * sum(keep * hidden * weight)`, accumulated in float32.

    A row's value depends on that row, the weights and H alone, bit for bit: not on batch size, strides or threads. NaN
    and infinities propagate, through dropped elements as well. Under autocast the result stays float32.

    Args:
        hidden: `[..., H]`, float32, bfloat16 or float16; any strides, though a last dimension that is not contiguous is
            copied first. float64 (here or in `weight`) computes in float64, in plain torch.
        weight: `[1, H]` or `[H]`, or `[K, H]` for K values a row; upcast exactly where it is a half precision.
        bias: `[1]`, or `[K]`.
        dropout_p: Probability in [0, 1) that an element of `hidden` is dropped, in steps of 1/65536; the kept ones are
            scaled by the exact inverse of the probability that this rounds to.
        seed: What the mask is a function of: an integer of 64 bits, or an int64 tensor with one element. None: drawn
            from torch's default generator, only where `dropout_p` is above zero.

    Returns:
        `[...]` for a weight `[1, H]` or `[H]`, else `[..., K]`; float32, or float64 as above.

    Raises:
        TypeError: An argument is no tensor or has a dtype that is not listed.
        ValueError: Shapes do not fit, devices differ, a tensor is not dense, `dropout_p` or `seed` is out of range.
    """
    if dropout_p == 0.0 and not is_dynamo_compiling() and not _intercepted():
        values = _try_value_head(hidden, weight, bias, torch.is_grad_enabled())
        if values is not None:
            return values
    _check_tensors(hidden, weight, bias)
    return _route(hidden, weight, bias, dropout_p, _seed_tensor(dropout_p, seed))


def value_head_plain(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, *, dropout_p: float = 0.0, seed: Seed = None
) -> Tensor:
    """`value_head` in plain torch operations: the same mask bit for bit, the sums in torch's own order.

    It serves devices without a kernel, float64, forward-mode differentiation and tensor subclasses, and everything
    where `VHEAD_PLAIN_TORCH=1`. Arguments, result and errors are `value_head`'s.
    """
    _check_tensors(hidden, weight, bias)
    return _plain(hidden, weight, bias, dropout_p, _seed_tensor(dropout_p, seed))


@torch.no_grad()
def init_linear_(weight: Tensor, bias: Tensor | None) -> None:
    """Fills in place with `nn.Linear`'s default distribution, uniform within `1 / sqrt(in_features)` of zero.

    One seed is drawn from torch's default generator; the numbers are a function of it, the same on every device. They
    are made in float32 and rounded to the parameters' dtype. Parameters without data (meta, fake) are left alone.

    Args:
        weight: `[out_features, in_features]`, any floating dtype, any device.
        bias: `[out_features]`.
    """
    columns = weight.shape[-1]
    _fill({"weight": weight, "bias": bias}, lambda sizes, name, seed: _native.init_linear(sizes, columns, name, seed))


@torch.no_grad()
def init_normal_(weight: Tensor, bias: Tensor | None, std: float) -> None:
    """Fills the weight in place with N(0, `std`), the bias with zeros; the rest as `init_linear_`.

    Raises:
        ValueError: `std` is negative or not finite.
    """
    if not (math.isfinite(std) and std >= 0.0):
        raise ValueError(f"std: expected a finite number that is not negative, got {std}")
    _fill({"weight": weight}, lambda sizes, name, seed: _native.init_normal(sizes, std, name, seed))
    if bias is not None:
        bias.zero_()


def backends() -> dict[str, dict[str, object]]:
    """What runs where.

    Returns:
        For each device type with kernels of this package (`"cpu"`), which ones and how they run; under
        `"other devices"` what the rest use; under `"build"` what the extension is.
    """
    table: dict[str, dict[str, object]] = {}
    for row in _native.backends():
        name = str(row.pop("device"))
        table[name] = {"kernel": "plain torch" if _SETTINGS.plain_torch else "native", **row}
    return {**table, "other devices": {"kernel": "plain torch"}, "build": {**_native.build_info()}}


# --- Arguments -------------------------------------------------------------------------------------------------------


def _check_tensors(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    _check_kind("hidden", hidden)
    _check_kind("weight", weight)
    if hidden.dim() < 1 or hidden.shape[-1] < 1:
        raise ValueError(f"hidden: expected [..., H] with H >= 1, got {list(hidden.shape)}")
    columns = hidden.shape[-1]
    if weight.dim() not in (1, 2) or weight.shape[-1] != columns or weight.shape[0] < 1:
        raise ValueError(
            f"weight: expected [K, {columns}] or [{columns}] for hidden states {list(hidden.shape)}, "
            f"got {list(weight.shape)}"
        )
    _check_device("weight", weight, hidden)
    if bias is not None:
        _check_kind("bias", bias)
        if bias.dim() != 1 or bias.shape[0] != _outputs(weight):
            raise ValueError(f"bias: expected [{_outputs(weight)}], got {list(bias.shape)}")
        _check_device("bias", bias, hidden)


def _check_kind(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__qualname__}")
    if tensor.dtype not in _FLOATS:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {_bare(tensor.dtype)}")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got layout {_bare(tensor.layout)}")


def _check_device(name: str, tensor: Tensor, hidden: Tensor) -> None:
    if tensor.device != hidden.device:
        raise ValueError(f"{name}: expected a tensor on {hidden.device} like hidden, got one on {tensor.device}")


def _bare(torch_name: object) -> str:
    return str(torch_name).removeprefix("torch.")


def _outputs(weight: Tensor) -> int:
    return 1 if weight.dim() == 1 else weight.shape[0]


def _seed_tensor(dropout_p: float, seed: Seed) -> Tensor | None:
    """The seed as an int64 scalar tensor; None where nothing is dropped."""
    if not _threshold(dropout_p):
        return None
    if seed is None:
        return _draw_seed()
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed: expected int64, got {_bare(seed.dtype)}")
        if seed.numel() != 1:
            raise ValueError(f"seed: expected one element, got {list(seed.shape)}")
        return seed.reshape(())
    if not isinstance(seed, int):
        raise TypeError(f"seed: expected an int or an int64 torch.Tensor, got {type(seed).__qualname__}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: expected an integer of 64 bits, got {seed}")
    return torch.tensor(seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device="cpu")


def _draw_seed() -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device="cpu")


def _threshold(dropout_p: float) -> int:
    """An element is dropped where its 16 bits are below this."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p}")
    return min(math.floor(dropout_p * 65536.0 + 0.5), 65535)


# --- Which way a call takes ------------------------------------------------------------------------------------------


def _private(name: str) -> Callable[[], Any]:
    """A function of `torch._C` that has no public name; where a release lacks it, everything takes the long way."""
    found: Any = torch._C
    for part in name.split("."):
        found = getattr(found, part, None)
    return cast("Callable[[], Any]", found) if callable(found) else lambda: 1


_dispatch_modes = _private("_len_torch_dispatch_stack")
_functorch_layer = _private("_functorch.peek_interpreter_stack")
_tracing_state = _private("_get_tracing_state")


def _intercepted() -> bool:
    """Whether something watches or transforms operations, so that a kernel must not go behind its back."""
    return bool(_dispatch_modes() or _functorch_layer() is not None or _tracing_state() is not None or _forward_mode())


def _forward_mode() -> bool:
    return forward_ad._current_level >= 0


def _try_nothing(_hidden: Tensor, _weight: Tensor, _bias: Tensor | None, _grad_enabled: bool) -> Tensor | None:  # noqa: FBT001
    return None


_try_value_head = _try_nothing if _SETTINGS.plain_torch else _native.try_value_head


def _route(hidden: Tensor, weight: Tensor, bias: Tensor | None, dropout_p: float, seed: Tensor | None) -> Tensor:
    """The way that fits checked arguments; `seed` is None where nothing is dropped."""
    tensors = (hidden, weight) if bias is None else (hidden, weight, bias)
    if _SETTINGS.plain_torch or _forward_mode() or not all(_has_kernels(tensor) for tensor in tensors):
        return _plain(hidden, weight, bias, dropout_p, seed)
    if is_dynamo_compiling():
        return cast("Tensor", _OPERATOR(hidden, weight, bias, dropout_p, seed))
    if _functorch_layer() is not None:
        return cast("Tensor", _TransformedValueHead.apply(hidden, weight, bias, dropout_p, seed))
    if _intercepted() or not all(type(tensor) in _PLAIN_TYPES for tensor in tensors):
        return cast("Tensor", _OPERATOR(hidden, weight, bias, dropout_p, seed))
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return cast("Tensor", _ValueHead.apply(hidden, weight, bias, dropout_p, seed))
    return _forward(hidden, weight, bias, dropout_p, seed)


def _has_kernels(tensor: Tensor) -> bool:
    """Whether the kernels' dtypes and kinds include this tensor.

    Subclasses such as DTensor know torch's own operations, not this one; the tracers' own kinds know every operation.
    """
    return tensor.dtype != torch.float64 and (
        type(tensor) in _PLAIN_TYPES or isinstance(tensor, FakeTensor | FunctionalTensor)
    )


def _forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, dropout_p: float, seed: Tensor | None) -> Tensor:
    if not hidden.is_cpu:
        return _plain(hidden, weight, bias, dropout_p, seed)
    hidden, weight, bias = _resolved(hidden, weight, bias)
    return _native.value_head(hidden, weight, bias, dropout_p, seed)


def _resolved(*tensors: Tensor | None) -> Any:  # noqa: ANN401, a tuple of the arguments' own types
    """The tensors as they lie in memory, which the dispatcher sees to only for operators."""
    return tuple(tensor if tensor is None else tensor.resolve_neg() for tensor in tensors)


def _backward(  # noqa: PLR0917, the operator's schema
    grad: Tensor, hidden: Tensor, weight: Tensor, dropout_p: float, seed: Tensor | None, needed: tuple[bool, ...]
) -> Gradients:
    """Gradients for (hidden, weight, bias) where needed, by differentiable operations where they may be asked again."""
    differentiable = torch.is_grad_enabled() or (not is_dynamo_compiling() and _functorch_layer() is not None)
    if differentiable or _SETTINGS.plain_torch:
        return _plain_backward(grad, hidden, weight, dropout_p, seed, needed)
    plain = all(type(tensor) in _PLAIN_TYPES for tensor in (grad, hidden, weight))
    if is_dynamo_compiling() or _intercepted() or not plain:
        gradients = _BACKWARD_OPERATOR(grad, hidden, weight, dropout_p, seed, needed)
        return cast("Gradients", tuple(g if n else None for g, n in zip(gradients, needed, strict=True)))
    if not hidden.is_cpu:
        return _plain_backward(grad, hidden, weight, dropout_p, seed, needed)
    grad, hidden, weight = _resolved(grad, hidden, weight)
    return _native.value_head_backward(grad, hidden, weight, dropout_p, seed, needed)


# --- Autograd --------------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401, ARG001, torch's protocol
    hidden, weight, _, dropout_p, seed = inputs
    ctx.save_for_backward(hidden, weight, seed)
    ctx.dropout_p = dropout_p


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401, torch's protocol
    hidden, weight, seed = ctx.saved_tensors
    needed = tuple(ctx.needs_input_grad[:3])
    # Autograd itself casts a gradient to its parameter's dtype.
    return *_backward(grad, hidden, weight, ctx.dropout_p, seed, needed), None, None


class _ValueHead(torch.autograd.Function):
    """Eager autograd. Its `forward(ctx, ...)` form costs some 17 us a call less than one with `setup_context`."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:  # noqa: ANN401, torch's protocol
        values = _forward(*inputs)
        _save(ctx, inputs, values)
        return values

    backward = staticmethod(_differentiate)


class _TransformedValueHead(torch.autograd.Function):
    """The same under `torch.func`'s transforms, which ask for `setup_context` and a rule for vmap."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:  # noqa: ANN401, torch's protocol
        return cast("Tensor", _OPERATOR(*inputs))

    setup_context = staticmethod(_save)
    backward = staticmethod(_differentiate)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:  # noqa: ANN401
        return _vmap(info, in_dims, *inputs)


def _vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:  # noqa: ANN401
    """The loop over samples that vmap means, as one call where that numbers the mask's rows the same way."""
    hidden, _, _, _, seed = inputs
    if seed is None and in_dims[0] is not None and all(dim is None for dim in in_dims[1:]):
        return _route(hidden.movedim(in_dims[0], 0), *inputs[1:]), 0
    samples = [
        _route(*(x if dim is None else x.select(dim, i) for x, dim in zip(inputs, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    return torch.stack(samples), 0


# --- Fresh weights ---------------------------------------------------------------------------------------------------


def _fill(parameters: dict[str, Tensor | None], draw: Callable[[list[int], str, int], Tensor]) -> None:
    present = {name: parameter for name, parameter in parameters.items() if parameter is not None}
    if any(parameter.is_meta or isinstance(parameter, FakeTensor) for parameter in present.values()):
        return
    seed = int(_draw_seed().item())
    for name, parameter in present.items():
        numbers = draw(list(parameter.shape), name, seed)
        parameter.copy_(_distributed_like(parameter, numbers.to(parameter.device)))


def _distributed_like(parameter: Tensor, numbers: Tensor) -> Tensor:
    """`numbers` sharded as `parameter` is, where that is a DTensor: every rank then holds rank 0's draw."""
    sharding = _sharding()
    if sharding is None or not isinstance(parameter, sharding.DTensor):
        return numbers
    return cast("Tensor", sharding.distribute_tensor(numbers, parameter.device_mesh, parameter.placements))


def _replicated_like(hidden: Tensor, keep: Tensor) -> Tensor:
    """A mask that every rank computed whole, as a DTensor where `hidden` is one; ranks must have the same seed."""
    sharding = _sharding()
    if sharding is None or not isinstance(hidden, sharding.DTensor):
        return keep
    placements = [sharding.Replicate()] * hidden.device_mesh.ndim
    return cast("Tensor", sharding.DTensor.from_local(keep, hidden.device_mesh, placements, run_check=False))


def _sharding() -> Any:  # noqa: ANN401, a module that only sharding programs import
    module = sys.modules.get("torch.distributed.tensor")
    # Torch 2.4 has a module of this name as well, and DTensor elsewhere.
    return module if hasattr(module, "DTensor") else sys.modules.get("torch.distributed._tensor")


# --- Plain torch -----------------------------------------------------------------------------------------------------

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF
_OCTET = 8


def _plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, dropout_p: float, seed: Tensor | None) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    with _own_precision(hidden):
        x = hidden.to(dtype)
        if seed is not None:
            x = x * _keep(hidden, dropout_p, seed)
        values = torch.matmul(x, weight.reshape(-1, weight.shape[-1]).to(dtype).t())
        if seed is not None:
            values = values * _scale(dropout_p)
        if bias is not None:
            values = values + bias.to(dtype)
        return values.squeeze(-1) if _outputs(weight) == 1 else values


def _plain_backward(  # noqa: PLR0917, the operator's schema
    grad: Tensor, hidden: Tensor, weight: Tensor, dropout_p: float, seed: Tensor | None, needed: tuple[bool, ...]
) -> Gradients:
    with _own_precision(hidden):
        grad = grad.unsqueeze(-1) if _outputs(weight) == 1 else grad
        scaled = grad if seed is None else grad * _scale(dropout_p)
        keep = None if seed is None else _keep(hidden, dropout_p, seed)
        rows = tuple(range(hidden.dim() - 1))
        of_hidden = of_weight = of_bias = None
        if needed[0]:
            of_hidden = _masked(torch.matmul(scaled, weight.reshape(-1, weight.shape[-1]).float()), keep)
            of_hidden = of_hidden.to(hidden.dtype)
        if needed[1]:
            kept = _masked(hidden.float(), keep)
            of_weight = torch.matmul(scaled.flatten(0, -2).t(), kept.flatten(0, -2)).reshape(weight.shape)
        if needed[2]:
            of_bias = grad.sum(rows) if rows else grad
        return of_hidden, of_weight, of_bias


def _masked(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else x * keep


def _own_precision(hidden: Tensor) -> AbstractContextManager[object]:
    """No autocast."""
    kind = hidden.device.type
    return torch.autocast(kind, enabled=False) if _has_autocast(kind) else nullcontext()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


def _scale(dropout_p: float) -> float:
    return 65536.0 / (65536.0 - _threshold(dropout_p))


def _keep(hidden: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    """Which elements of `hidden` `[..., H]` are kept, in its shape: `rust/core/src/dropout.rs` in torch operations."""
    columns, rows = hidden.shape[-1], math.prod(hidden.shape[:-1])
    row = torch.arange(rows, device=hidden.device)[:, None]
    octet = torch.arange((columns + _OCTET - 1) // _OCTET, device=hidden.device)[None, :]
    words = torch.stack(_philox((octet, row & _WORD, row >> 32, torch.zeros_like(row)), seed), -1)
    bits = torch.stack((words & 0xFFFF, words >> 16), -1).flatten(-3)
    return _replicated_like(hidden, (bits[:, :columns] >= _threshold(dropout_p)).reshape(hidden.shape))


def _philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., SC 2011), each 32-bit word in an int64; counter words broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a product, by halves: the whole of it does not fit an int64."""
    low, high = word * (constant & 0xFFFF), word * (constant >> 16)
    return (high + (low >> 16)) >> 16, (((high & 0xFFFF) << 16) + low) & _WORD


# --- The dispatcher --------------------------------------------------------------------------------------------------


def _fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, dropout_p: float, seed: Tensor | None) -> Tensor:  # noqa: ARG001
    outputs = _outputs(weight)
    sizes = hidden.shape[:-1] if outputs == 1 else (*hidden.shape[:-1], outputs)
    return hidden.new_empty(sizes, dtype=torch.float32)


def _all_gradients(compute: Callable[..., Gradients], *inputs: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
    """Gradients as an operator must return them: an empty tensor where one is not needed."""
    hidden = inputs[1]
    return tuple(hidden.new_empty(0) if gradient is None else gradient for gradient in compute(*inputs))


def _fake_backward(_grad: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
    _, _, needed = rest
    whole = (
        hidden.new_empty(hidden.shape),
        hidden.new_empty(weight.shape, dtype=torch.float32),
        hidden.new_empty(_outputs(weight), dtype=torch.float32),
    )
    return tuple(w if need else hidden.new_empty(0) for w, need in zip(whole, needed, strict=True))


def _register() -> tuple[Any, Any, Any]:
    library: Any = torch.library.Library("vhead", "FRAGMENT")  # type: ignore[no-untyped-call]
    tags = (torch.Tag.pt2_compliant_tag,)
    inputs = "Tensor hidden, Tensor weight, Tensor? bias, float dropout_p, Tensor? seed"
    library.define(f"value_head({inputs}) -> Tensor", tags=tags)
    inputs = "Tensor grad, Tensor hidden, Tensor weight, float dropout_p, Tensor? seed, bool[3] needed"
    library.define(f"value_head_backward({inputs}) -> (Tensor, Tensor, Tensor)", tags=tags)
    if not _SETTINGS.plain_torch:
        library.impl("value_head", _native.value_head, "CPU")
        library.impl("value_head_backward", partial(_all_gradients, _native.value_head_backward), "CPU")
    library.impl("value_head", _plain, "CompositeExplicitAutograd")
    library.impl("value_head_backward", partial(_all_gradients, _plain_backward), "CompositeExplicitAutograd")
    torch.library.register_fake("vhead::value_head", _fake, lib=library)
    torch.library.register_fake("vhead::value_head_backward", _fake_backward, lib=library)
    torch.library.register_autograd("vhead::value_head", _differentiate, setup_context=_save, lib=library)
    if hasattr(torch.library, "register_vmap"):  # torch >= 2.5; before, vmap falls back to a loop
        torch.library.register_vmap("vhead::value_head", _vmap, lib=library)
    operators = torch.ops.vhead
    return library, operators.value_head.default, operators.value_head_backward.default


_LIBRARY, _OPERATOR, _BACKWARD_OPERATOR = _register()
