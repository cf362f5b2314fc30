"""Language models with a value head: TRL's classes, maintained.

What carries over from TRL 1.12 is its surface: constructor, `from_pretrained`, the outputs of `forward`, and the names
in checkpoints. Deliberate differences: the head is in the body's train/eval mode after loading, a state dict goes back
in strictly, also inside a parent module, only the last hidden state is kept, and a head that does not fit its
checkpoint is an error.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, Unpack

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, Cache, PreTrainedModel

from vhead import backbone
from vhead.checkpoint import Checkpoint, LocationArguments, quiet_about
from vhead.errors import HeadError, HeadMismatchError, VheadError
from vhead.formats import WEIGHT_KEY, HeadWeights, find_head, save_beside_adapter
from vhead.heads import HeadArguments, ValueHead, check_head_arguments
from vhead.outputs import ValueHeadOutput, ValueHeadOutputWithCache
from vhead.state import CheckpointState
from vhead.surface import TransformersSurface

logger = logging.getLogger("vhead")


class PreTrainedModelWrapper(TransformersSurface, CheckpointState):
    """A language model and a value head on its last hidden state.

    Args:
        pretrained_model: The language model.
        score_module: A reward head, for models with a reward adapter.
        supports_rm_adapter: Whether the model has a reward adapter.
        rm_adapter_name: The reward adapter's name.
        **kwargs: The head's arguments, see `ValueHead`.

    Attributes:
        v_head: The head.
        plan: How the last hidden state is reached and kept on this architecture.
        head_source: Where the head's weights were read, or None for a head that was drawn.

    Raises:
        HeadError: The head's arguments or the model's configuration do not give a head.
        TypeError: An argument is not one of the head's.
    """

    transformers_parent_class: ClassVar[Any] = None
    pretrained_model: PreTrainedModel

    supported_args: ClassVar[tuple[str, ...]] = (
        "summary_dropout_prob",
        "v_head_initializer_range",
        "v_head_init_strategy",
    )
    supported_modules: ClassVar[tuple[str, ...]] = ("v_head",)
    supported_rm_modules: ClassVar[tuple[str, ...]] = ("score",)
    supported_pretrained_model_architectures: ClassVar[tuple[type, ...]] = (PreTrainedModel,)

    def __init__(
        self,
        pretrained_model: nn.Module,
        score_module: nn.Module | None = None,
        supports_rm_adapter: bool = False,  # noqa: FBT001, FBT002, TRL's signature
        rm_adapter_name: str | None = None,
        **kwargs: Unpack[HeadArguments],
    ) -> None:
        super().__init__()
        self.pretrained_model = pretrained_model
        self.v_head = ValueHead(pretrained_model.config, hidden_size=_head_width(pretrained_model), **kwargs)
        self.plan = backbone.plan_for(pretrained_model)
        self.head_source: str | None = None
        self.is_peft_model = hasattr(pretrained_model, "get_base_model")
        self.is_loaded_in_8bit: bool = getattr(pretrained_model, "is_loaded_in_8bit", False)
        self.is_loaded_in_4bit: bool = getattr(pretrained_model, "is_loaded_in_4bit", False)
        self.is_sequential_parallel = False
        self.current_device = self._get_current_device()
        # Trainers write into it; newer versions of transformers have none.
        self.warnings_issued: dict[str, bool] = getattr(pretrained_model, "warnings_issued", {})
        self.supports_rm_adapter = supports_rm_adapter
        self.rm_adapter_name = rm_adapter_name
        self.policy_adapter_name = "default"
        if score_module is not None:
            self.add_module("score", score_module)
        self._follow_body()

    # Loading

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | nn.Module, *model_args: object, **kwargs: object
    ) -> Self:
        """Loads a language model and its value head, or wraps a language model that is loaded already.

        The head is sought in the checkpoint, local folder before hub, by reading its two tensors alone. A plain
        language model gets a fresh head, which one line of the log says. A model that was loaded from a path is in
        evaluation mode, head and body alike; a given object keeps its mode, and the head takes it over.

        Args:
            pretrained_model_name_or_path: A folder, a hub repository's id, or a language model.
            *model_args: Passed to transformers.
            **kwargs: The head's arguments (`supported_args`); everything else is passed to transformers untouched.

        Raises:
            HeadMismatchError: The checkpoint holds something like a head that does not fit.
            HeadFileError: A file that should hold the head is truncated, malformed or hostile.
            HeadError: The head's arguments, or the first argument, are not what they must be.
        """
        head_arguments, model_arguments = cls._split_arguments(kwargs)
        check_head_arguments(**head_arguments)
        if isinstance(pretrained_model_name_or_path, nn.Module):
            return cls._wrap_object(pretrained_model_name_or_path, head_arguments)
        if not isinstance(pretrained_model_name_or_path, str | os.PathLike):
            raise HeadError(
                "pretrained_model_name_or_path: expected a string, a path or a PreTrainedModel, "
                f"got a {type(pretrained_model_name_or_path).__name__}"
            )
        location = os.fspath(pretrained_model_name_or_path)
        head = cls._find_head(location, model_arguments)
        with quiet_about("v_head"):
            body = cls.transformers_parent_class.from_pretrained(location, *model_args, **model_arguments)
        model = cls(body, **head_arguments)
        if head is None:
            logger.warning("%s holds no value head: starting from a fresh one", location)
        else:
            model._load_head(head)
        return model

    @classmethod
    def _split_arguments(cls, arguments: Mapping[str, Any]) -> tuple[HeadArguments, dict[str, Any]]:
        """Divides `from_pretrained`'s keyword arguments into the head's and the language model's."""
        unsupported = {name for name in ("peft_config", "reward_adapter") if arguments.get(name) is not None}
        if unsupported:
            raise VheadError(
                f"{', '.join(sorted(unsupported))}: adapters are not supported yet; wrap a loaded PeftModel"
            )
        ignored = ("peft_config", "reward_adapter", "reward_adapter_name", "is_trainable")
        head: Any = {name: value for name, value in arguments.items() if name in cls.supported_args}
        model = {name: value for name, value in arguments.items() if name not in (*cls.supported_args, *ignored)}
        return head, model

    @classmethod
    def _find_head(cls, location: str, model_arguments: Mapping[str, Any]) -> HeadWeights | None:
        names = LocationArguments.__annotations__
        where: Any = {name: value for name, value in model_arguments.items() if name in names}
        if Checkpoint(location, **where).path("adapter_config.json") is not None:
            raise VheadError(f"{location}: adapters are not supported yet; load the PeftModel and pass the object")
        return find_head(location, **where)

    @classmethod
    def _wrap_object(cls, body: nn.Module, head_arguments: HeadArguments) -> Self:
        if not isinstance(body, cls.supported_pretrained_model_architectures) and not hasattr(body, "get_base_model"):
            raise HeadError(
                "pretrained_model_name_or_path: expected a string, a path or a PreTrainedModel, "
                f"got a {type(body).__name__}"
            )
        logger.info("%s was given as an object: starting from a fresh value head", type(body).__name__)
        return cls(body, **head_arguments)

    def _load_head(self, head: HeadWeights) -> None:
        summary = self.v_head.summary
        if head.weight.shape != summary.weight.shape:
            raise HeadMismatchError(
                f"{head.source}: found {WEIGHT_KEY} {list(head.weight.shape)}, "
                f"expected {list(summary.weight.shape)} for a {type(self.pretrained_model).__name__}"
            )
        with torch.no_grad():
            summary.weight.copy_(head.weight)
            summary.bias.copy_(head.bias)
        self.head_source = head.source

    def _follow_body(self) -> None:
        """Puts the head where the body's last hidden state is, in the body's train or eval mode."""
        self.training = self.pretrained_model.training
        self.v_head.train(self.training)
        device = _output_device(self.pretrained_model)
        if device is not None and device.type not in ("cpu", "meta"):
            self.v_head.to(device)

    @classmethod
    def _get_current_device(cls) -> int | str:
        return torch.cuda.current_device() if torch.cuda.is_available() else "cpu"

    # Computing

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        return_past_key_values: bool = False,  # noqa: FBT001, FBT002, TRL's signature
        **kwargs: object,
    ) -> ValueHeadOutput | ValueHeadOutputWithCache:
        """Runs the language model with its logits, and the value head; keeps the last hidden state only.

        Inputs reach the language model as they are. In particular no `position_ids` are derived for left padding, as in
        TRL: pass them, or use `values`.

        Args:
            input_ids: Token ids `[B, T]`.
            past_key_values: A cache of earlier positions.
            attention_mask: `[B, T]`, 1 for tokens, 0 for padding.
            return_past_key_values: Whether the cache is returned as a fourth item.
            **kwargs: Passed to the language model, for instance `labels`, `position_ids` or `logits_to_keep`.
                `output_hidden_states` and `return_dict` are accepted and change nothing.

        Returns:
            The logits (float32), the loss (None without labels), the values `[B, T]` (float32), the cache if asked for.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        if past_key_values is not None:
            inputs["past_key_values"] = past_key_values
        output, hidden_states = backbone.run(self.pretrained_model, self._current_plan(), inputs)
        logits = None if output.logits is None else output.logits.float()
        result = ValueHeadOutput(logits, getattr(output, "loss", None), self.v_head(hidden_states).squeeze(-1))
        return ValueHeadOutputWithCache(*result, output.past_key_values) if return_past_key_values else result

    def values(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: object) -> Tensor:
        """Computes values without building logits.

        A left-padded row gets the values of the unpadded one also on models with absolute positions: `position_ids`
        are derived from a two-dimensional `attention_mask` where the model takes them and none are given.

        Args:
            input_ids: Token ids `[B, T]`.
            attention_mask: `[B, T]`, 1 for tokens, 0 for padding.
            **kwargs: Passed to the language model; `decoder_input_ids` or `labels` for an encoder-decoder.

        Returns:
            The values `[B, T]`, float32; those of the decoder's positions for an encoder-decoder.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        states = backbone.last_hidden_state(self.pretrained_model, plan=self._current_plan(), **inputs)
        values: Tensor = self.v_head(states).squeeze(-1)
        return values

    def generate(self, *args: object, **kwargs: object) -> Any:  # noqa: ANN401, as transformers declares it
        """Generates with the language model's own `generate`."""
        return self.pretrained_model.generate(*args, **kwargs)

    # State

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *args: object,
        state_dict: Mapping[str, Any] | None = None,
        **kwargs: object,
    ) -> object:
        """Saves body and head in one checkpoint, which TRL and plain transformers read as well.

        Of a model with adapters, peft saves the adapter; the head lies beside it in a file of its own, as TRL has it.

        Args:
            save_directory: The folder, made if need be.
            *args: Passed to the language model's `save_pretrained`.
            state_dict: The weights to save, in any of the layouts that `load_state_dict` accepts. None: this model's.
            **kwargs: Passed to the language model's `save_pretrained`, for instance `max_shard_size`.
        """
        state = self.state_dict() if state_dict is None else dict(self._checkpoint_items(state_dict))
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        if self.is_peft_model:
            save_beside_adapter(state, Path(save_directory))
            return self.pretrained_model.save_pretrained(save_directory, *args, **kwargs)
        return self.pretrained_model.save_pretrained(save_directory, *args, state_dict=state, **kwargs)


