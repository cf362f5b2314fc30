"""Which parameters of a model are trained."""

from collections.abc import Iterator
from typing import Any, Literal

from torch import nn

from vhead.errors import VheadError

Part = Literal["body", "attention", "embeddings"]
_PARTS = ("body", "attention", "embeddings")


def freeze(model: nn.Module, part: Part) -> list[str]:
    """Freezes a part of a model, so that it is not trained; a frozen part keeps what only its gradients would need.

    Args:
        model: A model with a value head, or a language model.
        part: `"body"`: the language model, and not the value head; `"attention"`: the attention of every layer, with
            its projections and norms, but not a norm before it; `"embeddings"`: those of tokens and positions, and the
            language-model head where it is tied to them. Adapters in a part are frozen with it.

    Returns:
        The names of the parameters that are frozen now and were not before.

    Raises:
        ValueError: There is no such part.
        VheadError: The model has no parameters of that kind.
    """
    if part not in _PARTS:
        raise ValueError(f"part: expected one of {', '.join(_PARTS)}, got {part!r}")
    body: Any = getattr(model, "pretrained_model", model)
    parameters = [parameter for module in _modules(body, part) for parameter in module.parameters()]
    if not parameters:
        raise VheadError(f"part: expected a model with {part}, found none in the {type(body).__name__}")
    chosen = {id(parameter) for parameter in parameters}
    frozen = [
        name for name, parameter in model.named_parameters() if id(parameter) in chosen and parameter.requires_grad
    ]
    for parameter in parameters:
        parameter.requires_grad = False
    return frozen


def _modules(body: Any, part: Part) -> Iterator[nn.Module]:
    if part == "body":
        yield body
    elif part == "attention":
        yield from (module for module in body.modules() if _is_attention(module))
    else:
        yield body.get_input_embeddings()
        yield from (module for name, module in body.named_modules() if _holds_positions(name, module))


def _is_attention(module: nn.Module) -> bool:
    """Whether this is what a layer mixes tokens with; transformers names every such class so."""
    name = type(module).__name__
    mixes = ("Attention", "Mixer", "GatedDeltaNet", "TimeMix")
    return any(word in name for word in mixes) and not name.endswith(("Layer", "Block", "Model"))


def _holds_positions(name: str, module: nn.Module) -> bool:
    last = name.rpartition(".")[2]
    return isinstance(module, nn.Embedding) and (last in ("wpe", "embed_positions") or "position" in last)
