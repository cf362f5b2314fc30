"""Gated feed-forward layers that reuse their memory: `down(act(gate(x)) * up(x))` with two large tensors and not four.

On a CPU the large tensors of a batch come from fresh pages, whose first touch costs as much as the arithmetic on them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

_PARTS = ("gate_proj", "up_proj", "down_proj")
# transformers' own class, by name, since it moved between versions.
_SILU = ("SiLU", "SiLUActivation")


@contextmanager
def in_place_gates(model: nn.Module) -> Iterator[None]:
    """Lets a model's gated layers work in place while the block runs; without gradients only."""
    layers = [module for module in model.modules() if is_gated(module)]
    try:
        for layer in layers:
            layer.forward = partial(_forward, layer)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def is_gated(module: nn.Module) -> bool:
    """Whether a layer looks like `down(silu(gate(x)) * up(x))` of plain projections; a check has to show that it is."""
    children = dict(module.named_children())
    if "forward" in module.__dict__ or set(children) != {*_PARTS, "act_fn"}:
        return False
    return type(children["act_fn"]).__name__ in _SILU and all(type(children[part]) is nn.Linear for part in _PARTS)


def _forward(layer: Any, states: Tensor) -> Tensor:
    gate = functional.silu(layer.gate_proj(states), inplace=True)
    gate *= layer.up_proj(states)
    output: Tensor = layer.down_proj(gate)
    return output
