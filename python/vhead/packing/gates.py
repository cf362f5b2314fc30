"""Layers that are computed by this package's kernels while a model runs: gated feed-forward layers, and norms.

Gated layers, `down(silu(gate(x)) * up(x))`, go without the large tensors between their products.

On a CPU the large tensors of a batch come from fresh pages, whose first touch costs as much as the arithmetic on them.
Where the processor has a matrix unit, bfloat16 layers keep what is between their products in its cache; else two of the
four tensors are used again.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

from torch import Tensor, nn
from torch.nn import functional

from vhead.ops.matrix_unit import GatedLayers, suits_matrix_unit
from vhead.packing import norms

_PARTS = ("gate_proj", "up_proj", "down_proj")
# Rows from which on the matrix unit is asked: with fewer, packing the weights for it takes longer than what is saved.
UNIT_ROWS = 1024
# transformers' own class, by name, since it moved between versions.
_SILU = ("SiLU", "SiLUActivation")


@dataclass(frozen=True, slots=True)
class Fused:
    """Which of a model's modules are computed by kernels of this package.

    Attributes:
        gates: Gated layers.
        norms: Root-mean-square norms.
    """

    gates: tuple[nn.Module, ...] = ()
    norms: tuple[nn.Module, ...] = ()

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """The modules that are recognised; whether the model's states stay the same, a check has to show."""
        modules = list(model.modules())
        return cls(tuple(filter(is_gated, modules)), tuple(m for m in modules if is_untouched(m) and norms.is_norm(m)))

    def __bool__(self) -> bool:
        return bool(self.gates or self.norms)

    def described(self, model: nn.Module) -> str:
        """How many modules of each kind, among those that look alike."""
        modules = list(model.modules())
        kinds = {"gated layers": (self.gates, looks_gated), "norms": (self.norms, norms.looks_like_norm)}
        counts = {name: (len(own), sum(map(looks, modules))) for name, (own, looks) in kinds.items()}
        return ", ".join(f"{own} of {alike} {name}" for name, (own, alike) in counts.items() if alike)

    @contextmanager
    def running(self, unit_rows: int = UNIT_ROWS) -> Iterator[None]:
        """Lets the modules compute so while the block runs; without gradients only.

        A module that was given a hook or another forward since is left alone.

        Args:
            unit_rows: Rows of a batch from which on the matrix unit is asked for gated layers, where there is one.
        """
        unit = GatedLayers()
        layers = [layer for layer in self.gates if is_gated(layer)]
        plain = [norm for norm in self.norms if is_untouched(norm)]
        try:
            for layer in layers:
                layer.forward = (
                    partial(_by_unit, layer, unit, unit_rows) if _suits_unit(layer) else partial(_forward, layer)
                )
            for norm in plain:
                norm.forward = partial(norms.forward, norm)
            yield
        finally:
            for module in (*layers, *plain):
                module.__dict__.pop("forward", None)


def is_gated(module: nn.Module) -> bool:
    """Whether a layer looks like `down(silu(gate(x)) * up(x))` of plain projections; a check has to show that it is."""
    children = dict(module.named_children())
    if set(children) != {*_PARTS, "act_fn"} or not all(map(is_untouched, (module, *children.values()))):
        return False
    return type(children["act_fn"]).__name__ in _SILU and all(type(children[part]) is nn.Linear for part in _PARTS)


def looks_gated(module: nn.Module) -> bool:
    """Whether a module has the projections of a gated layer, of whatever kind."""
    return all(hasattr(module, part) for part in _PARTS)


def uses_matrix_unit(layers: Iterable[nn.Module]) -> bool:
    """Whether the matrix unit computes some of these gated layers."""
    return any(map(_suits_unit, layers))


def is_untouched(module: nn.Module) -> bool:
    """Whether calling a module runs its class's forward and nothing else."""
    return not ("forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks)


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
