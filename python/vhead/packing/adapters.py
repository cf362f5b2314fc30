"""Policy and critic as two adapters on one body: which of them a run goes through."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from vhead.errors import AdapterError
from vhead.packing.checkpointing import recomputed_within


def check_adapter(model: nn.Module, argument: str, name: str | None) -> None:
    """Checks that a model has the adapter that an argument names.

    Raises:
        AdapterError: It has not.
    """
    known = getattr(model, "peft_config", None) or {}
    if name is not None and name not in known:
        has = f"the adapters {', '.join(known)}" if known else "no adapters"
        raise AdapterError(f"{argument}: expected one of the model's adapters, got {name!r}; the model has {has}")


def running_adapter(model: Any, name: str | None) -> str | None:
    """The adapter that a run with `name` goes through: this one, or the active one; None where there are none."""
    if name is not None or not getattr(model, "peft_config", None):
        return name
    return str(_active(model))


def adapters_state(model: nn.Module) -> tuple[Any, ...]:
    """What a run goes through in each layer with adapters: which of them, whether they are off, and their scales."""
    layers: Iterator[Any] = model.modules()
    # transformers' whole models have a method of that name.
    adapted = (layer for layer in layers if isinstance(getattr(layer, "disable_adapters", None), bool))
    return tuple(
        (
            layer.disable_adapters,
            repr(layer.active_adapter),
            tuple(getattr(layer, "merged_adapters", ())),
            tuple(getattr(layer, "scaling", {}).items()),
        )
        for layer in adapted
    )


def make_trainable(model: Any, name: str) -> None:
    """Has an adapter be trained: peft trains the active one alone, and freezes the others."""
    active = _active(model)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    trained = [p for p in model.parameters() if p.requires_grad]
    model.set_adapter(name)
    own = [parameter for parameter in frozen if parameter.requires_grad]
    model.set_adapter(active)
    for parameter in frozen:
        parameter.requires_grad = False
    for parameter in (*trained, *own):
        parameter.requires_grad = True


@contextmanager
def using_adapter(model: Any, name: str | None) -> Iterator[None]:
    """Runs a model with this adapter, also where gradient checkpointing runs layers again; None: with the active one.

    What is trained stays what it was.
    """
    if name is None:
        yield
        return
    with _switched(model, name), recomputed_within(model, partial(_switched, model, name)):
        yield


@contextmanager
def _switched(model: Any, name: str) -> Iterator[None]:
    active = _active(model)
    if active == name:
        yield
        return
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        _switch(model, name, trained)
        yield
    finally:
        _switch(model, active, trained)


def _switch(model: Any, name: Any, trained: list[tuple[nn.Parameter, bool]]) -> None:
    model.set_adapter(name)
    for parameter, requires_grad in trained:
        parameter.requires_grad = requires_grad


def _active(model: Any) -> Any:
    active = model.active_adapter
    return active() if callable(active) else active  # A method of transformers' models, a property of peft's.
