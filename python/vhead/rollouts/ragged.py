"""Pieces of different lengths, one after the other in flat arrays: where each begins, and each place in its piece."""

import numpy as np
from numpy.typing import NDArray


def offsets_of(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 `[N + 1]` offsets of N consecutive pieces with these lengths."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def positions_of(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The place of each element in its piece, int64, of consecutive pieces with these lengths."""
    offsets = offsets_of(lengths)
    return np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
