"""Correlations of two arrays, in numpy alone."""

import numpy as np
from numpy.typing import NDArray


def pearson(first: NDArray[np.float64], second: NDArray[np.float64]) -> float | None:
    """Pearson's correlation; None where there are fewer than two numbers, or all of one side are equal."""
    if len(first) < 2:
        return None
    first, second = first - first.mean(), second - second.mean()
    # Scaled first, so that no square is too large or too small for a float.
    largest = np.abs(first).max(), np.abs(second).max()
    if not all(np.isfinite(largest)) or min(largest) == 0:
        return None
    first, second = first / largest[0], second / largest[1]
    return float(np.clip((first @ second) / np.sqrt((first @ first) * (second @ second)), -1.0, 1.0))


def spearman(first: NDArray[np.float64], second: NDArray[np.float64]) -> float | None:
    """Spearman's rank correlation, equal numbers at the mean of their ranks; None as for `pearson`."""
    return pearson(ranks(first), ranks(second))


def ranks(numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    """The rank of each number from 1 on, equal ones at the mean of their ranks."""
    _, places, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[places.reshape(-1)]
