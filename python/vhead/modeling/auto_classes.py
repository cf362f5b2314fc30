"""Which of transformers' classes loads all of a language model.

It is told from the names in `config.json` and in transformers' own tables: making a configuration object, or asking for
a class, imports modules, which costs more than opening the whole checkpoint does.
"""

import json
from collections.abc import Mapping
from typing import Any

import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from vhead.checkpoints.checkpoint import Checkpoint, LocationArguments

# Which auto classes load a language model that `AutoModelForCausalLM` does not, or only parts of; older versions of
# transformers have the first one under the second name, or none.
_MULTIMODAL_CLASSES = ("AutoModelForImageTextToText", "AutoModelForVision2Seq", "AutoModelForMultimodalLM")

# What tells apart the weight files of one model, which has one configuration.
_OF_WEIGHT_FILES = frozenset({"use_safetensors", "variant"})


def class_for(wanted: Any, location: str, arguments: Mapping[str, Any]) -> Any:
    """The class that loads all of a model: a multimodal one where `AutoModelForCausalLM` would drop what is not text.

    Args:
        wanted: The auto class that the caller would load the model with.
        location: A folder, or a hub repository's id.
        arguments: Those of `from_pretrained`.
    """
    if wanted is not AutoModelForCausalLM:
        return wanted
    config = stated_config(location, arguments)
    code, model_type, names = (config.get(name) for name in ("auto_map", "model_type", "architectures"))
    if not isinstance(model_type, str) or (isinstance(code, Mapping) and "AutoModelForCausalLM" in code):
        return wanted
    stated = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    own = _class_name(wanted, model_type)
    multimodal = [getattr(transformers, name) for name in _MULTIMODAL_CLASSES if hasattr(transformers, name)]
    for candidate in multimodal:
        name = _class_name(candidate, model_type)
        if name is not None and name != own and (own is None or name == stated):
            return candidate
    # Some text models of multimodal ones are in no auto class, but can be wrapped and saved.
    stated_class = getattr(transformers, stated or "", None) if own is None else None
    return stated_class if isinstance(stated_class, type) and issubclass(stated_class, PreTrainedModel) else wanted


def stated_config(location: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a checkpoint's configuration states, as it lies on disk; nothing where loading has to say what is wrong."""
    given = arguments.get("config")
    if isinstance(given, PretrainedConfig):
        return {**vars(given), "model_type": given.model_type}
    where: Any = {
        n: v for n, v in arguments.items() if n in LocationArguments.__annotations__.keys() - _OF_WEIGHT_FILES
    }
    path = Checkpoint(given or location, **where).path("config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _class_name(auto_class: Any, model_type: str) -> str | None:
    """The name of the class that an auto class has for a type of model, or None."""
    found = auto_class._model_mapping._model_mapping.get(model_type)
    name: str | None = found[0] if isinstance(found, tuple | list) else found
    return name
