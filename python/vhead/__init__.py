"""The value head of language models trained with reinforcement learning: a drop-in class, a scorer, and a fast head.

Every public name is imported on first use, so that ``import vhead`` is cheap and ``vhead.CandleValueHead`` needs no
torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vhead import candle, errors, formats, heads, modeling, ops, scoring
    from vhead.candle import CandleValueHead
    from vhead.errors import VheadError
    from vhead.heads import ValueHead
    from vhead.modeling import (
        AutoModelForCausalLMWithValueHead,
        AutoModelForSeq2SeqLMWithValueHead,
        PreTrainedModelWrapper,
    )
    from vhead.ops import backends
    from vhead.reference_model import create_reference_model
    from vhead.scoring import Rollout, Score, Scorer, Scores

    __version__: str

__all__ = [
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "CandleValueHead",
    "PreTrainedModelWrapper",
    "Rollout",
    "Score",
    "Scorer",
    "Scores",
    "ValueHead",
    "VheadError",
    "__version__",
    "backends",
    "candle",
    "create_reference_model",
    "errors",
    "formats",
    "heads",
    "modeling",
    "ops",
    "scoring",
]

_SUBMODULES = frozenset({"candle", "errors", "formats", "heads", "modeling", "ops", "scoring"})

_HOME = {
    "AutoModelForCausalLMWithValueHead": "modeling",
    "AutoModelForSeq2SeqLMWithValueHead": "modeling",
    "CandleValueHead": "candle",
    "PreTrainedModelWrapper": "modeling",
    "Rollout": "scoring",
    "Score": "scoring",
    "Scorer": "scoring",
    "Scores": "scoring",
    "ValueHead": "heads",
    "VheadError": "errors",
    "backends": "ops",
    "create_reference_model": "reference_model",
}


def __getattr__(name: str) -> object:
    if name in _SUBMODULES:
        return importlib.import_module(f"vhead.{name}")
    if name == "__version__":
        value: object = _version()
    elif name in _HOME:
        value = getattr(importlib.import_module(f"vhead.{_HOME[name]}"), name)
    else:
        raise AttributeError(f"module 'vhead' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import version  # noqa: PLC0415, a slow import that most programs never need

    return version("vhead")
