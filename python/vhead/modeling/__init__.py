"""Language models with a value head: the classes that TRL deleted, and a `PreTrainedModel` of the same two modules."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vhead.modeling.reference_model import create_reference_model
    from vhead.modeling.wrapper import (
        AutoModelForCausalLMWithValueHead,
        AutoModelForSeq2SeqLMWithValueHead,
        PreTrainedModelWrapper,
        ValueHeadOutput,
        ValueHeadOutputWithCache,
    )

__all__ = [
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "PreTrainedModelWrapper",
    "ValueHeadOutput",
    "ValueHeadOutputWithCache",
    "create_reference_model",
]

_HOME = dict.fromkeys(__all__, "wrapper") | {"create_reference_model": "reference_model"}


def __getattr__(name: str) -> object:
    """Imports on first use: a module of this package does not bring all of the others along."""
    if name not in _HOME:
        raise AttributeError(f"module 'vhead.modeling' has no attribute {name!r}")
    return getattr(importlib.import_module(f"vhead.modeling.{_HOME[name]}"), name)
