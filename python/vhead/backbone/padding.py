"""Rows with padding, run in a way in which no model takes padding for text.

Padding behind a row's tokens is harmless to nearly every model that reads from left to right: what comes later changes
nothing. Padding before them, or between them, is not: some models count positions by column, recurrent layers read
it, others group tokens in blocks from the first column on, or tell padding by its id and not by the mask. So tokens go
first, and the states go back to where the tokens were.
"""

from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, object]

_DECODER = "decoder_"
_TOKENS = ("input_ids", "inputs_embeds")
# Inputs with one entry for each token and more dimensions than two; those with two are told by their shape.
_PER_TOKEN = ("inputs_embeds", "position_ids", "bbox", "image_attention_mask", "cross_attention_mask")
# Inputs with two dimensions that are another part's, however many columns they have.
_OTHERS = ("labels", "qformer_", "image_sizes", "image_grid_thw", "video_grid_thw")


class Padding(Enum):
    """What becomes of padding when values are computed."""

    BEHIND = "behind each row's tokens, wherever it was"
    LEFT_OUT = "left out: each padded row goes alone"


def run(states_of: Callable[[Inputs], Tensor], inputs: Inputs, padding: Padding, *, is_encoder_decoder: bool) -> Tensor:
    """Runs padded rows as their model can take them.

    A token is what `attention_mask` has a 1 for, and only tokens are counted: its position is the number of tokens
    before it in its row.

    Args:
        states_of: Gives the last hidden states `[B, E + T, H]` of inputs; E is the number of virtual tokens of an
            adapter.
        inputs: What the model's forward takes.
        padding: What becomes of padding.
        is_encoder_decoder: Whether the states are those of the decoder's tokens.

    Returns:
        The states, each where its token was.
    """
    if is_encoder_decoder:
        # The encoder's states stay inside the model, so only the decoder's are put back.
        inputs, _ = _tokens_first(inputs, "")
        inputs, order = _tokens_first(inputs, _DECODER)
    elif padding is Padding.LEFT_OUT and (mask := _mask_of(inputs, "")) is not None and not bool(mask.all()):
        return torch.stack(list(_alone(states_of, inputs, mask)))
    else:
        inputs, order = _tokens_first(inputs, "")
    states = states_of(inputs)
    return states if order is None else _put_back(states, order)


def _mask_of(inputs: Mapping[str, Any], prefix: str) -> Tensor | None:
    """The mask `[B, T]` of these tokens as booleans; None where there is none, or one that is not theirs alone."""
    mask = inputs.get(f"{prefix}attention_mask")
    given = [inputs[prefix + name] for name in _TOKENS if inputs.get(prefix + name) is not None]
    if not isinstance(mask, Tensor) or not given or mask.shape != given[0].shape[:2]:
        return None
    return mask.ne(0)


def _tokens_first(inputs: Inputs, prefix: str) -> tuple[Inputs, Tensor | None]:
    """The inputs with every row's tokens before its padding, and which columns they came from, None for their own."""
    mask = _mask_of(inputs, prefix)
    if mask is None or not (torch.compiler.is_compiling() or bool((mask[:, 1:] & ~mask[:, :-1]).any())):
        return inputs, None
    order = (~mask).long().argsort(dim=-1, stable=True)
    rows = torch.arange(len(mask), device=mask.device)[:, None]
    return {**inputs, **_columns(inputs, prefix, mask, rows, order)}, order


def _columns(inputs: Mapping[str, Any], prefix: str, mask: Tensor, rows: Tensor, columns: Tensor) -> Inputs:
    """The entries in these rows and columns, of every input that has one for each token of `mask` `[B, T]`."""
    chosen: Inputs = {}
    for name, value in inputs.items():
        own = name.removeprefix(prefix)
        if not isinstance(value, Tensor) or not name.startswith(prefix) or own.startswith((_DECODER, *_OTHERS)):
            continue
        rows, columns = rows.to(value.device), columns.to(value.device)
        if own == "position_ids" and value.shape[-2:] in (mask.shape, (1, mask.shape[1])):
            chosen[name] = value.expand(*value.shape[:-2], *mask.shape)[..., rows, columns]
        elif value.shape == mask.shape or (own in _PER_TOKEN and value.shape[:2] == mask.shape):
            chosen[name] = value[rows, columns]
    return chosen


def _put_back(states: Tensor, order: Tensor) -> Tensor:
    """Moves states `[B, E + T, H]` back to where their tokens were before these were put into `order` `[B, T]`."""
    columns = order.to(states.device).argsort(dim=-1)
    rows = torch.arange(len(states), device=states.device)[:, None]
    virtual = states.shape[1] - columns.shape[1]
    moved = states[rows, columns + virtual]
    return torch.cat([states[:, :virtual], moved], dim=1) if virtual else moved


def _alone(states_of: Callable[[Inputs], Tensor], inputs: Inputs, mask: Tensor) -> Iterator[Tensor]:
    """The states `[T, H]` of each row, which runs by itself and without its padding; at padding they are zero."""
    for row, tokens in enumerate(mask):
        # A row of padding alone runs as it is, because no model takes a row without tokens.
        kept = (tokens if tokens.any() else ~tokens).nonzero().flatten()
        own = {
            name: value[row : row + 1] if isinstance(value, Tensor) and value.shape[:1] == mask.shape[:1] else value
            for name, value in inputs.items()
        }
        states = states_of({**own, **_columns(inputs, "", mask, kept.new_full((1, len(kept)), row), kept[None])})[0]
        yield states.new_zeros(len(tokens), states.shape[-1]).index_copy(0, kept.to(states.device), states)
