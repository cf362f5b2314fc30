"""What a language model and its configuration say about the tokens it takes: how many, and from how far away."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

# Attributes by which transformers' models limit how far some of their layers look back.
_SLIDING = "sliding_window"
_WINDOWS = (
    _SLIDING,
    "sliding_window_size",
    "attention_window",
    "attention_window_size",
    "attention_chunk_size",
    "window_size",
    "local_attention_window",
    "local_attn_window_size",
    "local_window_size",
    "local_attn_chunk_length",
    "lsh_attn_chunk_length",
)
# Attributes by which they limit how many tokens a layer looks at: which, depends beyond that on how ties are broken.
_SELECTIONS = ("keep_window_size", "index_topk")
# Attributes that state how many positions a model has; the first one that is there counts.
_LENGTHS = ("max_position_embeddings", "max_target_positions", "max_seq_len")
_ROTARY = ("rope_parameters", "rope_scaling")
# Rotary embeddings of these kinds reach further than the original context, by a factor.
_SCALED_ROTARY = ("linear", "dynamic", "yarn", "longrope", "su", "llama3")
# Rotary embeddings of these kinds depend on a batch's longest sequence once it is longer than the original context.
_CHANGING_ROTARY = ("dynamic", "longrope")


def vocabulary_size(body: Any) -> int:
    """How many token ids can be both read and predicted."""
    embedding: Tensor = body.get_input_embeddings().weight
    predicted = getattr(body.get_output_embeddings(), "weight", embedding)
    return min(embedding.shape[0], predicted.shape[0])


def context_length(body: Any) -> int | None:
    """Tokens that the model takes at once, None where it states no limit.

    Rotary embeddings that are scaled take the original context times their factor, or what the configuration states
    where that is more. A table of positions that begins behind the padding's id has as many fewer.
    """
    text = text_config(body.config)
    length = _stated_length(text)
    if length is None:
        return None
    tables = [
        table.num_embeddings - table.padding_idx - 1
        for name, table in body.named_modules()
        if isinstance(table, nn.Embedding) and table.padding_idx is not None and "position_embeddings" in name
    ]
    # ProphetNet's second stream reads the position after each token's.
    return min([max(length, *_scaled_lengths(text)), *(table - bool(getattr(text, "ngram", 0)) for table in tables)])


def _stated_length(text: Any) -> int | None:
    stated = (getattr(text, name, None) for name in _LENGTHS)
    return next((length for length in stated if isinstance(length, int) and length > 0), None)


def _scaled_lengths(text: Any) -> Iterator[int]:
    """The stated length, and those that scaled rotary embeddings reach."""
    stated = _stated_length(text) or 0
    yield stated
    for rotary in _rotary(text):
        original, factor = _original_length(text, rotary), rotary.get("factor")
        # Where only some kinds of layers are scaled, as Gemma 3's, the stated length is the final one.
        if original is None and not _has_kinds(text):
            original = stated
        if _rotary_kind(rotary) in _SCALED_ROTARY and original and isinstance(factor, int | float):
            yield int(original * factor)


def attention_window(config: Any, *, sliding: bool = True) -> int | None:
    """Tokens that the layer with the shortest sight sees, None where all see everything.

    Args:
        config: A configuration of any class.
        sliding: Whether `sliding_window` counts, which transformers tells attention functions.
    """
    text = text_config(config)
    names = _WINDOWS if sliding else tuple(name for name in _WINDOWS if name != _SLIDING)
    found = [size for name in names for size in _integers(getattr(text, name, None)) if size > 0]
    return min(found, default=None)


def sliding_window(config: Any) -> int | None:
    """Tokens that layers with a sliding window see, None where there are none."""
    window = getattr(text_config(config), _SLIDING, None)
    return window if isinstance(window, int) and not isinstance(window, bool) and window > 0 else None


def selected_tokens(config: Any) -> int | None:
    """Tokens up to which no layer selects among those that it looks at, None where none ever does."""
    text = text_config(config)
    return min((size for name in _SELECTIONS for size in _integers(getattr(text, name, None))), default=None)


def stable_rotary_length(config: Any) -> int | None:
    """The length up to which rotary embeddings do not depend on the batch, None where they never do."""
    text = text_config(config)
    changing = [rotary for rotary in _rotary(text) if _rotary_kind(rotary) in _CHANGING_ROTARY]
    lengths = [_original_length(text, rotary) or _stated_length(text) for rotary in changing]
    return min((length for length in lengths if length is not None), default=None)


def special_tokens(config: Any) -> set[int]:
    """Ids that a configuration names: beginnings, ends, padding, places of images."""
    fields = {**vars(config), **vars(text_config(config))}
    named = (value for name, value in fields.items() if name.endswith(("_token_id", "_token_index", "_patch_id")))
    return {token for value in named for token in _integers(value)}


def pad_token(config: Any) -> int | None:
    """The id of padding, None where there is none."""
    for place in (config, text_config(config)):
        token = getattr(place, "pad_token_id", None)
        if isinstance(token, int):
            return token
    return None


def text_config(config: Any) -> Any:
    """The language model's part of a configuration."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _integers(value: object) -> Iterator[int]:
    values = value if isinstance(value, list | tuple) else [value]
    return (item for item in values if isinstance(item, int) and not isinstance(item, bool))


def _rotary(text: Any) -> Iterator[Mapping[str, Any]]:
    """The parameters of a configuration's rotary embeddings, of each kind of layers."""
    return (rotary for name in _ROTARY for rotary in _mappings(getattr(text, name, None)))


def _rotary_kind(rotary: Mapping[str, Any]) -> object:
    return rotary.get("rope_type", rotary.get("type"))


def _original_length(text: Any, rotary: Mapping[str, Any]) -> int | None:
    name = "original_max_position_embeddings"
    return rotary.get(name) or getattr(text, name, None)


def _has_kinds(text: Any) -> bool:
    """Whether layers of several kinds have rotary embeddings of their own."""
    return hasattr(text, "rope_local_base_freq") or any(
        isinstance(value, Mapping) for rotary in _rotary(text) for value in rotary.values()
    )


def _mappings(value: object) -> Iterator[Mapping[str, Any]]:
    """A mapping of parameters, or one such mapping per kind of layer."""
    if isinstance(value, Mapping):
        yield value
        for inner in value.values():
            yield from _mappings(inner)
