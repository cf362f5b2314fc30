"""Attention by FlexAttention: one kernel for a whole packed row, which passes over blocks that nobody sees."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vhead.backbone.placement import to_device
from vhead.packing.attention.visibility import Visibility
from vhead.packing.trees import Segment

# Rows and columns of a block, as FlexAttention's kernels want them.
BLOCK = 128
# With one block, a size of 1, the compiled kernel would be another one than the one that was checked.
_FEWEST_BLOCKS = 2

Modification = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
_Blocks = NDArray[np.bool_]


def whole_blocks(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """The same segments, and one of padding that fills the last block; it sees itself and is seen by nobody."""
    rows = segments[-1].stop
    filled = max(_FEWEST_BLOCKS, -(-rows // BLOCK)) * BLOCK
    return (*segments, Segment(rows, filled, ())) if filled > rows else tuple(segments)


class FlexAttention:
    """Attention over one packed row of whole blocks, for one layer after the other.

    Args:
        segments: What the row consists of, filled up by `whole_blocks`.

    Raises:
        ImportError: This version of torch has no FlexAttention.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._visibility = Visibility.of(segments)
        # By device too, as a model's layers may be on several.
        self._masks: dict[tuple[torch.device, int | None], Any] = {}
        self._caps: dict[tuple[torch.device, float], Modification] = {}

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        window: int | None = None,
    ) -> Tensor:
        """Attends over the row, as `Attend` says."""
        device = query.device
        if (device, window) not in self._masks:
            self._masks[device, window] = block_mask(self._visibility, window, device)
        if softcap is not None and (device, softcap) not in self._caps:
            self._caps[device, softcap] = _capped(torch.full((), softcap, device=device))
        attended: Tensor = _kernel(device.type)(
            query,
            key,
            value,
            score_mod=None if softcap is None else self._caps[device, softcap],
            block_mask=self._masks[device, window],
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return attended.transpose(1, 2).contiguous()


@cache
def _kernel(device: str) -> Callable[..., Tensor]:
    """Compiles FlexAttention for a kind of device.

    Sizes are symbols from the first call on, so the kernel that the self-check tries is the one that runs later.
    """
    from torch.nn.attention.flex_attention import flex_attention  # absent before torch 2.5

    compiled: Callable[..., Tensor] = torch.compile(
        flex_attention, dynamic=True, fullgraph=True, backend="eager" if device == "cpu" else "inductor"
    )
    return compiled


def _capped(softcap: Tensor) -> Modification:
    """The cap is a tensor, as a kernel for symbolic sizes takes no symbolic number."""

    def cap(score: Tensor, _batch: Tensor, _head: Tensor, _query: Tensor, _key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


def block_mask(visibility: Visibility, window: int | None, device: torch.device) -> Any:
    """What rows see, by blocks: those that are seen as a whole, and those whose every pair is looked at.

    Args:
        visibility: Of whole blocks of rows.
        window: Tokens that each token sees on its path, itself among them; None: all.
        device: Where the attention runs.
    """
    from torch.nn.attention.flex_attention import BlockMask  # absent before torch 2.5

    full, partial = seen_blocks(visibility, window)
    partial_counts, partial_chosen = _listed(partial, device)
    full_counts, full_chosen = _listed(full, device)
    # The first position that a row does not see any more: layers with and without a window are one kernel.
    beyond = visibility.positions - (len(visibility.positions) if window is None else window)
    ends, positions, hidden = (
        to_device(torch.from_numpy(numbers.astype(np.int32)), device)
        for numbers in (visibility.ends, visibility.positions, beyond)
    )

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < ends[key]) & (positions[key] > hidden[query])

    return BlockMask.from_kv_blocks(
        partial_counts, partial_chosen, full_counts, full_chosen, BLOCK_SIZE=BLOCK, mask_mod=visible
    )


def seen_blocks(visibility: Visibility, window: int | None) -> tuple[_Blocks, _Blocks]:
    """Pairs of a block of queries and a block of keys `[T / 128, T / 128]`: seen as a whole, and seen in part.

    In part says that some pair may be visible, not that one is: those blocks are looked at pair by pair.
    """
    ends, positions = (numbers.reshape(-1, BLOCK) for numbers in (visibility.ends, visibility.positions))
    starts = np.arange(len(ends)) * BLOCK
    before = starts[:, None] > starts
    seen = (starts[:, None] >= starts) & (starts[:, None] < ends.max(axis=1))
    full = before & (starts[:, None] + BLOCK <= ends.min(axis=1))
    if window is not None:
        full &= positions.max(axis=1)[:, None] - positions.min(axis=1) < window
        seen &= positions.min(axis=1)[:, None] - positions.max(axis=1) < window
    return full, seen & ~full


def _listed(blocks: _Blocks, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each block of queries, how many blocks of keys `[1, 1, T / 128]`, and which `[1, 1, T / 128, T / 128]`."""
    chosen = np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)
    counts = blocks.sum(axis=1, dtype=np.int32)
    return to_device(torch.from_numpy(counts), device)[None, None], to_device(torch.from_numpy(chosen), device)[
        None, None
    ]
