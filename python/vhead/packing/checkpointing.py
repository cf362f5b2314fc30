"""Layers that gradient checkpointing computes again in backward, under what held when they ran first."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from torch import nn

# What transformers' modules call a layer through while gradient checkpointing is on.
_CHECKPOINTING = "_gradient_checkpointing_func"

Within = Callable[[], AbstractContextManager[None]]


@contextmanager
def recomputed_within(model: nn.Module, within: Within) -> Iterator[None]:
    """Has what a model's layers compute again, later and maybe in another thread, run within a context too.

    Args:
        model: The model, which runs while the block lasts.
        within: Makes the context.
    """
    modules = [module for module in model.modules() if _CHECKPOINTING in module.__dict__]
    own = [module.__dict__[_CHECKPOINTING] for module in modules]
    try:
        for module, checkpoint in zip(modules, own, strict=True):
            setattr(module, _CHECKPOINTING, partial(_checkpoint, checkpoint, within))
        yield
    finally:
        for module, checkpoint in zip(modules, own, strict=True):
            setattr(module, _CHECKPOINTING, checkpoint)


def _checkpoint(
    checkpoint: Callable[..., Any], within: Within, layer: Callable[..., Any], *arguments: Any, **named: Any
) -> Any:
    def run(*arguments: Any, **named: Any) -> Any:
        with within():
            return layer(*arguments, **named)

    return checkpoint(run, *arguments, **named)
