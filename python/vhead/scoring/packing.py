"""Ways in which sequences that share their first tokens are one row of a batch."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from vhead.scoring.attention import dense_mask, tree_attention
from vhead.scoring.strategies import Batch, Body, as_row
from vhead.scoring.trees import Pack, Tokens, pack_trees


class TreePacking:
    """Trees of sequences as one row, attended segment by segment; needs transformers' attention interface."""

    name = "tree packing"

    def __init__(self, body: Body) -> None:
        self._body = body

    def batches(self, sequences: Sequence[Tokens], prompts: Sequence[int], budget: int) -> Iterator[Batch]:
        """One packed row each."""
        del prompts
        return (_packed(pack) for pack in pack_trees(sequences, budget))

    def states(self, batch: Batch) -> Tensor:
        """No mask is given, as none is looked at."""
        pack: Pack = batch.content
        with tree_attention(self._body.model, pack.segments):
            return self._body.states(as_row(pack.tokens), position_ids=as_row(pack.positions))


class MaskedTreePacking:
    """Trees of sequences as one row, with a mask over all pairs of tokens.

    Args:
        body: The language model.
        longest_row: Rows in which a model that looks at places in the row, not at positions, still sees everything.
    """

    name = "tree packing with a dense mask"

    def __init__(self, body: Body, longest_row: int | None) -> None:
        self._body, self._longest_row = body, longest_row

    def batches(self, sequences: Sequence[Tokens], prompts: Sequence[int], budget: int) -> Iterator[Batch]:
        """One packed row each."""
        del prompts
        budget = budget if self._longest_row is None else min(budget, self._longest_row)
        return (_packed(pack) for pack in pack_trees(sequences, budget))

    def states(self, batch: Batch) -> Tensor:
        """The mask is additive, as every model that takes one expects."""
        pack: Pack = batch.content
        mask = dense_mask(pack.segments, self._body.dtype)
        return self._body.states(as_row(pack.tokens), position_ids=as_row(pack.positions), attention_mask=mask)


def _packed(pack: Pack) -> Batch:
    rows = tuple(pack.rows(at) for at in range(len(pack.places)))
    return Batch(pack.places, rows, len(pack.tokens), pack)
