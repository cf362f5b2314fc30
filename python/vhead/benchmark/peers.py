"""The implementations under measurement, over the same hidden states and the same weights."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TypeAlias, cast

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import dropout as torch_dropout
from torch.nn.functional import linear

from vhead.heads import ValueHead
from vhead.ops import value_head

DROPOUT = 0.1

Forward: TypeAlias = Callable[[Tensor], Tensor]
Compute: TypeAlias = Callable[[Tensor, Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class Weights:
    """A head's parameters, float32: `weight` [1, H], `bias` [1]."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def draw(cls, columns: int, device: torch.device | None = None) -> "Weights":
        """Draws as `nn.Linear` does, on the CPU, then moves."""
        layer = torch.nn.Linear(columns, 1, device="cpu").to(device or "cpu")
        return cls(layer.weight.detach(), layer.bias.detach())

    def leaves(self) -> tuple[Tensor, Tensor]:
        """Copies of both that gradients are taken of."""
        return self.weight.clone().requires_grad_(), self.bias.clone().requires_grad_()


@dataclass(frozen=True)
class Peer:
    """One implementation: `at(dropout)` sets it up and gives what maps hidden states [N, H] to N values.

    Dropout 0 is inference. A peer does one thing at a time: `at` replaces what it gave before.
    """

    name: str
    at: Callable[[float], Forward]
    parameters: tuple[Tensor, Tensor]


def module_peer(name: str, kind: type[torch.nn.Module], weights: Weights) -> Peer:
    """A module with TRL's constructor, `dropout` and `summary`, as a wrapped model calls it."""
    head = kind(SimpleNamespace(hidden_size=weights.weight.shape[1], summary_dropout_prob=DROPOUT))
    head.to(weights.weight.device)
    summary = head.get_submodule("summary")
    summary.load_state_dict({"weight": weights.weight, "bias": weights.bias})

    def at(dropout: float) -> Forward:
        head.train(dropout > 0)
        cast("torch.nn.Dropout", head.get_submodule("dropout")).p = dropout or DROPOUT
        return head

    return Peer(name, at, (summary.get_parameter("weight"), summary.get_parameter("bias")))


def vhead_module(weights: Weights) -> Peer:
    """`vhead.ValueHead`, as a wrapped model calls it."""
    return module_peer("vhead", ValueHead, weights)


def function_peer(name: str, compute: Compute, weights: Weights) -> Peer:
    """A function of hidden states, weight, bias and dropout."""
    weight, bias = weights.leaves()

    def at(dropout: float) -> Forward:
        return lambda hidden: compute(hidden, weight, bias, dropout)

    return Peer(name, at, (weight, bias))


def vhead_op(weights: Weights) -> Peer:
    """`vhead.ops.value_head`, the function below the module."""
    return function_peer("vhead.ops", lambda x, weight, bias, p: value_head(x, weight, bias, dropout_p=p), weights)


def trl_path(weights: Weights) -> Peer:
    """The steps of TRL's head in plain torch: dropout in the hidden dtype, upcast, `F.linear`."""

    def compute(hidden: Tensor, weight: Tensor, bias: Tensor, dropout: float) -> Tensor:
        return linear(torch_dropout(hidden, dropout, training=dropout > 0).float(), weight, bias)

    return function_peer("trl path", compute, weights)


def compiled(peer: Peer) -> Peer:
    """The same under `torch.compile`, for fixed shapes."""

    def at(dropout: float) -> Forward:
        forward: Forward = torch.compile(peer.at(dropout), dynamic=False)
        return forward

    return Peer(f"{peer.name}, compiled", at, peer.parameters)


def saved_bytes(peer: Peer, hidden: Tensor, dropout: float) -> int:
    """Bytes that autograd keeps between forward and backward, the hidden states and the parameters not counted."""
    leaf = hidden.clone().requires_grad_()
    known = {t.untyped_storage().data_ptr() for t in (leaf, *peer.parameters)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        values = peer.at(dropout)(leaf)
    del values
    return sum(kept.values())
