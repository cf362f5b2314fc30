"""Where in a language model the last hidden state appears: what its modules are, found from its structure alone.

Names follow transformers' conventions. The trunk is the part that the language-model head reads, if that part can be
called in the model's place; in models that are put together from others (a vision tower and a language model, two
BERTs), it is only found inside one of the parts.
"""

from inspect import Parameter, signature
from typing import Any

from torch import nn
from transformers import PreTrainedModel

# Where models that are made of several keep the one that writes text, in the order in which transformers looks.
_WRITERS = ("language_model", "text_model", "decoder", "text_decoder")

# Modules with one of these count positions in a way of their own, and a plain count would be wrong or refused:
# multimodal rotary positions, RoBERTa's that start behind the padding id, Reformer's that grow with its chunks.
_OWN_POSITIONS = (
    "get_rope_index",
    "create_position_ids_from_input_ids",
    "create_position_ids_from_inputs_embeds",
    "_pad_to_mult_of_chunk_length",
)

# Models that see padding wherever it is, by `model_type`, as nothing in their structure tells: they attend to it in
# both directions, or hash and group it with their tokens. tests/architectures holds the list against every model.
_READ_PADDING = ("cpmant", "paligemma", "reformer")


def trunk_of(model: nn.Module) -> nn.Module | None:
    """The part that takes the model's inputs and returns the state that its head reads, or None without such a part."""
    base_model: Any = getattr(model, "base_model", model)
    if base_model is not model:
        return None if _has_output_embeddings(base_model, model) else base_model
    # Llama 4's text model has a base model by name alone: its trunk is the one other child beside the head.
    children = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    is_trunk = len(children) == 1 and any(child is _output_embeddings(model) for child in model.children())
    return children[0] if is_trunk and not _has_output_embeddings(children[0], model) else None


def state_sources(model: nn.Module) -> list[nn.Module]:
    """The modules that return the last hidden state first of all, outermost first; none where no module returns it.

    Some models (OPT, BART as a decoder) pass their trunk by and call the decoder in it.
    """
    trunk = trunk_of(model)
    if trunk is not None:
        decoder = getattr(trunk, "decoder", None)
        return [trunk, decoder] if isinstance(decoder, nn.Module) else [trunk]
    writer = next((w for name in _WRITERS if isinstance(w := getattr(model, name, None), nn.Module)), None)
    if writer is None:
        return []
    return state_sources(writer) or ([] if _has_output_embeddings(writer, model) else [writer])


def takes_position_ids(model: nn.Module) -> bool:
    """Whether `position_ids` that count a row's tokens from zero are what the model would count itself."""
    module = trunk_of(model) or model
    has_own = any(hasattr(part, name) for part in module.modules() for name in _OWN_POSITIONS)
    return not has_own and "position_ids" in signature(module.forward).parameters


def reads_padding(model: nn.Module) -> bool:
    """Whether also padding behind a row's tokens changes their states."""
    return getattr(getattr(model, "config", None), "model_type", None) in _READ_PADDING


def takes(module: nn.Module, argument: str) -> bool:
    """Whether a module's forward accepts an argument, by name or among others."""
    parameters = signature(module.forward).parameters
    return argument in parameters or any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values())


def needs(module: nn.Module, argument: str) -> bool:
    """Whether a module's forward cannot be called without an argument."""
    parameter = signature(module.forward).parameters.get(argument)
    return parameter is not None and parameter.default is Parameter.empty


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    embeddings: nn.Module | None = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return embeddings


def _has_output_embeddings(part: nn.Module, model: nn.Module) -> bool:
    embeddings = _output_embeddings(model)
    return any(module is embeddings for module in part.modules())
