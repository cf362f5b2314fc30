"""Language models with a value head: TRL's classes, maintained.

What carries over from TRL 1.12 is its surface: constructor, `from_pretrained`, the outputs of `forward`, and the names
in checkpoints. Deliberate differences: the head is in the body's train/eval mode after loading, a state dict goes back
in strictly, also inside a parent module, only the last hidden state is kept, and a head that does not fit its
checkpoint is an error.
"""

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self, Unpack, overload

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, Cache, PreTrainedModel
from transformers.utils import ModelOutput, is_peft_available

from vhead.backbone.hidden_states import last_hidden_state, plan_for, run, without_adapter
from vhead.backbone.placement import last_hidden_device, uses_several_accelerators
from vhead.checkpoints.checkpoint import Checkpoint
from vhead.errors import AdapterError, HeadError
from vhead.formats import HeadWeights
from vhead.heads import (
    DEFAULT_INITIALIZER_RANGE,
    HeadArguments,
    InitialArguments,
    ValueHead,
    check_head_arguments,
)
from vhead.modeling import adapters, generation
from vhead.modeling.loading import LoadArguments, load, prepare_given, read_head
from vhead.modeling.state import CheckpointSaving
from vhead.modeling.surface import TransformersSurface
from vhead.upstream import CACHE, cache_of, with_cache_as


class ValueHeadOutput(NamedTuple):
    """What `forward` returns: unpacks as TRL's `(lm_logits, loss, value)`, and names its items as transformers does.

    Attributes:
        logits: `[B, T, V]`, float32.
        loss: The language model's loss, or None without labels.
        value: `[B, T]`, float32: the value of the state after each token.
    """

    logits: Tensor | None
    loss: Tensor | None
    value: Tensor

    @property
    def lm_logits(self) -> Tensor | None:
        """The logits, by TRL's name."""
        return self.logits


class ValueHeadOutputWithCache(NamedTuple):
    """What `forward` returns with `return_past_key_values=True`: the items of `ValueHeadOutput`, then the cache."""

    logits: Tensor | None
    loss: Tensor | None
    value: Tensor
    past_key_values: Cache

    @property
    def lm_logits(self) -> Tensor | None:
        """The logits, by TRL's name."""
        return self.logits


logger = logging.getLogger("vhead")

# What TRL's constructor takes beside the head's arguments.
_OF_LOADING = ("dtype", "torch_dtype", "device_map")


