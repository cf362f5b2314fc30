"""The implementations under measurement, over the same hidden states and the same weights."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import linear
from trl.experimental.ppo.modeling_value_head import ValueHead as TrlValueHead

import vhead
from vhead import ops

DROPOUT = 0.1

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Weights:
    """A head's parameters, float32: `weight` [1, H], `bias` [1]."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def draw(cls, columns: int) -> "Weights":
        """Draws as `nn.Linear` does."""
        layer = torch.nn.Linear(columns, 1)
        return cls(layer.weight.detach(), layer.bias.detach())


@dataclass(frozen=True)
class Peer:
    """One implementation: `at(dropout)` sets it up and gives what maps hidden states [N, H] to N values.

    Dropout 0 is inference. A peer does one thing at a time: `at` replaces what it gave before.
    """

    name: str
    at: Callable[[float], Forward]
    parameters: tuple[Tensor, Tensor]


def trl_head(weights: Weights) -> Peer:
    """TRL 1.12's module: dropout in the hidden dtype, upcast, `nn.Linear`."""
    return _module_peer("trl", TrlValueHead, weights)


def vhead_module(weights: Weights) -> Peer:
    """`vhead.ValueHead`, as a wrapped model calls it."""
    return _module_peer("vhead", vhead.ValueHead, weights)


def _module_peer(name: str, kind: type, weights: Weights) -> Peer:
    head = kind(SimpleNamespace(hidden_size=weights.weight.shape[1], summary_dropout_prob=DROPOUT))
    with torch.no_grad():
        head.summary.weight.copy_(weights.weight)
        head.summary.bias.copy_(weights.bias)

    def at(dropout: float) -> Forward:
        head.train(dropout > 0)
        head.dropout.p = dropout or DROPOUT
        return head

    return Peer(name, at, (head.summary.weight, head.summary.bias))


def vhead_op(weights: Weights) -> Peer:
    """`vhead.ops.value_head`, the function below the module."""
    weight, bias = weights.weight.clone().requires_grad_(), weights.bias.clone().requires_grad_()

    def at(dropout: float) -> Forward:
        return lambda hidden: ops.value_head(hidden, weight, bias, dropout_p=dropout)

    return Peer("vhead.ops", at, (weight, bias))


def plain_torch(weights: Weights) -> Peer:
    """`F.dropout` and `F.linear` on hidden states upcast to float32."""
    weight, bias = weights.weight.clone().requires_grad_(), weights.bias.clone().requires_grad_()

    def at(dropout: float) -> Forward:
        return lambda hidden: linear(functional.dropout(hidden.float(), dropout, training=dropout > 0), weight, bias)

    return Peer("torch", at, (weight, bias))


def all_peers(weights: Weights) -> list[Peer]:
    """Every implementation on one set of weights."""
    return [make(weights) for make in (trl_head, plain_torch, vhead_module, vhead_op)]


def read_passes(hidden: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Ways to read every byte of contiguous hidden states and write next to nothing; the fastest is the limit.

    They look at the bytes as other types, so that no conversion and no NaN slows the pass down.
    """
    rows = hidden.shape[0]
    words, doubles = hidden.view(torch.int32).view(rows, -1), hidden.view(torch.float64).flatten()
    return {
        "read: max of int32 by row": lambda: words.amax(1),
        "read: sum of int64 by row": lambda: hidden.view(torch.int64).view(rows, -1).sum(1),
        "read: float64 dot product": lambda: torch.dot(doubles, doubles),
        "read: max of int16 by row": lambda: hidden.view(torch.int16).view(rows, -1).amax(1),
    }
