"""Which rollouts go through the model together."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray


def token_budget_batches(lengths: Sequence[int], budget: int) -> Iterator[NDArray[np.int64]]:
    """Groups sequences of similar length so that each padded batch has at most `budget` tokens.

    The longest come first, so that a batch that does not fit into memory fails at once and not at the end. A sequence
    that is longer than the budget is a batch of its own.

    Args:
        lengths: Tokens of each sequence.
        budget: Rows times the longest row of a batch.

    Yields:
        Positions in `lengths`, int64 `[B]`; each position once.
    """
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    start = 0
    while start < len(order):
        rows = max(1, budget // max(1, int(lengths[order[start]])))
        yield order[start : start + rows]
        start += rows
