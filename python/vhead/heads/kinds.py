"""The kinds of head: how each is built, and the operation that computes its values."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from vhead import ops
from vhead.errors import HeadError
from vhead.head_weights import HeadWeights


@dataclass(frozen=True)
class HeadKind:
    """One kind of head: the module that holds its weights, and the operation that computes values from them.

    Attributes:
        name: The stem of its operation in every layer, such as `two_layer`.
        places: Where its projections are below `summary`, first the one that reads the hidden state; "" is `summary`
            itself.
        build: Makes `summary` from the sizes around its projections, from H to K; its weights are not yet drawn.
        is_plain: Whether a `summary` is of this kind, and reading its weights gives what calling it would.
        values: Maps hidden states `[..., H]`, a plain `summary` and a dropout probability to float32 `[..., K]`.
    """

    name: str
    places: tuple[str, ...]
    build: Callable[[Sequence[int]], nn.Module]
    is_plain: Callable[[Any], bool]
    values: Callable[[Tensor, Any, float], Tensor]


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether reading the module's weights gives what calling it would: no adapter, no quantisation, no hook."""
    return type(module) is nn.Linear and _is_plain(module)


def _is_plain(module: nn.Module) -> bool:
    return not ("forward" in module.__dict__ or module._forward_pre_hooks or module._forward_hooks)


def _linear(sizes: Sequence[int]) -> nn.Linear:
    inputs, outputs = sizes
    # Built on meta first: nn.Linear's own initialisation would draw from torch's generator in vain.
    return nn.Linear(inputs, outputs, dtype=torch.float32, device="meta").to_empty(device=torch.empty(0).device)


def _value_head(hidden_states: Tensor, summary: nn.Linear, dropout_p: float) -> Tensor:
    weight = summary.weight
    values = ops.value_head(hidden_states.to(weight.device), weight, summary.bias, dropout_p=dropout_p)
    return values.unsqueeze(-1) if weight.shape[0] == 1 else values


def _two_linears(sizes: Sequence[int]) -> nn.Sequential:
    width, intermediate, outputs = sizes
    return nn.Sequential(_linear([width, intermediate]), nn.ReLU(), _linear([intermediate, outputs]))


def _is_two_plain_linears(module: nn.Module) -> bool:
    return (
        type(module) is nn.Sequential
        and len(module) == 3
        and type(module[1]) is nn.ReLU
        and _is_plain(module)
        and _is_plain(module[1])
        and is_plain_linear(module[0])
        and is_plain_linear(module[2])
    )


def _two_layer(hidden_states: Tensor, summary: Any, dropout_p: float) -> Tensor:
    first, _, second = summary
    hidden_states = hidden_states.to(first.weight.device)
    values = ops.value_head_two_layer(
        hidden_states, first.weight, first.bias, second.weight, second.bias, dropout_p=dropout_p
    )
    return values.unsqueeze(-1) if second.out_features == 1 else values


# A new kind of head is one more entry, with a number of projections of its own. The first is by far the most frequent.
HEAD_KINDS = [
    HeadKind("value_head", ("",), _linear, is_plain_linear, _value_head),
    HeadKind("two_layer", ("0", "2"), _two_linears, _is_two_plain_linears, _two_layer),
]


def head_for(weights: HeadWeights) -> HeadKind:
    """The kind of head that a trained head's weights are of.

    Raises:
        HeadError: There is none with so many projections.
    """
    return kind_with(len(weights.layers), weights.source)


def kind_with(projections: int, source: str) -> HeadKind:
    """The kind of head that has so many projections.

    Raises:
        HeadError: There is none.
    """
    for kind in HEAD_KINDS:
        if len(kind.places) == projections:
            return kind
    known = ", ".join(f"{kind.name} ({len(kind.places)})" for kind in HEAD_KINDS)
    raise HeadError(f"{source}: expected a head with as many projections as one of {known}, found {projections}")


def kind_of(summary: nn.Module) -> HeadKind:
    """Which kind a head's `summary` is of, whatever an adapter or a sharding library has wrapped around its parts."""
    if hasattr(summary, "weight"):
        return HEAD_KINDS[0]
    fitting = [kind for kind in HEAD_KINDS if summary._modules.keys() >= set(kind.places)]
    return max(fitting, key=lambda kind: len(kind.places))


def plain_kind(summary: nn.Module) -> HeadKind | None:
    """The kind whose operation computes what calling `summary` would, or None where modules must be called."""
    for kind in HEAD_KINDS:
        if kind.is_plain(summary):
            return kind
    return None
