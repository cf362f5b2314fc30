"""Gated feed-forward layers, `down(silu(gate(x)) * up(x))`, without the large tensors between their products.

On a CPU the large tensors of a batch come from fresh pages, whose first touch costs as much as the arithmetic on them.
Where the processor has a matrix unit, bfloat16 layers keep what is between their products in its cache; else two of the
four tensors are used again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from vhead.ops.matrix_unit import GatedLayers, suits_matrix_unit

_PARTS = ("gate_proj", "up_proj", "down_proj")
# Rows from which on the matrix unit is asked: with fewer, packing the weights for it takes longer than what is saved.
UNIT_ROWS = 1024
# transformers' own class, by name, since it moved between versions.
_SILU = ("SiLU", "SiLUActivation")


@contextmanager
def in_place_gates(model: nn.Module, unit_rows: int = UNIT_ROWS) -> Iterator[None]:
    """Lets a model's gated layers work in place while the block runs; without gradients only.

    Args:
        model: The model.
        unit_rows: Rows of a batch from which on the matrix unit is asked, where there is one.
    """
    layers = [module for module in model.modules() if is_gated(module)]
    unit = GatedLayers()
    try:
        for layer in layers:
            layer.forward = (
                partial(_by_unit, layer, unit, unit_rows) if _suits_unit(layer) else partial(_forward, layer)
            )
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


def uses_matrix_unit(model: nn.Module) -> bool:
    """Whether the matrix unit computes some of a model's gated layers while they work in place."""
    return any(is_gated(module) and _suits_unit(module) for module in model.modules())


def _suits_unit(layer: Any) -> bool:
    parts = [getattr(layer, name) for name in _PARTS]
    return all(part.bias is None for part in parts) and suits_matrix_unit(*(part.weight for part in parts))


def _by_unit(layer: Any, unit: GatedLayers, unit_rows: int, states: Tensor) -> Tensor:
    if states.dtype != layer.gate_proj.weight.dtype or states.shape[:-1].numel() < unit_rows:
        return _forward(layer, states)
    return unit(states, layer.gate_proj.weight, layer.up_proj.weight, layer.down_proj.weight)


def _forward(layer: Any, states: Tensor) -> Tensor:
    gate = functional.silu(layer.gate_proj(states), inplace=True)
    gate *= layer.up_proj(states)
    output: Tensor = layer.down_proj(gate)
    return output
