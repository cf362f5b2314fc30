"""Which way a call takes: native kernels, plain torch, or the dispatcher; and how an operation is registered with it.

An operation is registered with the dispatcher for everything that watches, traces or transforms operations (compile,
export, dispatch modes, fake tensors). Plain eager tensors take a shorter way to the same kernel: one call into the
extension, wrapped in an autograd function where a gradient is needed.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, TypeAlias, TypeGuard, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from vhead.ops.arguments import seed_tensor
from vhead.ops.devices import DISPATCH_KEYS, SETTINGS, has_kernels
from vhead.upstream import available

Gradients: TypeAlias = tuple[Tensor | None, ...]

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_KERNEL_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def _private(name: str) -> Callable[[], Any]:
    """A function of `torch._C` that has no public name; where a release lacks it, everything takes the long way."""
    if not available(f"torch._C.{name}"):
        return lambda: 1
    return cast("Callable[[], Any]", attrgetter(name)(torch._C))


_dispatch_modes = _private("_len_torch_dispatch_stack")
_functorch_layer = _private("_functorch.peek_interpreter_stack")
_tracing_state = _private("_get_tracing_state")


def intercepted() -> bool:
    """Whether something watches or transforms operations, so that a kernel must not go behind its back."""
    return bool(_dispatch_modes() or _functorch_layer() is not None or _tracing_state() is not None or forward_mode())


def forward_mode() -> bool:
    """Whether forward-mode differentiation is on."""
    return forward_ad._current_level >= 0


def _is_of_kernels(tensor: Tensor) -> bool:
    """Whether the kernels' dtypes and kinds include this tensor, wherever it is.

    Subclasses such as DTensor know torch's own operations, not this one; the tracers' own kinds know every operation.
    """
    return tensor.dtype != torch.float64 and (is_plain(tensor) or is_traced(tensor))


def _go_straight_to_kernels(tensors: list[Any]) -> bool:
    """Whether these are plain tensors on one device, of dtypes and a device that have kernels, and nothing watches."""
    if is_dynamo_compiling() or SETTINGS.plain_torch or not all(_suits_kernels(tensor) for tensor in tensors):
        return False
    device = tensors[0].device
    return all(x.device == device for x in tensors) and not intercepted() and has_kernels(tensors[0])


def _suits_kernels(tensor: object) -> bool:
    return is_plain(tensor) and tensor.dtype in _KERNEL_DTYPES and tensor.layout == torch.strided


def in_functorch() -> bool:
    """Whether one of `torch.func`'s transforms is on."""
    return not is_dynamo_compiling() and _functorch_layer() is not None


def is_traced(tensor: Tensor) -> bool:
    """Whether a tensor is of a tracer's own kind."""
    return isinstance(tensor, FakeTensor | FunctionalTensor)


def is_plain(tensor: object) -> TypeGuard[Tensor]:
    """Whether this is a tensor, and no subclass."""
    return type(tensor) in _PLAIN_TYPES


