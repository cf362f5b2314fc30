"""The last hidden state of a language model: without its logits, or beside them, and never the states of every layer.

How it is reached depends on the architecture, and is decided from the model's structure alone:

* **base model** (nearly every decoder-only model, and encoder-decoders like BART): the model's trunk returns the state
  that the language-model head reads.
* **encoder-decoder** (the T5 family): there is no trunk, but the encoder and the decoder can be called one after the
  other, and the decoder's output is that state before T5 scales it for its head.
* **full forward** (models put together from others, like BLIP-2; FSMT, whose trunk projects to the vocabulary itself;
  prompt-learning adapters, whose virtual tokens only the adapter's forward adds): the whole model runs.

The input of the language-model head is deliberately not used: some models scale or reshape it.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from vhead.backbone import padding
from vhead.backbone.padding import Padding
from vhead.backbone.trunk import needs, reads_padding, state_sources, takes, takes_position_ids, trunk_of
from vhead.errors import VheadError
from vhead.upstream import CACHE_NAMES, available, cache_argument, with_cache_as

_DECODER_INPUTS = {"decoder_input_ids", "decoder_inputs_embeds"}

# What calling encoder and decoder one after the other can do; anything else (UDOP's boxes) goes through the model.
_ENCODER_DECODER_INPUTS = _DECODER_INPUTS.union(CACHE_NAMES) | {
    "attention_mask",
    "decoder_attention_mask",
    "encoder_outputs",
    "input_ids",
    "inputs_embeds",
    "labels",
    "logits_to_keep",
    "output_hidden_states",
    "return_dict",
    "use_cache",
}


class Route(Enum):
    """How the last hidden state is reached when no logits are wanted."""

    BASE_MODEL = "base model"
    ENCODER_DECODER = "encoder, then decoder"
    FULL_FORWARD = "full forward"


class Retention(Enum):
    """How the last hidden state is kept while the whole model runs."""

    CAPTURE = "the output of the base model or decoder"
    SELECT = "output_hidden_states=-1"
    ALL_LAYERS = "output_hidden_states=True"


@dataclass(frozen=True)
class BackbonePlan:
    """Which way is used for one architecture; plain data, so that it can be printed, copied and sent.

    Attributes:
        architecture: The class of the model that the plan was made for.
        route: How the last hidden state is reached without logits.
        retention: How it is kept beside logits.
        compiled_retention: The same under `torch.compile`, which cannot trace a capture. It is not the usual way where
            transformers offers it, because the hooks that transformers then leaves in the model cannot be pickled.
        takes_position_ids: Whether tokens that follow a cache can be told how many came before them.
        is_encoder_decoder: Whether the values are those of decoder positions.
        takes_use_cache: Whether the trunk can be told to keep no cache, which some of the oldest models never do.
        needs_input_ids: Whether `input_ids` have to be given even where they are None.
        padding: What becomes of padding when values are computed.
        cache_argument: The argument by which the model takes a cache; None for one that takes none.
    """

    architecture: type
    route: Route
    retention: Retention
    compiled_retention: Retention
    takes_position_ids: bool
    is_encoder_decoder: bool
    takes_use_cache: bool = True
    needs_input_ids: bool = False
    padding: Padding = Padding.BEHIND
    cache_argument: str | None = None


def plan_for(model: nn.Module) -> BackbonePlan:
    """Decides how a language model's last hidden state is reached and kept."""
    language_model = without_adapter(model)
    route = _route(language_model)
    sources = state_sources(language_model)
    retention = Retention.CAPTURE if sources else Retention.ALL_LAYERS
    selects = route is not Route.FULL_FORWARD and _selects_hidden_states(sources[-1])
    is_encoder_decoder = bool(getattr(language_model.config, "is_encoder_decoder", False))
    adds_tokens = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    return BackbonePlan(
        architecture=type(model),
        route=Route.FULL_FORWARD if adds_tokens else route,
        retention=retention,
        compiled_retention=Retention.SELECT if selects else retention,
        takes_position_ids=not (is_encoder_decoder or adds_tokens) and takes_position_ids(language_model),
        is_encoder_decoder=is_encoder_decoder,
        takes_use_cache=route is not Route.BASE_MODEL or takes(sources[0], "use_cache"),
        needs_input_ids=any(needs(part, "input_ids") for part in (language_model, *sources)),
        padding=Padding.LEFT_OUT if reads_padding(language_model) else Padding.BEHIND,
        cache_argument=cache_argument(language_model),
    )


