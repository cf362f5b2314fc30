"""A `PreTrainedModel` with a value head, in one folder that `AutoModel.from_pretrained` loads.

It holds the same two modules as the wrapper, the language model and the head, and turns into one and back without a
copy. Importing this module registers it with transformers' auto classes.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Cache,
    GenerationConfig,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from vhead.backbone.hidden_states import observed, plan_for, run
from vhead.errors import BodyMismatchError, HeadError, HeadNotFoundError
from vhead.formats import detect
from vhead.heads import ValueHead
from vhead.modeling import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    PreTrainedModelWrapper,
)
from vhead.modeling.loading import location_arguments
from vhead.support import Support
from vhead.upstream import CACHE, CACHE_NAMES, cache_of, with_cache_as

# What transformers keeps in every configuration, and asks the outermost one for.
_ASKED_OF_ALL = (
    "is_encoder_decoder",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
)


class ValueHeadConfig(PretrainedConfig):  # type: ignore[misc]  # transformers is untyped
    """The configuration of a language model, and that of its head.

    Attributes that this class does not have are the language model's: `config.hidden_size`, `config.vocab_size`, ...

    Args:
        text_config: The language model's configuration, or its dictionary with a `model_type`.
        v_head_hidden_size: Elements of the hidden state that the head reads. None: read from `text_config`.
        v_head_num_outputs: The head's outputs for each hidden state, 1 for a critic.
        v_head_intermediate_size: Elements between the two projections of a head, or None for a single projection.
        v_head_support: The support of a distributional head, or its settings; None for a head that gives values.
        v_head_activation: "softmax" for a head that is a classifier of each state, or None.
        summary_dropout_prob: The probability that training drops an element of a hidden state.
        **kwargs: What every configuration of transformers has.

    Raises:
        HeadError: `text_config` is neither a configuration nor the dictionary of one, or the support is none.
    """

    model_type = "vhead"
    text_config = None
    is_composition = True
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = list(CACHE_NAMES)

    def __init__(
        self,
        text_config: PretrainedConfig | Mapping[str, Any] | None = None,
        v_head_hidden_size: int | None = None,
        v_head_num_outputs: int = 1,
        v_head_intermediate_size: int | None = None,
        summary_dropout_prob: float = 0.1,
        v_head_support: Support | Mapping[str, Any] | None = None,
        v_head_activation: Literal["softmax"] | None = None,
        **kwargs: Any,
    ) -> None:
        # Transformers makes one without arguments, to know the defaults.
        text_config = None if text_config is None else _language_model_config(text_config)
        inherited = {n: getattr(text_config, n) for n in _ASKED_OF_ALL if hasattr(text_config, n)}
        super().__init__(**{**inherited, **kwargs})
        self.v_head_hidden_size = v_head_hidden_size
        self.v_head_num_outputs = v_head_num_outputs
        self.v_head_intermediate_size = v_head_intermediate_size
        self.summary_dropout_prob = summary_dropout_prob
        # JSON has no supports, and a configuration must be JSON at any moment.
        support = v_head_support if isinstance(v_head_support, Support | None) else _support(v_head_support)
        self.v_head_support = None if support is None else support.settings()
        self.v_head_activation = v_head_activation
        self.text_config = text_config
        if text_config is not None and kwargs.get("attn_implementation") is not None:
            text_config._attn_implementation = kwargs["attn_implementation"]

    def __getattr__(self, name: str) -> Any:
        if self.text_config is None or name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.text_config, name)

    def get_text_config(self, *args: object, **kwargs: object) -> PretrainedConfig:
        """The configuration of the part of the language model that reads and writes text."""
        return self if self.text_config is None else self.text_config.get_text_config(*args, **kwargs)


@dataclass
class ValueHeadModelOutput(ModelOutput):  # type: ignore[misc]  # transformers is untyped
    """What `ValueHeadModel.forward` returns.

    Attributes:
        loss: The language model's loss, or None without labels.
        logits: `[B, T, V]`, in the dtype that the language model gives them.
        value: `[B, T]`, or `[B, T, K]` for a head with K outputs, float32: the value of the state after each token.
        cache: The cache, where the language model returns one; `past_key_values` before transformers 5.24.
        hidden_states: The states of every layer, where they are asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    value: Tensor | None = None
    # Each release's outputs have the name that its own models use, and 5.24 takes no other in a constructor.
    if CACHE == "cache":
        cache: Cache | None = None
    else:
        past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class ValueHeadModel(PreTrainedModel, GenerationMixin):  # type: ignore[misc]  # transformers is untyped
    """A language model and a value head, saved and loaded by transformers alone.

    Args:
        config: Its configuration.
        pretrained_model: The language model. None: a fresh one.
        v_head: The head. None: a fresh one.

    Attributes:
        pretrained_model: The language model.
        v_head: The head.
        plan: How the last hidden state is reached and kept on this architecture.
        head_source: Where the head's weights were read, or None for a head that was drawn.

    Raises:
        HeadError: The configuration has no language model, or does not give a head.
    """

    config_class = ValueHeadConfig
    base_model_prefix = "pretrained_model"
    supports_gradient_checkpointing = True

    # The language model decides for itself which of these it has.
    _no_split_modules: ClassVar[Any] = ()
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _supports_cache_class = True

    # The head stays float32 whatever the language model's dtype is.
    _keep_in_fp32_modules: ClassVar[Any] = ["v_head"]
    _keep_in_fp32_modules_strict: ClassVar[Any] = ["v_head"]

    def __init__(
        self,
        config: ValueHeadConfig,
        pretrained_model: PreTrainedModel | None = None,
        v_head: ValueHead | None = None,
    ) -> None:
        if config.text_config is None:
            raise HeadError("text_config: expected the configuration of a language model, got none")
        super().__init__(config)
        body = pretrained_model
        if body is None:
            # Left out, transformers would ask on standard input about code that the configuration names.
            body = _auto_class(config).from_config(config.text_config, trust_remote_code=False)
        # The model owns its configuration: what changes there, the size of the vocabulary for instance, shows here.
        config.text_config = body.config
        self.pretrained_model = body
        self.v_head = _head(config) if v_head is None else v_head
        self.plan = plan_for(body)
        self.head_source: str | None = None
        self.supports_gradient_checkpointing = body.supports_gradient_checkpointing
        # Newer versions collect the tied names from the children themselves.
        if isinstance(body._tied_weights_keys, list):
            self._tied_weights_keys = [f"{self.base_model_prefix}.{name}" for name in body._tied_weights_keys]
        self.post_init()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *model_args: object,
        attn_implementation: Any = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Loads a folder or a hub repository of this form; everything is read from there, the language model included.

        Args:
            pretrained_model_name_or_path: The folder, or the repository's id.
            *model_args: Passed to transformers.
            attn_implementation: The language model's.
            output_loading_info: Whether transformers' report is returned as well.
            **kwargs: Passed to transformers.

        Raises:
            HeadNotFoundError: The checkpoint holds no value head, or half of one.
            BodyMismatchError: The checkpoint lacks weights of the language model.
            HeadMismatchError: The head has not as many outputs as its support has bins.
            HeadError: The checkpoint is of another form.
        """
        if not isinstance(kwargs.get("config"), PretrainedConfig):
            location = kwargs.pop("config", None) or pretrained_model_name_or_path
            config, kwargs = _read_config(cls.config_class, location, kwargs)
        else:
            config = kwargs.pop("config")
        if config.v_head_support is not None and pretrained_model_name_or_path is not None:
            # Transformers would speak of sizes, and not of bins.
            detect(os.fspath(pretrained_model_name_or_path), **location_arguments(kwargs))
        if attn_implementation is not None:
            _choose_attention(config, attn_implementation)
        model, report = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, config=config, output_loading_info=True, **kwargs
        )
        _check_complete(report["missing_keys"], pretrained_model_name_or_path)
        model.head_source = str(pretrained_model_name_or_path)
        return (model, report) if output_loading_info else model

    @classmethod
    def from_wrapper(cls, wrapper: PreTrainedModelWrapper) -> Self:
        """The `PreTrainedModel` of a wrapped model: the same language model and head, not copies.

        Args:
            wrapper: A wrapped model without adapters.

        Raises:
            HeadError: The language model has adapters, which transformers' form of it has not.
        """
        if wrapper.is_peft_model:
            raise HeadError("wrapper: expected a model without adapters; merge them first, by merge_and_unload()")
        body, head = wrapper.pretrained_model, wrapper.v_head
        config = cls.config_class(
            text_config=body.config,
            v_head_hidden_size=head.hidden_size,
            v_head_num_outputs=head.num_outputs,
            v_head_intermediate_size=head.intermediate_size,
            summary_dropout_prob=getattr(head.dropout, "p", 0.0),
            v_head_support=head.support,
            v_head_activation=head.activation,
        )
        model = cls(config, pretrained_model=body, v_head=head)
        model.train(wrapper.training)
        model.head_source = wrapper.head_source
        return model

    def to_wrapper(self) -> PreTrainedModelWrapper:
        """The wrapper of this model: the same language model and head, not copies."""
        causal, seq2seq = AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead
        wrapper_class = seq2seq if self.config.is_encoder_decoder else causal
        # The constructor draws a head; what is drawn afterwards does not depend on whether it did.
        with torch.random.fork_rng(devices=[]):
            wrapper = wrapper_class(self.pretrained_model)
        wrapper.v_head = self.v_head
        wrapper.head_source = self.head_source
        return wrapper

    # Computing

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,  # noqa: FBT001, transformers' signature
        output_hidden_states: bool | None = None,  # noqa: FBT001, transformers' signature
        return_dict: bool | None = None,  # noqa: FBT001, transformers' signature
        **kwargs: object,
    ) -> ValueHeadModelOutput | tuple[Any, ...]:
        """Runs the language model with its logits, and the value head.

        Args:
            input_ids: Token ids `[B, T]`.
            attention_mask: `[B, T]`, 1 for tokens, 0 for padding.
            position_ids: `[B, T]`.
            past_key_values: A cache of earlier positions. `cache`, as transformers calls it from 5.24 on, is taken too.
            inputs_embeds: Embeddings `[B, T, H]`, in place of token ids.
            labels: Token ids `[B, T]` for the language model's loss, -100 for none.
            use_cache: Whether a cache is returned.
            output_hidden_states: Whether the states of every layer are returned.
            return_dict: False for a plain tuple.
            **kwargs: Passed to the language model, for instance `decoder_input_ids`.
        """
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "use_cache": use_cache,
        }
        inputs = {**kwargs, **{name: value for name, value in named.items() if value is not None}}
        wants_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output, last = self._run(inputs, returns_states=bool(wants_states))
        states = getattr(output, "decoder_hidden_states" if self.plan.is_encoder_decoder else "hidden_states", None)
        result = ValueHeadModelOutput(
            loss=getattr(output, "loss", None),
            logits=output.logits,
            value=self._values_of(last, None if output.logits is None else output.logits.device),
            **{CACHE: cache_of(output)},
            hidden_states=states if wants_states else None,
        )
        return result.to_tuple() if return_dict is False else result

    def _run(self, inputs: dict[str, object], *, returns_states: bool) -> tuple[ModelOutput, Tensor]:
        """The language model's output and its last hidden state."""
        if not returns_states:
            return run(self.pretrained_model, self._current_plan(), inputs)
        with observed(self.pretrained_model, self._current_plan()) as last_hidden_state:
            inputs = with_cache_as(self.plan.cache_argument, inputs)
            output = self.pretrained_model(**inputs, output_hidden_states=True, return_dict=True)
            return output, last_hidden_state()

    # What the wrapper computes from the same two children.
    values = PreTrainedModelWrapper.values
    generate = PreTrainedModelWrapper.generate
    _values_of = PreTrainedModelWrapper._values_of
    _current_plan = PreTrainedModelWrapper._current_plan

    # The surface of a transformers model

    @classmethod
    def can_generate(cls) -> bool:
        """Whether there is a generation configuration, which is the language model's."""
        return True

    @property
    def generation_config(self) -> GenerationConfig | None:
        """The language model's generation configuration, which `generate` uses."""
        return getattr(self._modules.get("pretrained_model"), "generation_config", None)

    @generation_config.setter
    def generation_config(self, value: GenerationConfig | None) -> None:
        # Transformers sets one before there is a language model, which brings its own.
        if "pretrained_model" in self._modules:
            self.pretrained_model.generation_config = value

    @property
    def score(self) -> nn.Module:
        """The head, by the name under which TRL's PPOTrainer asks a value model for it."""
        return self.v_head

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the language model's loss can be told the number of tokens of the whole batch, for `Trainer`."""
        return "num_items_in_batch" in signature(self.pretrained_model.forward).parameters

    def prepare_inputs_for_generation(self, *args: object, **kwargs: object) -> Any:
        """Chooses what a decoding step reads, as the language model does."""
        return self.pretrained_model.prepare_inputs_for_generation(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """The language model's input embeddings."""
        embeddings: nn.Module = self.pretrained_model.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the language model's input embeddings."""
        self.pretrained_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        """The language model's head, which gives the logits."""
        embeddings: nn.Module | None = self.pretrained_model.get_output_embeddings()
        return embeddings

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replaces the language model's head, which gives the logits."""
        self.pretrained_model.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, *args: object, **kwargs: object) -> nn.Module:
        """Resizes the language model's vocabulary, as it does itself."""
        embeddings: nn.Module = self.pretrained_model.resize_token_embeddings(*args, **kwargs)
        return embeddings

    def _init_weights(self, module: nn.Module) -> None:
        """Does nothing: both children draw their own weights when they are made."""


