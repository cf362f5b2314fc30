"""Errors against float64."""

from collections.abc import Callable

import torch
from torch import Tensor

from vhead import ops
from vhead.benchmark.peers import Peer, Weights

Exact = tuple[Tensor, Tensor, Tensor]


def exact(hidden: Tensor, weights: Weights, grad_values: Tensor, keep: Tensor | float = 1.0) -> Exact:
    """Values and the gradients of hidden states, weight and bias in float64; `keep` is mask and scale in one."""
    x, w, g = hidden.double(), weights.weight.double().flatten(), grad_values.double()
    kept = x * keep
    return kept @ w + weights.bias.double(), g[:, None] * w * keep, g @ kept


def computed(peer: Peer, hidden: Tensor, grad_values: Tensor, dropout: float) -> tuple[Tensor, ...]:
    """What a peer gives for the same three."""
    leaf = hidden.clone().requires_grad_()
    values = peer.at(dropout)(leaf)
    return values.detach(), *torch.autograd.grad(values, (leaf, peer.parameters[0]), grad_values.view_as(values))


def torch_mask(hidden: Tensor, dropout: float, seed: int, dtype: torch.dtype) -> Tensor:
    """The mask and scale that `nn.Dropout` draws after `manual_seed(seed)`, float64."""
    torch.manual_seed(seed)
    ones = torch.nn.functional.dropout(torch.ones_like(hidden, dtype=dtype), dropout)
    return (ones != 0).double() / (1 - dropout)


def vhead_mask(hidden: Tensor, dropout: float, seed: int) -> Tensor:
    """The mask and scale that the op draws after `manual_seed(seed)`, float64.

    It is the gradient of the sum of the values for weights of one, from the plain torch twin.
    """
    torch.manual_seed(seed)
    leaf = torch.ones_like(hidden, dtype=torch.float64).requires_grad_()
    ops.value_head_plain(leaf, torch.ones(hidden.shape[1], dtype=torch.float64), dropout_p=dropout).sum().backward()
    return leaf.grad


def errors(peer: Peer, hidden: Tensor, weights: Weights, dropout: float, seed: int) -> list[dict[str, object]]:
    """Largest and root-mean-square error of values and gradients, one row each."""
    grad_values = torch.randn(hidden.shape[0], generator=torch.Generator().manual_seed(seed))
    keep: Tensor | float = 1.0
    if dropout:
        masked: Callable[[], Tensor] = {
            "trl": lambda: torch_mask(hidden, dropout, seed, hidden.dtype),
            "torch": lambda: torch_mask(hidden, dropout, seed, torch.float32),
        }.get(peer.name, lambda: vhead_mask(hidden, dropout, seed))
        keep = masked()
    torch.manual_seed(seed)
    got = computed(peer, hidden, grad_values, dropout)
    want = exact(hidden, weights, grad_values, keep)
    names = ("values", "grad_hidden", "grad_weight")
    return [_row(name, a, b) for name, a, b in zip(names, got, want, strict=True)]


def bias_errors(peer: Peer, hidden: Tensor, dropout: float, draws: int) -> dict[str, object]:
    """Error of the bias's gradient over many draws: it is a single number, and one draw says nothing."""
    got, want = [], []
    for seed in range(draws):
        grad_values = torch.randn(hidden.shape[0], generator=torch.Generator().manual_seed(seed))
        values = peer.at(dropout)(hidden)
        got += torch.autograd.grad(values, peer.parameters[1], grad_values.view_as(values))
        want.append(grad_values.double().sum())
    return _row("grad_bias", torch.cat(got), torch.stack(want))


def _row(name: str, got: Tensor, want: Tensor) -> dict[str, object]:
    difference = got.double().flatten() - want.flatten()
    return {
        "what": name,
        "max_error": difference.abs().max().item(),
        "rms_error": difference.square().mean().sqrt().item(),
    }
