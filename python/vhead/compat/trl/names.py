"""What trl exported about value heads, and where, in every release from 0.8 to 1.12."""

import importlib

CAUSAL = "AutoModelForCausalLMWithValueHead"
SEQ2SEQ = "AutoModelForSeq2SeqLMWithValueHead"
WRAPPER = "PreTrainedModelWrapper"
REFERENCE = "create_reference_model"
SUPPORTED = "SUPPORTED_ARCHITECTURES"

_CLASSES = (CAUSAL, SEQ2SEQ, WRAPPER)
_EXPORTED = (*_CLASSES, REFERENCE, SUPPORTED)

# The union over the releases: a path that the installed trl lacks is provided all the same.
NAMES: dict[str, tuple[str, ...]] = {
    "trl": _EXPORTED,
    "trl.models": _EXPORTED,
    "trl.models.modeling_base": (WRAPPER, REFERENCE),
    "trl.models.modeling_value_head": ("ValueHead", *_CLASSES),
    "trl.models.utils": (CAUSAL, SEQ2SEQ, REFERENCE, SUPPORTED),
    "trl.experimental": (),
    "trl.experimental.ppo": _CLASSES,
    "trl.experimental.ppo.modeling_value_head": ("ValueHead", *_CLASSES),
    "trl.experimental.utils": (REFERENCE,),
}

# The submodules that trl's lazy modules import when they are first read as attributes.
LAZY_SUBMODULES: dict[str, tuple[str, ...]] = {
    "trl": ("models",),
    "trl.models": ("modeling_base", "modeling_value_head", "utils"),
}

# What vhead itself calls the same.
OWN_NAMES = ("ValueHead", *_CLASSES, REFERENCE)


def value_of(name: str) -> object:
    """What vhead has for a name of trl's; imports torch and transformers on first use."""
    if name == SUPPORTED:
        return (value_of(CAUSAL), value_of(SEQ2SEQ))
    return getattr(importlib.import_module("vhead"), name)


def look_up(module: str, name: str) -> object:
    """What a module of the table holds under a name.

    Raises:
        KeyError: It holds nothing of that name.
    """
    if name in NAMES[module]:
        return value_of(name)
    if name in LAZY_SUBMODULES.get(module, ()):
        return importlib.import_module(f"{module}.{name}")
    raise KeyError(name)


def own_values() -> dict[int, str]:
    """The names of vhead's objects that have been handed out, by identity; imports nothing."""
    # The package keeps what it has once imported in its namespace.
    loaded = vars(importlib.import_module("vhead"))
    return {id(loaded[name]): name for name in OWN_NAMES if name in loaded}
