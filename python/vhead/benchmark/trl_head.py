"""TRL's own head, where a release that has one is installed: the only place of the package that imports trl."""

import importlib
import os
import re
from types import ModuleType

import torch

from vhead.benchmark.machine import installed_version
from vhead.benchmark.peers import Peer, Weights, module_peer

# The first release without a value head.
_WITHOUT = (1, 13)


def trl_head(weights: Weights) -> Peer:
    """TRL's module: dropout in the hidden dtype, upcast, `nn.Linear`."""
    return module_peer("trl", _trl_module().ValueHead, weights)


def trl_model() -> type[torch.nn.Module]:
    """TRL's `AutoModelForCausalLMWithValueHead`.

    Raises:
        ImportError: The installed release has none, or there is no trl.
    """
    kind: type[torch.nn.Module] = _trl_module().AutoModelForCausalLMWithValueHead
    return kind


def trl_absence() -> str | None:
    """Why TRL's own head cannot be measured; None where it can."""
    version = installed_version("trl")
    if version is None:
        return "trl is not installed"
    release = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if release >= _WITHOUT:
        return f"trl {version} has no value head"
    try:
        _trl_module()
    except (ImportError, RuntimeError) as error:
        return f"trl {version} cannot be imported: {str(error).partition(chr(10))[0]}"
    return None


def _trl_module() -> ModuleType:
    # Imported when asked for, as that takes seconds.
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        return importlib.import_module("trl.experimental.ppo.modeling_value_head")
    except ModuleNotFoundError:  # Where it was before trl 1.0.
        return importlib.import_module("trl.models.modeling_value_head")