def last_hidden_state(model: nn.Module, *, plan: BackbonePlan | None = None, **inputs: object) -> Tensor:
    """Runs a language model up to its last hidden state, after the final normalisation; no logits are built.

    Padding plays no part, on whichever side it is: a token is what a two-dimensional `attention_mask` has a 1 for, and
    its position is the number of tokens before it in its row.

    Args:
        model: A language model, or one wrapped by peft.
        plan: Its plan; None makes one.
        **inputs: What the model's forward takes: `input_ids`, `attention_mask`, `decoder_input_ids`, ...

    Returns:
        The states `[B, T, H]` in the model's dtype: of the decoder's positions for an encoder-decoder.

    Raises:
        VheadError: An encoder-decoder came without `decoder_input_ids`, `decoder_inputs_embeds` or `labels`.
    """
    plan = plan_for(model) if plan is None else plan
    if plan.takes_position_ids and inputs.get("position_ids") is None:
        inputs = {**inputs, **_position_ids(inputs)}
    states_of = partial(_last_hidden_state, model, plan)
    return padding.run(states_of, inputs, plan.padding, is_encoder_decoder=plan.is_encoder_decoder)


def _last_hidden_state(model: nn.Module, plan: BackbonePlan, inputs: dict[str, object]) -> Tensor:
    language_model = without_adapter(model)
    if _needs_full_forward(language_model, plan, inputs):
        return run(model, plan, inputs)[1]
    no_cache = {"use_cache": False} if plan.takes_use_cache else {}
    inputs = {**no_cache, **_without_logits_arguments(language_model, _accepted(plan, inputs))}
    if plan.route is Route.ENCODER_DECODER:
        return _run_encoder_decoder(language_model, inputs)
    trunk: Any = trunk_of(language_model)
    state: Tensor = trunk(**inputs, return_dict=True).last_hidden_state
    return state


def run(model: nn.Module, plan: BackbonePlan, inputs: dict[str, object]) -> tuple[ModelOutput, Tensor]:
    """Runs the whole model and keeps one hidden state.

    Returns:
        The model's output and its last hidden state `[B, T, H]`.
    """
    inputs = {**_accepted(plan, inputs), "return_dict": True}
    retention = plan.compiled_retention if torch.compiler.is_compiling() else plan.retention
    if retention is Retention.CAPTURE:
        language_model = without_adapter(model)
        with _captured_state(state_sources(language_model)) as captured:
            output = model(**inputs)
        return output, captured()
    output = model(**inputs, output_hidden_states=-1 if retention is Retention.SELECT else True)
    states = output.decoder_hidden_states if plan.is_encoder_decoder else output.hidden_states
    if states is None or states[-1] is None:
        raise VheadError(
            f"{type(model).__name__} returned no last hidden state, although it was called with {retention.value}"
        )
    return output, states[-1]


@contextmanager
def observed(model: nn.Module, plan: BackbonePlan) -> Iterator[Callable[[], Tensor]]:
    """Watches the runs of a model that somebody else starts, as `generate` does.

    Yields:
        A function that returns the last hidden state of the latest run.
    """
    language_model = without_adapter(model)
    if plan.retention is Retention.CAPTURE:
        with _captured_state(state_sources(language_model)) as captured:
            yield captured
        return
    with _all_layers_returned(language_model), _captured_state([language_model], _last_of_all_layers) as captured:
        yield captured


@contextmanager
def observed_logits(model: nn.Module) -> Iterator[Callable[[], Tensor]]:
    """Watches a language model's runs as `observed` does, for the logits of the last position `[B, 1, V]`.

    They are a copy, so that the logits of a whole prompt are not held until the next run.
    """
    with _captured_state([model], lambda output: output.logits[:, -1:].clone()) as captured:
        yield captured


def without_adapter(model: nn.Module) -> PreTrainedModel:
    """The language model inside a peft wrapper, whose adapter layers stay in place; any other model as it is."""
    unwrap = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


def _accepted(plan: BackbonePlan, inputs: dict[str, object]) -> dict[str, object]:
    """The inputs that were given: some models refuse the very name of an argument that they do not take."""
    # Callers of TRL's class pass these to every model; which states are kept is this module's business.
    ours = ("output_hidden_states", "return_dict")
    kept = ("input_ids",) if plan.needs_input_ids else ()
    inputs = with_cache_as(plan.cache_argument, inputs)
    return {name: value for name, value in inputs.items() if name not in ours and (value is not None or name in kept)}


def _route(model: PreTrainedModel) -> Route:
    if trunk_of(model) is not None:
        return Route.BASE_MODEL
    has_both = all(isinstance(getattr(model, name, None), nn.Module) for name in ("encoder", "decoder"))
    # An encoder-decoder put together from two models projects between them: only the whole of it is right.
    is_t5 = has_both and hasattr(model, "lm_head")
    return Route.ENCODER_DECODER if is_t5 else Route.FULL_FORWARD