def _resolved(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The tensors as they lie in memory, which the dispatcher sees to only for operators."""
    return tuple(x.resolve_neg() if isinstance(x, Tensor) else x for x in inputs)


def own_precision(hidden: Tensor) -> AbstractContextManager[object]:
    """No autocast."""
    kind = hidden.device.type
    return torch.autocast(kind, enabled=False) if _has_autocast(kind) else nullcontext()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


@dataclass(frozen=True)
class Implementation:
    """What an operation computes, each way.

    Every function takes the operator's arguments in order: tensors, then `dropout_p` and `seed`; those of the backward
    pass the gradient, the saved tensors, `dropout_p`, `seed`, and which gradients are needed. `forward` and `backward`
    run on every device that has this package's kernels, the plain ones anywhere. `check` takes the tensors alone, and
    raises where they do not fit.
    """

    name: str
    tensors: str
    saved: str
    check: Callable[..., None]
    forward: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    backward: Callable[..., Gradients]
    plain_backward: Callable[..., Gradients]
    fake: Callable[..., Tensor]
    fake_gradients: Callable[..., tuple[Tensor, ...]]


class Operation:
    """A registered operation: calling it takes the way that fits the (checked) arguments."""

    def __init__(self, implementation: Implementation) -> None:
        self._of = implementation
        self.title = "".join(part.title() for part in implementation.name.split("_"))
        self._tensors = [_argument_name(x) for x in implementation.tensors.split(", ")]
        self._saved = [self._tensors.index(_argument_name(x)) for x in implementation.saved.split(", ")]
        self._library = self._register()
        operators = torch.ops.vhead
        self.operator = getattr(operators, implementation.name).default
        self.backward_operator = getattr(operators, f"{implementation.name}_backward").default
        self._function, self._transformed = _functions(self)

    def __call__(self, *inputs: Any) -> Tensor:
        """The way that fits."""
        *arguments, dropout_p, seed = inputs
        tensors = [x for x in arguments if x is not None]
        straight = _go_straight_to_kernels(tensors)
        if not straight:
            # The extension looks at every argument itself; nobody else does.
            self._of.check(*arguments)
        inputs = (*arguments, dropout_p, seed_tensor(dropout_p, seed, arguments[0].device))
        return self._recorded(tensors, inputs) if straight else self._long_way(tensors, inputs)

    def _long_way(self, tensors: list[Tensor], inputs: tuple[Any, ...]) -> Tensor:
        if SETTINGS.plain_torch or forward_mode() or not all(_is_of_kernels(tensor) for tensor in tensors):
            return self._of.plain(*inputs)
        if is_dynamo_compiling():
            return cast("Tensor", self.operator(*inputs))
        if _functorch_layer() is not None:
            return cast("Tensor", self._transformed.apply(*inputs))
        if intercepted() or not all(is_plain(tensor) for tensor in tensors):
            return cast("Tensor", self.operator(*inputs))
        return self._recorded(tensors, inputs)

    def _recorded(self, tensors: list[Tensor], inputs: tuple[Any, ...]) -> Tensor:
        """Forward on plain tensors, with a graph where one is needed."""
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return cast("Tensor", self._function.apply(*inputs))
        return self.eager(*inputs)

    def eager(self, *inputs: Any) -> Tensor:
        """Forward on plain tensors, without a graph: by the device's kernels where it has some, else plain."""
        return self._of.forward(*_resolved(inputs)) if has_kernels(inputs[0]) else self._of.plain(*inputs)

    def eager_backward(self, *inputs: Any) -> Gradients:
        """Gradients in the same way."""
        return self._of.backward(*_resolved(inputs)) if has_kernels(inputs[1]) else self._of.plain_backward(*inputs)

    def save(self, ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps for backward what it needs."""
        *_, dropout_p, seed = inputs
        ctx.save_for_backward(*(inputs[i] for i in self._saved), seed)
        ctx.dropout_p = dropout_p

    def differentiate(self, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients for the operator's arguments."""
        *saved, seed = ctx.saved_tensors
        needed = tuple(ctx.needs_input_grad[: len(self._tensors)])
        # Autograd itself casts a gradient to its parameter's dtype.
        return *self._gradients(grad, *saved, ctx.dropout_p, seed, needed), None, None

    def _gradients(self, *inputs: Any) -> Gradients:
        """Gradients where needed, by differentiable operations where they may be asked again."""
        tensors = [x for x in inputs[: len(self._saved) + 1] if x is not None]
        differentiable = torch.is_grad_enabled() or (not is_dynamo_compiling() and _functorch_layer() is not None)
        if differentiable or SETTINGS.plain_torch:
            return self._of.plain_backward(*inputs)
        if is_dynamo_compiling() or intercepted() or not all(is_plain(tensor) for tensor in tensors):
            gradients = self.backward_operator(*inputs)
            return tuple(g if n else None for g, n in zip(gradients, inputs[-1], strict=True))
        return self.eager_backward(*inputs)

    def vmap(self, info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        """The loop over samples that vmap means, as one call where that numbers the mask's rows the same way."""
        hidden, *_, seed = inputs
        if seed is None and in_dims[0] is not None and all(dim is None for dim in in_dims[1:]):
            return self(hidden.movedim(in_dims[0], 0), *inputs[1:]), 0
        samples = [
            self(*(x if dim is None else x.select(dim, i) for x, dim in zip(inputs, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        return torch.stack(samples), 0

    def _register(self) -> Any:
        of = self._of
        library: Any = torch.library.Library("vhead", "FRAGMENT")  # type: ignore[no-untyped-call]
        rest, count = "float dropout_p, Tensor? seed", len(self._tensors)
        results = ", ".join(["Tensor"] * count)
        tags = (torch.Tag.pt2_compliant_tag,)
        library.define(f"{of.name}({of.tensors}, {rest}) -> Tensor", tags=tags)
        inputs = f"Tensor grad, {of.saved}, {rest}, bool[{count}] needed"
        library.define(f"{of.name}_backward({inputs}) -> ({results})", tags=tags)
        for key in DISPATCH_KEYS.values() if not SETTINGS.plain_torch else ():
            library.impl(of.name, self.eager, key)
            library.impl(f"{of.name}_backward", partial(_all_gradients, self.eager_backward), key)
        library.impl(of.name, of.plain, "CompositeExplicitAutograd")
        library.impl(f"{of.name}_backward", partial(_all_gradients, of.plain_backward), "CompositeExplicitAutograd")
        name = f"vhead::{of.name}"
        torch.library.register_fake(name, of.fake, lib=library)
        torch.library.register_fake(f"{name}_backward", partial(_fake_gradients, of.fake_gradients), lib=library)
        torch.library.register_autograd(name, self.differentiate, setup_context=self.save, lib=library)
        if hasattr(torch.library, "register_vmap"):  # torch >= 2.5; before, vmap falls back to a loop
            torch.library.register_vmap(name, self.vmap, lib=library)
        return library


def _argument_name(declaration: str) -> str:
    return declaration.rpartition(" ")[2]


def _all_gradients(compute: Callable[..., Gradients], *inputs: Any) -> tuple[Tensor, ...]:
    """Gradients as an operator must return them: an empty tensor where one is not needed."""
    hidden = inputs[1]
    return tuple(hidden.new_empty(0) if gradient is None else gradient for gradient in compute(*inputs))


def _fake_gradients(every: Callable[..., tuple[Tensor, ...]], *inputs: Any) -> tuple[Tensor, ...]:
    hidden, needed = inputs[1], inputs[-1]
    return tuple(g if need else hidden.new_empty(0) for g, need in zip(every(*inputs[1:-3]), needed, strict=True))


def _functions(operation: Operation) -> tuple[Any, Any]:
    """Autograd functions: for eager tensors, and for `torch.func`'s transforms.

    The eager one has the `forward(ctx, ...)` form, which costs some 17 us a call less than one with `setup_context`;
    transforms ask for that and for a rule for vmap.
    """

    def forward(ctx: Any, *inputs: Any) -> Tensor:
        values = operation.eager(*inputs)
        operation.save(ctx, inputs, values)
        return values

    def transformed(*inputs: Any) -> Tensor:
        return cast("Tensor", operation.operator(*inputs))

    backward = staticmethod(operation.differentiate)
    rules = {"setup_context": staticmethod(operation.save), "vmap": staticmethod(operation.vmap), "backward": backward}
    # The names that graphs show.
    return (
        type(
            f"_{operation.title}", (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": backward}
        ),
        type(
            f"_Transformed{operation.title}",
            (torch.autograd.Function,),
            {"forward": staticmethod(transformed), **rules},
        ),
    )
