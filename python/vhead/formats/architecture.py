"""What transformers knows about the model that a configuration names: its classes, their names, where a head sits."""

import re
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any, NoReturn

from torch import device, nn
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto import modeling_auto

from vhead.errors import BodyMismatchError, HeadError
from vhead.formats.huggingface import SEQUENCE_CLASSIFICATION, TOKEN_CLASSIFICATION
from vhead.formats.layout import Format, LinearNames
from vhead.head_weights import HeadWeights

_LANGUAGE_MODELS = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)
_CLASSIFIERS = {
    TOKEN_CLASSIFICATION: modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    SEQUENCE_CLASSIFICATION: modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}
_LAST_PART = re.compile(r"(?:For[A-Z]\w*|LMHeadModel|DoubleHeadsModel|RewardModel|CriticModel|Model)$")
_OUTPUT_LAYER = re.compile(r"(?:lm_head|output|output_layer|embed_out)\.")


class Architecture:
    """The model of a configuration; one that transformers does not have is known by its names alone.

    Args:
        settings: The configuration as its file has it.
        location: Where it is from, for messages.
    """

    def __init__(self, settings: dict[str, Any], location: str) -> None:
        self._settings = settings
        self._location = location

    @property
    def base_prefix(self) -> str:
        """What the names below the language-model head begin with: `model.` or `transformer.`, for instance."""
        return "model." if self._language_model is None else f"{self._language_model.base_model_prefix}."

    @property
    def ties_embeddings(self) -> bool:
        """Whether the language-model head is the input embeddings, so that no checkpoint needs it."""
        stated = self._settings.get("tie_word_embeddings")
        return bool(getattr(self._config, "tie_word_embeddings", True) if stated is None else stated)

    def is_base(self, name: str) -> bool:
        """Whether a tensor of the language model belongs to the part below its head."""
        return not _OUTPUT_LAYER.match(name) if self._language_model is None else name.startswith(self.base_prefix)

    def class_name(self, wanted: str) -> str:
        """The name for a configuration's `architectures`: as it is, or with the model's own name before "For..."."""
        if not wanted.startswith("For"):
            return wanted
        own = self._class_names(_CLASSIFIERS.get(wanted)) if wanted != "ForCausalLM" else self._language_model_name
        return own or _LAST_PART.sub("", self._language_model_name or self._stated_name) + wanted

    def head_layers(self, target: Format, head: HeadWeights) -> tuple[LinearNames, ...] | None:
        """The names of the head's tensors in one of transformers' classification classes, or None for other formats.

        Raises:
            HeadError: transformers has no such class for the model, or its head is not one projection of each state.
        """
        wanted = target.body.architecture if target.body else ""
        if wanted not in _CLASSIFIERS:
            return None
        name = self._class_names(_CLASSIFIERS[wanted])
        if name is None:
            model = self._settings.get("model_type")
            raise HeadError(
                f"{self._location}: transformers has no {wanted} class for a {model}, as {target.name} needs"
            )
        config = self._config
        config.num_labels = head.num_outputs
        with device("meta"):
            model = _class(name)(config)
        for child, module in model.named_children():
            if (
                isinstance(module, nn.Linear)
                and child in _head_names(wanted)
                and module.in_features == head.hidden_size
            ):
                return (LinearNames("weight", None if module.bias is None else "bias").below(child),)
        raise HeadError(f"{self._location}: the head of a {name} is not one projection of each last hidden state")

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
        """Checks that a language model's tensors are those of the model that the configuration names.

        Args:
            shapes: The tensors' names and shapes.

        Returns:
            What could not be checked, and why.

        Raises:
            BodyMismatchError: A tensor below the language-model head is missing, or has another shape.
        """
        model_type = self._settings.get("model_type")
        if self._language_model is None:
            return (f"not checked: the language model, since transformers has none that is called {model_type}",)
        if "quantization_config" in self._settings:
            return ("not checked: the language model, since its weights are quantised",)
        with device("meta"):
            model = self._language_model(self._config)
        expected = _trunk_shapes(model)
        found = {name: next((s for s in self._spellings(name) if s in shapes), None) for name in expected}
        misshapen = [
            f"{own} {list(shapes[own])}, expected {list(expected[name])}"
            for name, own in found.items()
            if own is not None and shapes[own] != expected[name]
        ]
        lacking = [name for name, own in found.items() if own is None]
        foreign = shapes.keys() - found.values() - set(_output_names(model))
        if misshapen or (lacking and not self._may_be_renamed(lacking, foreign, len(expected))):
            self._raise_mismatch(model, lacking, misshapen, foreign)
        if lacking:
            return (f"not checked: {', '.join(lacking[:3])}, which transformers may put together as it loads",)
        return ()

    def _spellings(self, name: str) -> tuple[str, ...]:
        """What a checkpoint may call a parameter: with the base model's prefix, or without."""
        return name, f"{self.base_prefix}{name}", name.removeprefix(self.base_prefix)

    def _may_be_renamed(self, lacking: Collection[str], foreign: Collection[str], count: int) -> bool:
        """Whether transformers may have other names for what seems to be missing, as for the experts of a mixture."""
        endings = {name[place.end() :] for name in foreign for place in re.finditer(r"\.", name)}
        is_prefixed = any(name.removeprefix(self.base_prefix) in endings for name in lacking)
        return bool(foreign) and len(lacking) < count and not is_prefixed

    def _raise_mismatch(
        self, model: nn.Module, lacking: Sequence[str], misshapen: Sequence[str], foreign: Collection[str]
    ) -> NoReturn:
        problems = [
            f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''} {what}"
            for names, what in ((lacking, "missing"), (misshapen, "found"), (sorted(foreign), "unknown"))
            if names
        ]
        raise BodyMismatchError(
            f"{self._location}: what would be written does not load as a {type(model).__name__}: {'; '.join(problems)}"
        )

    @cached_property
    def _config(self) -> PretrainedConfig:
        model_type = self._settings.get("model_type")
        settings = {name: value for name, value in self._settings.items() if name != "model_type"}
        try:
            return AutoConfig.for_model(model_type, **settings)
        except (ValueError, TypeError) as error:
            if self._language_model_name is None:
                return PretrainedConfig(**settings)
            raise HeadError(
                f"{self._location}: config.json: not the configuration of a {model_type}: {error}"
            ) from error

    @property
    def _language_model(self) -> Any:
        return None if self._language_model_name is None else _class(self._language_model_name)

    @property
    def _language_model_name(self) -> str | None:
        return next((name for names in _LANGUAGE_MODELS if (name := self._class_names(names)) is not None), None)

    @property
    def _stated_name(self) -> str:
        stated = self._settings.get("architectures")
        return stated[0] if isinstance(stated, list) and stated and isinstance(stated[0], str) else ""

    def _class_names(self, mapping: Any) -> str | None:
        found = None if mapping is None else mapping.get(self._settings.get("model_type"))
        return found[0] if isinstance(found, tuple) else found


def _trunk_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters but the language-model head's and those that transformers does without."""
    optional = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    left_out = set(_output_names(model))
    return {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if name not in left_out and not any(pattern.search(name) for pattern in optional)
    }


def _output_names(model: Any) -> list[str]:
    """The names of the language-model head's parameters, tied ones included."""
    head = model.get_output_embeddings()
    own = {id(parameter) for parameter in head.parameters()} if isinstance(head, nn.Module) else set()
    tied = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    named = model.named_parameters(remove_duplicate=False)
    return [name for name, parameter in named if id(parameter) in own - tied]


def _class(name: str) -> Any:
    import transformers  # its attributes import a model's module each

    return getattr(transformers, name)


def _head_names(wanted: str) -> tuple[str, ...]:
    # A sequence classifier's head that is not called score reads pooled states, and not the last ones.
    return ("score", "classifier") if wanted == TOKEN_CLASSIFICATION else ("score",)
