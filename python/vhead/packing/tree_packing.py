"""Strategies that put sequences with the same first tokens into one row of a batch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vhead.backbone.placement import to_device
from vhead.packing.attention.flash import FlashAttention
from vhead.packing.attention.flex import FlexAttention, whole_blocks
from vhead.packing.attention.interface import Attend, AttentionInterface
from vhead.packing.attention.segments import SegmentAttention
from vhead.packing.attention.visibility import dense_mask
from vhead.packing.strategies import Batch, Body, Rows, Strategy, as_row, row_multiple
from vhead.packing.trees import Pack, Segment, Tokens, pack_trees


class _Packing(Strategy[Pack]):
    """Trees of sequences as one row each."""

    def __init__(self, body: Body) -> None:
        self._body = body

    def batches(self, sequences: Sequence[Tokens], prompts: Sequence[int], budget: int) -> Iterator[Batch[Pack]]:
        """Batches of one packed row each."""
        del prompts
        return (
            _packed(pack) for pack in pack_trees(sequences, budget, row_multiple(self._body.device, self._body.dtype))
        )

    def spoilt(self, content: Pack) -> Pack:
        """Takes the tree for one sequence, so that tokens see others that are not on their path."""
        return replace(content, segments=(Segment(0, len(content.tokens), ()),))


class TreePacking(_Packing):
    """Trees of sequences as one row, attended segment by segment; needs transformers' attention interface."""

    name = "tree packing"
    attention = "segments"
    heeds_windows = True
    attend: Callable[[Sequence[Segment]], Attend] = SegmentAttention

    def __init__(self, body: Body) -> None:
        super().__init__(body)
        self._interface = AttentionInterface(body.model)

    def states(self, batch: Batch[Pack]) -> Tensor:
        """Runs the row without a mask, because the attention goes by the segments."""
        return self._run(batch.content)

    def states_of(self, batch: Batch[Pack], rows: Rows) -> Tensor:
        """Runs the row through the last layer for these rows alone, if that is worth it and the model can take it."""
        body = self._body
        filled = np.pad(rows, (0, -len(rows) % row_multiple(body.device, body.dtype)))
        few = 0 < len(filled) <= body.most_selected * len(batch.content.tokens)
        if not few or torch.is_grad_enabled() or not body.fused.selects_rows(body.model):
            return super().states_of(batch, rows)
        return self._run(batch.content, to_device(torch.from_numpy(filled), body.device))[: len(rows)]

    def _run(self, pack: Pack, rows: Tensor | None = None) -> Tensor:
        with self._interface.attending(type(self).attend(pack.segments)):
            return self._body.states(as_row(pack.tokens), position_ids=as_row(pack.positions), rows=rows)


class FlashTreePacking(TreePacking):
    """The same, attended by FlashAttention's packed sequences; needs the package flash_attn."""

    name = "tree packing with FlashAttention"
    attention = "flash"
    works_in_blocks = True
    is_differentiable = False  # The parts of its softmax are merged in place.
    attend = FlashAttention


class FlexTreePacking(TreePacking):
    """The same, attended by FlexAttention, whose blocks the row is filled up to; needs torch 2.5."""

    name = "tree packing with FlexAttention"
    attention = "flex"
    works_in_blocks = True

    @property
    def is_differentiable(self) -> bool:  # type: ignore[override]
        """Not on a CPU, where torch's FlexAttention has no backward."""
        return self._body.device.type != "cpu"

    def _run(self, pack: Pack, rows: Tensor | None = None) -> Tensor:
        """Runs the row with padding up to whole blocks, a sequence of its own, whose states are left out."""
        segments = whole_blocks(pack.segments)
        padding = segments[-1].stop - len(pack.tokens)
        tokens, positions = _filled(pack.tokens, padding), _filled(pack.positions, padding)
        with self._interface.attending(FlexAttention(segments)):
            states = self._body.states(as_row(tokens), position_ids=as_row(positions), rows=rows)
        return states[: len(pack.tokens)]


# Rows of a dense mask, which has their square of entries.
_LONGEST_MASK = 4096


class MaskedTreePacking(_Packing):
    """Trees of sequences as one row, with a mask over all pairs of tokens.

    Args:
        body: The language model.
        longest_row: The longest row in which a model still sees everything if it looks at places in the row and not at
            positions.
    """

    name = "tree packing with a dense mask"
    attention = "mask"

    def __init__(self, body: Body, longest_row: int | None) -> None:
        super().__init__(body)
        self._longest_row = min(longest_row or _LONGEST_MASK, _LONGEST_MASK)

    def batches(self, sequences: Sequence[Tokens], prompts: Sequence[int], budget: int) -> Iterator[Batch[Pack]]:
        """Batches of one packed row each, no longer than its mask may be."""
        return super().batches(sequences, prompts, min(budget, self._longest_row))

    def states(self, batch: Batch[Pack]) -> Tensor:
        """Runs the row under an additive mask, as every model that takes a mask over pairs expects it."""
        pack = batch.content
        mask = dense_mask(pack.segments, self._body.dtype, self._body.device)
        return self._body.states(as_row(pack.tokens), position_ids=as_row(pack.positions), attention_mask=mask)


def _filled(array: NDArray[np.int64], padding: int) -> NDArray[np.int64]:
    """Appends `padding` zeros: any token will do, at the first position."""
    return np.concatenate([array, np.zeros(padding, np.int64)])


def _packed(pack: Pack) -> Batch[Pack]:
    rows = tuple(pack.rows(at) for at in range(len(pack.places)))
    return Batch(pack.places, rows, len(pack.tokens), pack)
