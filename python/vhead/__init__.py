"""The value head of language models trained with reinforcement learning: a drop-in class, a scorer, and a fast head.

Every public name is imported on first use, so that ``import vhead`` is cheap and ``vhead.CandleValueHead`` needs no
torch. In a program that has imported transformers, importing this package registers ``vhead.pretrained`` with its
auto classes; in one that has not yet, the first use of a public name does, or ``import vhead.pretrained``.
"""

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vhead import (
        candle,
        errors,
        fitting,
        formats,
        heads,
        modeling,
        ops,
        pretrained,
        ray,
        report,
        returns,
        rollouts,
        scoring,
        sync,
        training,
    )
    from vhead.candle import CandleValueHead
    from vhead.errors import VheadError
    from vhead.fitting import FittedHead, fit
    from vhead.heads import ValueHead
    from vhead.modeling import (
        AutoModelForCausalLMWithValueHead,
        AutoModelForSeq2SeqLMWithValueHead,
        PreTrainedModelWrapper,
    )
    from vhead.modeling.reference_model import create_reference_model
    from vhead.ops import backends
    from vhead.pretrained import ValueHeadConfig, ValueHeadModel
    from vhead.rollouts import Rollout
    from vhead.scoring import Score, Scorer, Scores
    from vhead.serve.client import AsyncClient, Client
    from vhead.support import Support
    from vhead.training import TrainingPass, freeze, losses

    __version__: str

__all__ = [
    "AsyncClient",
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "CandleValueHead",
    "Client",
    "FittedHead",
    "PreTrainedModelWrapper",
    "Rollout",
    "Score",
    "Scorer",
    "Scores",
    "Support",
    "TrainingPass",
    "ValueHead",
    "ValueHeadConfig",
    "ValueHeadModel",
    "VheadError",
    "__version__",
    "backends",
    "candle",
    "create_reference_model",
    "errors",
    "fit",
    "fitting",
    "formats",
    "freeze",
    "heads",
    "losses",
    "modeling",
    "ops",
    "pretrained",
    "ray",
    "report",
    "returns",
    "rollouts",
    "scoring",
    "sync",
    "training",
]

_HOME = {
    "AsyncClient": "serve.client",
    "AutoModelForCausalLMWithValueHead": "modeling",
    "AutoModelForSeq2SeqLMWithValueHead": "modeling",
    "CandleValueHead": "candle",
    "Client": "serve.client",
    "FittedHead": "fitting",
    "PreTrainedModelWrapper": "modeling",
    "Rollout": "rollouts",
    "Score": "scoring",
    "Scorer": "scoring",
    "Scores": "scoring",
    "Support": "support",
    "TrainingPass": "training",
    "ValueHead": "heads",
    "ValueHeadConfig": "pretrained",
    "ValueHeadModel": "pretrained",
    "VheadError": "errors",
    "backends": "ops",
    "create_reference_model": "modeling",
    "fit": "fitting",
    "freeze": "training",
    "losses": "training",
}


_SUBMODULES = {*__all__, "native"} - {*_HOME, "__version__"}


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
    _register_pretrained()
    return value


def __dir__() -> list[str]:
    return list(__all__)


def _version() -> str:
    from importlib.metadata import version  # a slow import that most programs never need

    return version("vhead")


def _register_pretrained() -> None:
    # Transformers offers no other way to make a model type known than to call it, and is never imported for that.
    if "transformers" in sys.modules and importlib.util.find_spec("torch"):
        importlib.import_module("vhead.pretrained")


_register_pretrained()
