"""A frozen copy of a policy, which can share the storage of the policy's first layers."""

import copy
from typing import TypeVar

from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from vhead.errors import ReferenceModelError

# How decoder layers are named, in the order in which they are tried.
LAYER_PATTERNS = (
    "transformer.h.{layer}",
    "model.decoder.layers.{layer}",
    "gpt_neox.layers.{layer}",
    "model.layers.{layer}",
    "decoder.block.{layer}",
)

Model = TypeVar("Model", bound=nn.Module)


def create_reference_model(model: Model, num_shared_layers: int | None = None, pattern: str | None = None) -> Model:
    """Copies a model as the frozen reference of its training, in evaluation mode.

    With shared layers, every parameter before layer `num_shared_layers` lies in the same memory in both models and is
    frozen in both, tied output embeddings included.

    Args:
        model: The policy; what is shared is frozen in it.
        num_shared_layers: How many layers are shared. None: none, and the policy is left as it is.
        pattern: How the parameters of a layer are named, for instance "model.layers.{layer}". None: a known pattern.

    Raises:
        ReferenceModelError: Under DeepSpeed ZeRO-3, or when no parameter matches the pattern.
    """
    if is_deepspeed_zero3_enabled():
        raise ReferenceModelError(
            "a model whose parameters DeepSpeed ZeRO-3 has partitioned cannot be copied: load the reference model anew"
        )
    shared = [] if num_shared_layers is None else _parameters_before(model, num_shared_layers, pattern)
    for parameter in shared:
        parameter.requires_grad = False
    # What the memo holds is taken for copied already: the shared parameters get no second storage, not even briefly.
    memo: dict[int, object] = {id(shared_): nn.Parameter(shared_.data, requires_grad=False) for shared_ in shared}
    return copy.deepcopy(model, memo).requires_grad_(requires_grad=False).eval()


def _parameters_before(model: nn.Module, layer: int, pattern: str | None) -> list[nn.Parameter]:
    """The parameters that are named before the first one of a layer."""
    named = list(model.named_parameters())
    for candidate in LAYER_PATTERNS if pattern is None else (pattern,):
        of_layer = candidate.format(layer=layer)
        boundary = next((index for index, (name, _) in enumerate(named) if of_layer in name), None)
        if boundary is not None:
            return [parameter for _, parameter in named[:boundary]]
    tried = ", ".join(LAYER_PATTERNS) if pattern is None else pattern
    raise ReferenceModelError(
        f"pattern: no parameter of the {type(model).__name__} is named like layer {layer} in {tried}"
    )
