"""Attention inside packed trees: each token sees the tokens on its own path and nothing else.

Two ways lead there. `TreeAttention` is what transformers' attention interface calls instead of the model's own
function: it attends segment by segment, so that what a mask would hide is not computed. `dense_mask` is a mask for
models that take one and do not ask the interface.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vhead.scoring.trees import Segment

NAME = "vhead_tree"
_CONFIGURED = "_attn_implementation_internal"

# Queries that are looked at together: a block needs a mask of its size times the keys before its end.
_QUERY_BLOCK = 512
_HIDDEN = float("-inf")
# The CPU's fused kernel takes fewer key heads than query heads; elsewhere that would leave the fused kernel.
_KERNEL_GROUPS_HEADS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 5)


class TreeAttention:
    """Attention over one packed row, for one layer after the other.

    Args:
        segments: What the row consists of.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments
        self._masks: dict[tuple[int, int], Tensor] = {}

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, softcap: float | None) -> Tensor:
        """Attends.

        Args:
            query: `[1, heads, T, D]`.
            key: `[1, key heads, T, D]`, whose heads each serve the same number of query heads.
            value: `[1, key heads, T, E]`.
            scale: Of the products, None for `D ** -0.5`.
            softcap: Gemma 2's bound of the scaled products, or None.

        Returns:
            `[1, T, heads, E]`, contiguous.
        """
        output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        for segment in self._segments:
            keys, values = (_along_path(states, segment) for states in (key, value))
            before = segment.path_length
            for start in range(segment.start, segment.stop, _QUERY_BLOCK):
                stop = min(start + _QUERY_BLOCK, segment.stop)
                seen = before + stop - segment.start
                attended = self._attend(query[:, :, start:stop], keys[:, :, :seen], values[:, :, :seen], scale, softcap)
                output[:, start:stop] = attended.transpose(1, 2)
        return output

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, softcap: float | None) -> Tensor:
        """The last query sees all keys, the one before it all but the last, and so on."""
        if softcap is not None:
            return self._attend_capped(query, key, value, scale, softcap)
        groups = query.shape[1] // key.shape[1]
        options: dict[str, Any] = {"scale": scale}
        if groups > 1 and _KERNEL_GROUPS_HEADS and query.device.type == "cpu":
            options["enable_gqa"] = True
        else:
            key, value = _repeated(key, groups), _repeated(value, groups)
        if query.shape[2] == key.shape[2]:
            return functional.scaled_dot_product_attention(query, key, value, is_causal=True, **options)
        mask = self._mask(query, key.shape[2])
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)

    def _attend_capped(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, softcap: float) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        key, value = _repeated(key, groups), _repeated(value, groups)
        products = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scale is None else scale)
        products = products.div_(softcap).tanh_().mul_(softcap) + self._mask(query, key.shape[2])
        return products.softmax(dim=-1, dtype=torch.float32).to(query.dtype) @ value

    def _mask(self, query: Tensor, keys: int) -> Tensor:
        """Additive, `[queries, keys]`; kept, as every layer asks for the same ones."""
        queries = query.shape[2]
        if (queries, keys) not in self._masks:
            mask = torch.full((queries, keys), _HIDDEN, dtype=query.dtype, device=query.device)
            self._masks[queries, keys] = mask.triu_(keys - queries + 1)
        return self._masks[queries, keys]


def _along_path(states: Tensor, segment: Segment) -> Tensor:
    """Keys or values of a segment's path and of the segment itself; a view where they stand side by side."""
    if not segment.path:
        return states[:, :, segment.start : segment.stop]
    if len(segment.path) == 1 and segment.path[0][1] == segment.start:
        return states[:, :, segment.path[0][0] : segment.stop]
    rows = [*segment.path, (segment.start, segment.stop)]
    return torch.cat([states[:, :, start:stop] for start, stop in rows], dim=2)


def _repeated(states: Tensor, groups: int) -> Tensor:
    """Each head `groups` times, one after the other."""
    return states if groups == 1 else states.repeat_interleave(groups, dim=1)


def dense_mask(segments: Sequence[Segment], dtype: torch.dtype) -> Tensor:
    """The same visibility as an additive mask `[1, 1, T, T]`."""
    rows = segments[-1].stop
    visible = torch.zeros(rows, rows, dtype=torch.bool)
    for segment in segments:
        for start, stop in segment.path:
            visible[segment.start : segment.stop, start:stop] = True
        own = slice(segment.start, segment.stop)
        visible[own, own] = torch.ones(segment.stop - segment.start, segment.stop - segment.start).tril_().bool()
    return torch.zeros(rows, rows, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)[None, None]


class _Active(threading.local):
    """What the attention function works on in this thread."""

    attention: TreeAttention | None = None


_active = _Active()


def _forward(  # noqa: PLR0917, the interface's signature
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_unused: object,
) -> tuple[Tensor, None]:
    """What the attention interface calls; whether the arguments it leaves out matter is found by the self-check."""
    del module, attention_mask
    if _active.attention is None:
        raise RuntimeError(f"the attention {NAME!r} works only while a scorer runs the model")
    return _active.attention(query, key, value, scaling, softcap), None


def register() -> None:
    """Makes the attention function known to transformers under its own name.

    Raises:
        ImportError: This version of transformers has no attention interface.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: PLC0415, absent before 4.48

    # Before 4.50 it was a dict.
    add = getattr(ALL_ATTENTION_FUNCTIONS, "register", None) or ALL_ATTENTION_FUNCTIONS.__setitem__
    add(NAME, _forward)


@contextmanager
def tree_attention(model: nn.Module, segments: Sequence[Segment]) -> Iterator[None]:
    """Lets a model attend along the paths of a packed row while the block runs, in this thread."""
    found = (getattr(module, "config", None) for module in model.modules())
    configs = {id(config): config for config in found if hasattr(config, _CONFIGURED)}
    # The public setter would write into the configurations inside a configuration as well.
    before = {key: getattr(config, _CONFIGURED) for key, config in configs.items()}
    try:
        _active.attention = TreeAttention(segments)
        for config in configs.values():
            setattr(config, _CONFIGURED, NAME)
        yield
    finally:
        _active.attention = None
        for key, config in configs.items():
            setattr(config, _CONFIGURED, before[key])