def _language_model_config(given: PretrainedConfig | Mapping[str, Any]) -> PretrainedConfig:
    if isinstance(given, PretrainedConfig):
        return given
    if not isinstance(given, Mapping) or "model_type" not in given:
        raise HeadError(f"text_config: expected a configuration, or its dictionary with a model_type, got {given!r}")
    return AutoConfig.for_model(**given)


def _auto_class(config: ValueHeadConfig) -> Any:
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def _head(config: ValueHeadConfig) -> ValueHead:
    return ValueHead(
        config.text_config,
        hidden_size=config.v_head_hidden_size,
        num_outputs=config.v_head_num_outputs,
        intermediate_size=config.v_head_intermediate_size,
        summary_dropout_prob=config.summary_dropout_prob,
        support=None if config.v_head_support is None else _support(config.v_head_support),
        activation=config.v_head_activation,
    )


def _support(settings: object) -> Support:
    return Support.from_settings(settings, "v_head_support")


def _read_config(config_class: Any, location: object, arguments: dict[str, Any]) -> Any:
    """A checkpoint's configuration, and the arguments that are not about it."""
    # Seen before it is made: transformers 4.57 cannot log a configuration without the one inside.
    if config_class.get_config_dict(location, **arguments)[0].get("text_config") is None:
        raise HeadError(
            f"{location}: expected a configuration of model_type {config_class.model_type!r} with a text_config; "
            "load any other checkpoint with AutoModelForCausalLMWithValueHead or AutoModelForSeq2SeqLMWithValueHead, "
            "and turn it into this form with ValueHeadModel.from_wrapper"
        )
    return config_class.from_pretrained(location, return_unused_kwargs=True, **arguments)


def _choose_attention(config: Any, implementation: Any) -> None:
    config._attn_implementation = implementation
    config.text_config._attn_implementation = implementation


def _check_complete(missing: Iterable[str], location: object) -> None:
    """Refuses a checkpoint that lacks weights; transformers only warns, and draws them at random."""
    names = sorted(missing)
    of_head = [name for name in names if name.startswith("v_head.")]
    if of_head:
        raise HeadNotFoundError(f"{location}: expected a trained value head, found no {', '.join(of_head)}")
    if names:
        raise BodyMismatchError(
            f"{location}: the checkpoint does not hold the whole language model: "
            f"{names[0]} and {len(names) - 1} others are missing"
        )


AutoConfig.register(ValueHeadConfig.model_type, ValueHeadConfig, exist_ok=True)
for _auto_class_of_form in (AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM):
    _auto_class_of_form.register(ValueHeadConfig, ValueHeadModel, exist_ok=True)
