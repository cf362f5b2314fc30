"""Modules that this package computes while a model runs: gated feed-forward layers, norms, linear and decoder layers.

Gated layers, `down(silu(gate(x)) * up(x))`, go without the large tensors between their products.

On a CPU the large tensors of a batch come from fresh pages, whose first touch costs as much as the arithmetic on them.
Where the processor has a matrix unit, bfloat16 layers keep what is between their products in its cache; else two of the
four tensors are used again.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

from torch import Tensor, nn
from torch.nn import functional

from vhead.ops.matrix_unit import GatedLayers, suits_matrix_unit
from vhead.packing import layers, norms, products

_PARTS = ("gate_proj", "up_proj", "down_proj")
# Rows from which on the matrix unit is asked: with fewer, packing the weights for it takes longer than what is saved.
UNIT_ROWS = 1024
# transformers' own class, by name, since it moved between versions.
_SILU = ("SiLU", "SiLUActivation")


@dataclass(frozen=True, slots=True)
class Fused:
    """Which of a model's modules are computed by this package.

    Attributes:
        gates: Gated layers.
        norms: Root-mean-square norms.
        linears: Linear layers of a half precision, multiplied in float32 because that is faster here.
        layers: Decoder layers, in place along packed rows.
        gives_tuples: Whether the decoder layers' own forward gives its states in a tuple, as in older transformers.
        last: The last decoder layer, if it may compute the rows that are read alone.
    """

    gates: tuple[nn.Module, ...] = ()
    norms: tuple[nn.Module, ...] = ()
    linears: tuple[nn.Linear, ...] = ()
    layers: tuple[nn.Module, ...] = ()
    gives_tuples: bool = False
    last: nn.Module | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """The modules that are recognised; whether the model's states stay the same, a check has to show."""
        plain = [module for module in model.modules() if is_untouched(module)]
        gates, own_norms, own_layers = (
            tuple(filter(is_kind, plain)) for is_kind in (is_gated, norms.is_norm, _is_layer)
        )
        return cls(gates, own_norms, products.wide_linears(model, plain), own_layers)

    def __bool__(self) -> bool:
        return bool(self.gates or self.norms or self.linears or self.layers)

    @property
    def products(self) -> str:
        """How half precisions are multiplied, where that is not torch's own way."""
        if not self.linears:
            return ""
        return (
            f"of {len(self.linears)} linear layers in float32, which is faster here than torch's own of half precisions"
        )

    def described(self, model: nn.Module) -> str:
        """How many modules of each kind, among those that look alike."""
        modules = list(model.modules())
        kinds = {
            "gated layers": (self.gates, looks_gated),
            "norms": (self.norms, norms.looks_like_norm),
            "decoder layers": (self.layers, layers.looks_like_layer),
        }
        counts = {name: (len(own), sum(map(looks, modules))) for name, (own, looks) in kinds.items()}
        return ", ".join(f"{own} of {alike} {name}" for name, (own, alike) in counts.items() if alike)

    @contextmanager
    def running(self, unit_rows: int = UNIT_ROWS, rows: Tensor | None = None) -> Iterator[None]:
        """Lets the modules compute so while the block runs; without gradients only.

        A module that was given a hook or another forward since is left alone.

        Args:
            unit_rows: Rows of a batch from which on the matrix unit is asked for gated layers, where there is one.
            rows: The rows of a packed row whose last states are wanted; None: all.
        """
        forwards = dict(self._forwards(unit_rows, rows))
        try:
            for module, forward in forwards.items():
                module.forward = forward
            yield
        finally:
            for module in forwards:
                module.__dict__.pop("forward", None)

    def selects_rows(self, model: nn.Module) -> bool:
        """Whether the last layer computes the wanted rows alone: nobody listens to what any module computes."""
        return any(layer is self.last for layer in self.layers) and all(map(is_untouched, model.modules()))

    def _forwards(self, unit_rows: int, rows: Tensor | None) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
        unit, wide = GatedLayers(), products.WideProducts()
        for linear in filter(is_untouched, self.linears):
            yield linear, partial(products.forward, linear, wide)
        for gate in filter(is_gated, self.gates):
            yield gate, partial(_by_unit, gate, unit, unit_rows) if _suits_unit(gate) else partial(_forward, gate)
        for norm in filter(is_untouched, self.norms):
            yield norm, partial(norms.forward, norm)
        for layer in filter(_is_layer, self.layers):
            yield layer, partial(layers.forward, layer, rows if layer is self.last else None, self.gives_tuples)


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
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not ("forward" in module.__dict__ or any(hooks))


def _is_layer(module: Any) -> bool:
    return is_untouched(module) and layers.is_layer(module) and is_untouched(module.self_attn)


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
