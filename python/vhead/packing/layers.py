"""Decoder layers of transformers' models, computed in place while they attend over packed rows.

Between its products such a layer makes a dozen passes over fresh memory. Here the rotary embeddings and both residuals
are in place, and the last layer computes only keys and values of the rows that nobody reads.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vhead.ops.rotary import rotate, rotates_in_place
from vhead.packing import limits
from vhead.packing.attention.interface import attending

# transformers' classes that norm before attention and before the feed-forward layer, and add nothing else.
_CLASSES = frozenset(f"{family}DecoderLayer" for family in ("Llama", "Mistral", "Qwen2", "Qwen3"))
_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}


def looks_like_layer(module: nn.Module) -> bool:
    """Whether a module has the parts of a decoder layer, of whatever kind."""
    return all(hasattr(module, part) for part in _PARTS)


def is_layer(module: Any) -> bool:
    """Whether a module is one of transformers' decoder layers in its usual form; a check has to show that it is."""
    kind = type(module)
    if kind.__name__ not in _CLASSES or not kind.__module__.startswith("transformers.models."):
        return False
    attention = getattr(module, "self_attn", None)
    if not isinstance(attention, nn.Module) or {name for name, _ in module.named_children()} != _PARTS:
        return False
    if {name for name, _ in attention.named_children()} - _HEAD_NORMS != _PROJECTIONS:
        return False
    # What a window hides is told to attention in another way by each release.
    return hasattr(attention, "scaling") and limits.sliding_window(attention.config) is None


def last_of(model: nn.Module, found: Sequence[nn.Module]) -> nn.Module | None:
    """The last layer of a language model, if its layers are among those that were found."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module))
    return next((own[-1] for own in lists if all(any(layer is each for each in found) for layer in own)), None)


def forward(
    layer: Any,
    rows: Tensor | None,
    in_tuple: bool,  # noqa: FBT001
    states: Tensor,
    *arguments: object,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **others: object,
) -> Any:
    """The layer along a packed row, or by its own forward where the model attends in another way.

    Args:
        layer: One of transformers' decoder layers.
        rows: The rows of its result that are wanted; None: all.
        in_tuple: Whether its own forward gives the result in a tuple, as in older releases.
        states: `[1, T, H]`.
        *arguments: The layer's own.
        position_embeddings: Cosines and sines `[1, T, D]`.
        **others: The layer's own.

    Returns:
        `[1, T, H]`, or `[1, R, H]` of R wanted rows, as the layer's own forward gives them.
    """
    attend, attention = attending(), layer.self_attn
    drops = attention.training and getattr(attention, "attention_dropout", 0.0)
    if attend is None or arguments or position_embeddings is None or drops:
        return type(layer).forward(layer, states, *arguments, position_embeddings=position_embeddings, **others)
    query, key, value = _heads(attention, layer.input_layernorm(states))
    query, key = (_rotated(heads, *position_embeddings).transpose(1, 2) for heads in (query, key))
    attended = attend(query, key, value.transpose(1, 2), scale=attention.scaling, softcap=None, window=None)
    if rows is not None:
        attended, states = attended[:, rows], states[:, rows]
    states = _added(attention.o_proj(attended.flatten(2)), states)
    states = _added(layer.mlp(layer.post_attention_layernorm(states)), states)
    return (states,) if in_tuple else states


def _heads(attention: Any, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, `[1, T, heads, D]`."""
    shape = (*states.shape[:-1], -1, attention.head_dim)
    query, key, value = (
        projection(states).view(shape) for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    return query, key, value


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if rotates_in_place(heads, cos, sin):
        rotate(heads, cos, sin)
        return heads
    first, second = heads.chunk(2, dim=-1)
    turned = heads.new_empty(heads.shape)
    turned[..., : first.shape[-1]], turned[..., first.shape[-1] :] = -second, first
    return heads * cos[:, :, None] + turned * sin[:, :, None]


def _added(output: Tensor, residual: Tensor) -> Tensor:
    """Their sum, in the place of what a module has just made."""
    return output.add_(residual) if output.dtype == residual.dtype else output + residual