class AutoModelForCausalLMWithValueHead(PreTrainedModelWrapper):
    """A causal language model with a value head."""

    transformers_parent_class = AutoModelForCausalLM


class AutoModelForSeq2SeqLMWithValueHead(PreTrainedModelWrapper):
    """An encoder-decoder language model with a value head on the decoder's last hidden state."""

    transformers_parent_class = AutoModelForSeq2SeqLM
    lm_head_namings: ClassVar[tuple[str, ...]] = ("lm_head", "embed_out", "output_projection")

    def __init__(self, pretrained_model: nn.Module, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401, passed on
        if not self._has_lm_head(pretrained_model):
            raise HeadError(
                f"pretrained_model: expected a language-model head ({', '.join(self.lm_head_namings)}), "
                f"found none in a {type(pretrained_model).__name__}"
            )
        super().__init__(pretrained_model, *args, **kwargs)
        self.is_encoder_decoder = True

    @classmethod
    def _has_lm_head(cls, model: nn.Module) -> bool:
        names = [name for name, _ in model.named_modules()]
        return any(naming in name for name in names for naming in cls.lm_head_namings)


def _head_width(model: nn.Module) -> int | None:
    """What the language-model head reads, or None where it does not say."""
    embeddings = backbone.without_adapter(model).get_output_embeddings()
    width = getattr(embeddings, "in_features", None)
    return width if isinstance(width, int) else None


def _output_device(model: nn.Module) -> torch.device | None:
    """Where the last hidden state is: with the output embeddings, else with the last parameter."""
    embeddings = backbone.without_adapter(model).get_output_embeddings()
    module = model if embeddings is None else embeddings
    return next((parameter.device for parameter in reversed(list(module.parameters()))), None)