def _selects_hidden_states(source: nn.Module) -> bool:
    """Whether transformers keeps only the chosen hidden states of this module, as its newer models do."""
    if not available("transformers.utils.output_capturing.selected_hidden_states"):
        return False
    # What is recorded of Gemma 3n is the last layer's several streams, before they are one.
    if hasattr(getattr(source, "config", None), "altup_num_inputs"):
        return False
    recorded = (getattr(source, "_can_record_outputs", None) or {}).get("hidden_states")
    classes = getattr(recorded, "target_class", recorded)
    layers = tuple(
        cls for cls in (classes if isinstance(classes, list | tuple) else [classes]) if isinstance(cls, type)
    )
    # The last one is found by counting layers, which goes wrong where others of these classes run as well, or where
    # they run in a loop.
    count = sum(isinstance(module, layers) for module in source.modules())
    counted_by = getattr(recorded, "num_hidden_layers_key", "num_hidden_layers")
    return recorded is not None and count in (0, getattr(getattr(source, "config", None), counted_by, None))


def _position_ids(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The positions of tokens that follow a cache, where padding among the cached ones cannot be moved any more."""
    mask, tokens = inputs.get("attention_mask"), inputs.get("input_ids")
    tokens = inputs.get("inputs_embeds") if tokens is None else tokens
    if not isinstance(mask, Tensor) or mask.dim() != 2 or tokens is None or mask.shape[1] <= tokens.shape[1]:
        return {}
    positions = mask.ne(0).long().cumsum(dim=-1) - 1
    return {"position_ids": positions.clamp(min=0)[:, -tokens.shape[1] :]}


def _needs_full_forward(model: PreTrainedModel, plan: BackbonePlan, inputs: Mapping[str, Any]) -> bool:
    """Whether only the whole model knows what to do with these inputs."""
    if plan.route is Route.FULL_FORWARD:
        return True
    given = _named(inputs, *inputs)
    # Some encoder-decoders shift labels inside their forward alone.
    shifts_labels = "labels" in given and plan.is_encoder_decoder and not _DECODER_INPUTS & given.keys()
    if shifts_labels and not hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return True
    return plan.route is Route.ENCODER_DECODER and not given.keys() <= _ENCODER_DECODER_INPUTS


def _run_encoder_decoder(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    if inputs.get("decoder_input_ids") is None and inputs.get("decoder_inputs_embeds") is None:
        raise VheadError(
            "decoder_input_ids: expected the decoder's tokens, to which an encoder-decoder's values belong, got none"
        )
    encoder_states = inputs.get("encoder_outputs")
    if encoder_states is None:
        encoder_states = model.encoder(**_named(inputs, "input_ids", "inputs_embeds", "attention_mask"))
    decoder_inputs = {
        "input_ids": inputs.get("decoder_input_ids"),
        "inputs_embeds": inputs.get("decoder_inputs_embeds"),
        "attention_mask": inputs.get("decoder_attention_mask"),
        "encoder_hidden_states": encoder_states[0],
        "encoder_attention_mask": inputs.get("attention_mask"),
        **_named(inputs, *CACHE_NAMES, "use_cache"),
    }
    state: Tensor = model.decoder(**decoder_inputs, return_dict=True).last_hidden_state
    return state


def _without_logits_arguments(model: PreTrainedModel, inputs: dict[str, object]) -> dict[str, object]:
    """Drops what only the language-model head uses. The decoder tokens that labels imply take their place."""
    labels = inputs.get("labels")
    inputs = {name: value for name, value in inputs.items() if name not in ("labels", "logits_to_keep")}
    if (
        labels is None
        or _named(inputs, *_DECODER_INPUTS)
        or not hasattr(model, "prepare_decoder_input_ids_from_labels")
    ):
        return inputs
    return {**inputs, "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=labels)}


def _named(inputs: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: inputs[name] for name in names if inputs.get(name) is not None}


def _first_output(output: ModelOutput) -> Tensor:
    state: Tensor = output[0]
    return state


def _last_of_all_layers(output: ModelOutput) -> Tensor:
    states = getattr(output, "decoder_hidden_states", None) or output.hidden_states
    state: Tensor = states[-1]
    return state


@contextmanager
def _all_layers_returned(model: nn.Module) -> Iterator[None]:
    """Asks for every layer's states in each run of the model, whoever starts it."""

    def ask(_module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[Any, dict[str, object]]:
        return args, kwargs | {"output_hidden_states": True}

    handle = model.register_forward_pre_hook(ask, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _captured_state(
    modules: Sequence[nn.Module], state_of: Callable[[ModelOutput], Tensor] = _first_output
) -> Iterator[Callable[[], Tensor]]:
    """Keeps the last hidden state that the outermost of these modules returns to this thread while the block runs."""
    states: list[Tensor] = []
    thread = threading.get_ident()

    def keep(_module: nn.Module, _args: object, output: ModelOutput) -> None:
        if threading.get_ident() == thread:
            states[:] = [state_of(output)]

    def captured() -> Tensor:
        if not states:
            names = " and ".join(type(module).__name__ for module in modules)
            raise VheadError(f"the model did not run through {names}, so its last hidden state cannot be read")
        return states[0]

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()