class PreTrainedModelWrapper(TransformersSurface, CheckpointSaving):
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
        untrained: The names of the body's parameters that its checkpoint lacked, as the body names them.
        is_sequential_parallel: Whether the body's layers are on several accelerators.

    Raises:
        HeadError: The head's arguments or the model's configuration do not give a head.
        TypeError: An argument is not one of the head's.
    """

    transformers_parent_class: ClassVar[Any] = None
    # The names of language-model heads, for the classes whose body must have one.
    lm_head_namings: ClassVar[tuple[str, ...]] = ()
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
        _check_is_loaded(pretrained_model)
        super().__init__()
        self.pretrained_model = pretrained_model
        if self.lm_head_namings and not self._has_lm_head():
            raise _no_lm_head(pretrained_model, self.lm_head_namings)
        head_arguments: Any = _without_loading_arguments(kwargs)
        self.v_head = ValueHead(pretrained_model.config, hidden_size=_head_width(pretrained_model), **head_arguments)
        self.plan = plan_for(pretrained_model)
        self.head_source: str | None = None
        self.is_peft_model = hasattr(pretrained_model, "get_base_model")
        self.is_loaded_in_8bit: bool = getattr(pretrained_model, "is_loaded_in_8bit", False)
        self.is_loaded_in_4bit: bool = getattr(pretrained_model, "is_loaded_in_4bit", False)
        self.untrained: frozenset[str] = frozenset()
        self.current_device = self._get_current_device()
        # Trainers write into it; newer versions of transformers have none.
        self.warnings_issued: dict[str, bool] = getattr(pretrained_model, "warnings_issued", {})
        self.supports_rm_adapter = supports_rm_adapter
        self.rm_adapter_name = rm_adapter_name
        self.policy_adapter_name = "default"
        if score_module is not None:
            # `add_module` refuses a name that a property has; the property reads it from here.
            self._modules["score"] = score_module
        self._follow_body()

    # Loading

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | nn.Module, *model_args: object, **kwargs: object
    ) -> Self:
        """Loads a language model and its value head, or wraps a language model that is loaded already.

        Where the path is an adapter's, its language model is loaded first. The adapter is frozen unless `is_trainable`;
        the head trains.

        The head is sought in the checkpoint, local folder before hub, by reading its two tensors alone. A plain
        language model gets a fresh head, which one line of the log says. A model that was loaded from a path is in
        evaluation mode, head and body alike; a given object keeps its mode, and the head takes it over.

        Args:
            pretrained_model_name_or_path: A folder, a hub repository's id, or a language model.
            *model_args: Passed to transformers.
            **kwargs: The head's arguments, which a trained head must agree with where it has its own: `num_outputs`,
                `intermediate_size`, `support`; a head whose checkpoint states no support takes the one given;
                `peft_config`, for an adapter to put on the model; `is_trainable`, for
                whether a loaded adapter trains on; `reward_adapter` and `reward_adapter_name`, for a second adapter
                with a reward head; `head`, the file, folder or hub repository with the head where the checkpoint does
                not hold it; with `peft_config`, those of `peft.prepare_model_for_kbit_training`. Everything else is
                passed to transformers. Those that say where files are (`revision`, `cache_dir`, `subfolder`, ...) hold
                for an adapter and the head as well. Code that the checkpoint brings along runs only with
                `trust_remote_code=True`, and nobody is asked.

        Raises:
            AdapterError: An adapter is missing, malformed, or not one that such a model can have.
            BodyMismatchError: The checkpoint's weights are not those of the model that its configuration names.
            HeadMismatchError: The checkpoint holds something like a head that does not fit.
            HeadFileError: A file is truncated, malformed or hostile.
            HeadNotFoundError: There is no head where `head` says that one is.
            LoadError: There is no such model, or transformers or peft cannot load it.
            HeadError: The head's arguments, or the first argument, are not what they must be.
        """
        arguments = LoadArguments.divide(kwargs, cls._head_argument_names())
        check_head_arguments(**arguments.head)
        given = pretrained_model_name_or_path
        if isinstance(given, nn.Module):
            cls._check_is_language_model(given)
            model, head = cls._around(prepare_given(given, arguments), arguments), read_head(arguments)
            if head is None:
                logger.info("%s was given as a loaded model, so its value head is a fresh one", type(given).__name__)
            else:
                model._load_head(head)
            return model
        if not isinstance(given, str | os.PathLike):
            raise _not_a_model(given)
        location = os.fspath(given)
        loaded = load(cls.transformers_parent_class, location, model_args, arguments, cls._get_current_device())
        model = cls._around(loaded.body, arguments)
        model.untrained = loaded.untrained
        if loaded.head is None:
            logger.warning("%s holds no value head, so a fresh one is used", location)
        else:
            model._load_head(loaded.head)
        return model

    @classmethod
    def _check_is_language_model(cls, given: nn.Module) -> None:
        if not isinstance(given, cls.supported_pretrained_model_architectures) and not hasattr(given, "get_base_model"):
            raise _not_a_model(given)

    @classmethod
    def _around(cls, body: nn.Module, arguments: LoadArguments) -> Self:
        """Wraps a model, with its reward adapter if it is to have one."""
        adapters.check_task(body)
        if arguments.reward_adapter is None:
            return cls(body, **arguments.head)
        name = arguments.reward_adapter_name
        checkpoint = Checkpoint(arguments.reward_adapter, **arguments.reward_location)
        score = adapters.load_reward_adapter(body, checkpoint, name)
        return cls(body, score_module=score, supports_rm_adapter=True, rm_adapter_name=name, **arguments.head)

    def _load_head(self, head: HeadWeights) -> None:
        """Copies a trained head in; one of other projections, outputs or support than this one's takes its place."""
        own = self.v_head
        kinds = [(h.num_outputs, h.intermediate_size, h.support) for h in (head, own)]
        if kinds[0] == kinds[1]:
            own.load(head)
        else:
            dropout = getattr(own.dropout, "p", 0.0)
            self.v_head = ValueHead.like(head, self.config, hidden_size=own.hidden_size, summary_dropout_prob=dropout)
            self._follow_body()
        self.head_source = head.source

    def post_init(self, state_dict: Mapping[str, Any]) -> None:
        """Takes the head's weights from a state dict, where it has any, and puts the head where the body is.

        Args:
            state_dict: A model's state dict, in any of the layouts that `load_state_dict` accepts; it is not changed.

        Raises:
            RuntimeError: The state dict has something of a head that does not fit, as `load_state_dict` says it.
        """
        head = {name: value for name, value in self._checkpoint_items(state_dict) if name.startswith("v_head.")}
        if head:
            self.v_head.load_state_dict({name.removeprefix("v_head."): value for name, value in head.items()})
            self.head_source = "post_init"
        self._follow_body()

    def _follow_body(self) -> None:
        """Puts the head where the body's last hidden state is, in the body's train or eval mode."""
        body: nn.Module = self.pretrained_model
        self.training = body.training
        self.v_head.train(self.training)
        device = last_hidden_device(body)
        if device is not None and device.type not in ("cpu", "meta"):
            self.v_head.to(device)
        self.is_sequential_parallel = uses_several_accelerators(body)

    def _has_lm_head(self) -> bool:
        body = self.pretrained_model
        if any(name.rpartition(".")[2] in self.lm_head_namings for name, _ in body.named_modules()):
            return True
        # Some architectures name theirs otherwise, and some of those do not say which module it is.
        return body.get_output_embeddings() is not None or bool(body.can_generate())

    def _init_weights(self, **kwargs: Unpack[InitialArguments]) -> None:
        """Draws the head's weights anew if the arguments name a strategy; subclasses call it after making a head."""
        strategy = kwargs.get("v_head_init_strategy")
        if strategy is not None:
            self.v_head.initialize(strategy, kwargs.get("v_head_initializer_range", DEFAULT_INITIALIZER_RANGE))

    @classmethod
    def _head_argument_names(cls) -> frozenset[str]:
        """The constructor's own arguments about the head, and those that a subclass adds to `supported_args`."""
        return frozenset(HeadArguments.__annotations__).union(cls.supported_args)

    @classmethod
    def _split_kwargs(cls, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Divides arguments: the head's, transformers', and peft's for k-bit models; subclasses call it."""
        k_bit_names = adapters.k_bit_argument_names() if is_peft_available() else frozenset()
        head_names = cls._head_argument_names()
        head = {name: value for name, value in kwargs.items() if name in head_names}
        k_bit = {name: value for name, value in kwargs.items() if name in k_bit_names}
        return head, {name: value for name, value in kwargs.items() if name not in head | k_bit}, k_bit

    @classmethod
    def _get_current_device(cls) -> int | str:
        return torch.cuda.current_device() if torch.cuda.is_available() else "cpu"

    @classmethod
    def add_and_load_reward_modeling_adapter(
        cls,
        pretrained_model: nn.Module,
        adapter_model_id: str | os.PathLike[str],
        adapter_name: str = "reward_model_adapter",
        token: str | bool | None = None,  # noqa: FBT001, huggingface_hub's
    ) -> nn.Linear:
        """Adds a trained reward adapter to a model with adapters, whose active adapter and mode stay as they are.

        Args:
            pretrained_model: A model with adapters.
            adapter_model_id: The reward adapter's folder, or its hub repository's id.
            adapter_name: What the adapter is called inside the model.
            token: The hub's token.

        Returns:
            The adapter's reward head, frozen: what the constructor takes as `score_module`.

        Raises:
            AdapterError: There is no such adapter.
            HeadMismatchError: The adapter's file holds no reward head.
        """
        checkpoint = Checkpoint(os.fspath(adapter_model_id), token=token)
        return adapters.load_reward_adapter(pretrained_model, checkpoint, adapter_name)

    # Computing

    @overload
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        return_past_key_values: Literal[False] = False,  # noqa: FBT002, TRL's signature
        **kwargs: object,
    ) -> ValueHeadOutput: ...
    @overload
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        *,
        return_past_key_values: Literal[True],
        **kwargs: object,
    ) -> ValueHeadOutputWithCache: ...
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
            past_key_values: A cache of earlier positions. `cache`, as transformers calls it from 5.24 on, is taken too.
            attention_mask: `[B, T]`, 1 for tokens, 0 for padding.
            return_past_key_values: Whether the cache is returned as a fourth item.
            **kwargs: Passed to the language model, for instance `labels`, `position_ids` or `logits_to_keep`.
                `output_hidden_states` and `return_dict` are accepted and change nothing.

        Returns:
            The logits (float32), the loss (None without labels), the values `[B, T]` (float32), the cache if asked for.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        if past_key_values is not None and not adapters.drops_cache(self.pretrained_model):
            inputs["past_key_values"] = past_key_values
        output, hidden_states = run(self.pretrained_model, self._current_plan(), inputs)
        logits = None if output.logits is None else output.logits.float()
        # A device map brings the logits back to the inputs' device; the values, not the states, go after them.
        values = self._values_of(hidden_states, None if logits is None else logits.device)
        result = ValueHeadOutput(logits, getattr(output, "loss", None), values)
        return ValueHeadOutputWithCache(*result, cache_of(output)) if return_past_key_values else result

    if TYPE_CHECKING:
        # To type checkers, a call of any module gives anything.
        __call__ = forward

    def values(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: object) -> Tensor:
        """Computes values without building logits.

        A padded row has the values of its tokens without the padding, on whichever side it is and whatever the model
        does with it. A token is what a two-dimensional `attention_mask` has a 1 for; its position is the number of
        tokens before it in its row, as `generate` and TRL count it. Values at padding mean nothing.

        Args:
            input_ids: Token ids `[B, T]`.
            attention_mask: `[B, T]`, 1 for tokens, 0 for padding.
            **kwargs: Passed to the language model; `decoder_input_ids` or `labels` for an encoder-decoder.

        Returns:
            The values `[B, T]`, float32; those of the decoder's positions for an encoder-decoder.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        states = last_hidden_state(self.pretrained_model, plan=self._current_plan(), **inputs)
        return self._values_of(states, None if input_ids is None else input_ids.device)

    def _values_of(self, hidden_states: Tensor, device: torch.device | None) -> Tensor:
        values: Tensor = self.v_head(hidden_states)
        return (values.squeeze(-1) if values.shape[-1] == 1 else values).to(device)

    @torch.no_grad()
    def compute_reward_score(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: object
    ) -> Tensor:
        """Scores every position with the reward adapter; what is active and which mode the model is in do not change.

        Args:
            input_ids: Token ids `[B, T]`.
            attention_mask: `[B, T]`, 1 for tokens, 0 for padding.
            **kwargs: Passed to the language model.

        Returns:
            The scores `[B, T, K]`, float32, without gradients.

        Raises:
            AdapterError: The model has no reward adapter.
        """
        score = self._modules.get("score")
        if not self.supports_rm_adapter or self.rm_adapter_name is None or score is None:
            raise AdapterError("reward_adapter: this model was made without one")
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        with adapters.active(self.pretrained_model, self.rm_adapter_name):
            states = last_hidden_state(self.pretrained_model, plan=self._current_plan(), **inputs)
        return adapters.reward_scores(score, states).to(None if input_ids is None else input_ids.device)

    @overload
    def generate(
        self,
        *args: object,
        output_values: Literal[True],
        output_logprobs: bool = False,
        output_entropy: bool = False,
        **kwargs: object,
    ) -> generation.ScoredGeneration: ...
    @overload
    def generate(
        self,
        *args: object,
        output_values: bool = False,
        output_logprobs: Literal[True],
        output_entropy: bool = False,
        **kwargs: object,
    ) -> generation.ScoredGeneration: ...
    @overload
    def generate(
        self,
        *args: object,
        output_values: bool = False,
        output_logprobs: bool = False,
        output_entropy: Literal[True],
        **kwargs: object,
    ) -> generation.ScoredGeneration: ...
    @overload
    def generate(
        self,
        *args: object,
        output_values: Literal[False] = False,
        output_logprobs: Literal[False] = False,
        output_entropy: Literal[False] = False,
        **kwargs: object,
    ) -> Tensor | ModelOutput: ...
    def generate(
        self,
        *args: object,
        output_values: bool = False,
        output_logprobs: bool = False,
        output_entropy: bool = False,
        **kwargs: object,
    ) -> Tensor | ModelOutput | generation.ScoredGeneration:
        """Generates with the language model's own `generate`, and reads off statistics of the tokens that it chooses.

        Args:
            *args: Passed to the language model.
            output_values: Whether the head's output before each completion token is returned.
            output_logprobs: Whether the log-probability of each completion token is returned.
            output_entropy: Whether the entropy of the distribution of each completion token is returned.
            **kwargs: Passed to the language model.

        Returns:
            What the language model returns, or a `ScoredGeneration` where any of the three is asked for.

        Raises:
            GenerationError: One of the three is asked for with beam search, assisted decoding or another way of
                decoding whose steps are not the tokens of the output, or with guidance, which runs the model twice in
                each.
        """
        kwargs = with_cache_as(CACHE, kwargs)
        wanted = generation.Wanted(output_values, output_logprobs, output_entropy)
        if not wanted:
            generated: Tensor | ModelOutput = self.pretrained_model.generate(*args, **kwargs)
            return generated
        plan = self._current_plan()
        return generation.generate(self.pretrained_model, self.v_head, plan, wanted, *args, **kwargs)


class AutoModelForCausalLMWithValueHead(PreTrainedModelWrapper):
    """A causal language model with a value head."""

    transformers_parent_class = AutoModelForCausalLM
    lm_head_namings = ("lm_head", "embed_out")


class AutoModelForSeq2SeqLMWithValueHead(PreTrainedModelWrapper):
    """An encoder-decoder language model with a value head on the decoder's last hidden state."""

    transformers_parent_class = AutoModelForSeq2SeqLM
    lm_head_namings = ("lm_head", "embed_out", "output_projection")

    def __init__(self, pretrained_model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(pretrained_model, *args, **kwargs)
        self.is_encoder_decoder = True


def _head_width(model: nn.Module) -> int | None:
    """What the language-model head reads, or None where it does not say."""
    embeddings = without_adapter(model).get_output_embeddings()
    width = getattr(embeddings, "in_features", None)
    return width if isinstance(width, int) else None


def _no_lm_head(model: nn.Module, namings: tuple[str, ...]) -> HeadError:
    return HeadError(
        f"pretrained_model: expected a model with a language-model head ({', '.join(namings)}), "
        f"found none in a {type(without_adapter(model)).__name__}"
    )


def _check_is_loaded(given: object) -> None:
    if not isinstance(given, nn.Module):
        raise HeadError(
            f"pretrained_model: expected a loaded language model, got {given!r}; to load a checkpoint, call "
            "from_pretrained"
        )


def _without_loading_arguments(arguments: Mapping[str, object]) -> dict[str, object]:
    """The head's arguments; those that say how a language model is loaded are taken and not used, as in TRL."""
    unused = [name for name in arguments if name in _OF_LOADING]
    if unused:
        logger.warning("%s: not used, since the language model is loaded already", ", ".join(unused))
    return {name: value for name, value in arguments.items() if name not in unused}


def _not_a_model(given: object) -> HeadError:
    return HeadError(
        f"pretrained_model_name_or_path: expected a string, a path or a PreTrainedModel, got a {type(given).__name__}"
    )
