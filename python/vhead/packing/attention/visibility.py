"""Which rows of a pack see which, in the two numbers per row that every way of attending is built from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vhead.backbone.placement import to_device
from vhead.packing.trees import Segment


@dataclass(frozen=True, slots=True, eq=False)
class Visibility:
    """Row q sees row k where `k <= q < ends[k]`, since whatever continues a path comes before anything else.

    A layer with a sliding window sees of these the ones with `positions[q] - positions[k] < window`.

    Attributes:
        ends: One after the last row whose path goes through this row, int64 `[T]`.
        positions: Tokens before each row on its path, int64 `[T]`.
    """

    ends: NDArray[np.int64]
    positions: NDArray[np.int64]

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> Self:
        """Finds what the rows of a pack see, from its segments."""
        rows = segments[-1].stop
        ends, positions = np.empty(rows, np.int64), np.empty(rows, np.int64)
        for segment in segments:
            first = segment.path_length
            positions[segment.start : segment.stop] = np.arange(first, first + segment.stop - segment.start)
            for start, stop in (*segment.path, (segment.start, segment.stop)):
                ends[start:stop] = segment.stop
        return cls(ends, positions)


def dense_mask(segments: Sequence[Segment], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """What each row sees, as an additive mask `[1, 1, T, T]`, made where it is needed."""
    device = torch.device("cpu") if device is None else device
    ends = to_device(torch.from_numpy(Visibility.of(segments).ends), device)
    rows = torch.arange(len(ends), device=device)
    visible = (rows <= rows[:, None]) & (rows[:, None] < ends)
    mask = torch.full(visible.shape, torch.finfo(dtype).min, dtype=dtype, device=device)
    return mask.masked_fill_(visible, 0.0)[None, None]
