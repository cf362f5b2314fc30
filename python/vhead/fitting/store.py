"""Hidden states that are kept on the disk, for what has to go over them more than once."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vhead.errors import FitError

_BLOCK_BYTES = 64 * 2**20
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
_FLOAT64_BYTES = 8


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Some of the rows.

    Attributes:
        states: `[N, H]`, float32.
        targets: `[N, K]`, float64.
        weights: `[N]`, float64.
        folds: int64 `[N]`.
    """

    states: Tensor
    targets: Tensor
    weights: Tensor
    folds: Tensor


class StateStore:
    """Rows of states, targets, weights and folds in two files, which grow.

    States are kept in the dtype in which the model gives them, so that nothing is lost.

    Args:
        folder: Where the files are.
        hidden_size: H.
        outputs: K.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`.
        budget: The most bytes that the states may take.

    Attributes:
        rows: How many rows there are.
        dtype: As given.
        outputs: As given.
    """

    def __init__(self, folder: Path, hidden_size: int, outputs: int, dtype: str, budget: int) -> None:
        self.dtype = dtype if dtype in _DTYPES else "float32"
        self.rows = 0
        self.outputs = outputs
        self._paths = (folder / "states", folder / "targets")
        self._widths = (hidden_size, outputs + 2)
        self._row_bytes = (hidden_size * _DTYPES[self.dtype].itemsize, (outputs + 2) * _FLOAT64_BYTES)
        self._budget = budget
        for path in self._paths:
            path.touch()

    def cut(self, rows: int) -> bool:
        """Keeps the first rows and drops the others; False: there are fewer."""
        sizes = [rows * each for each in self._row_bytes]
        if any(path.stat().st_size < size for path, size in zip(self._paths, sizes, strict=True)):
            return False
        for path, size in zip(self._paths, sizes, strict=True):
            with path.open("r+b") as file:
                file.truncate(size)
        self.rows = rows
        return True

    def append(
        self,
        states: NDArray[np.float32],
        targets: NDArray[np.float64],
        weights: NDArray[np.float64],
        folds: NDArray[np.int64],
    ) -> None:
        """Adds rows, as `Block` has them.

        Raises:
            FitError: They take more than the budget.
        """
        total = (self.rows + len(states)) * self._row_bytes[0]
        if total > self._budget:
            raise FitError(
                f"cache_bytes: expected at most {self._budget:,} bytes of hidden states, got {total:,} and more to "
                "come; raise cache_bytes (--cache-gb), or fit fewer rollouts, or a linear head"
            )
        kept = torch.from_numpy(states).to(_DTYPES[self.dtype]).view(torch.uint8).numpy()
        said = np.column_stack([targets, weights, folds.astype(np.float64)])
        for path, array in zip(self._paths, (kept, said), strict=True):
            with path.open("ab") as file:
                file.write(np.ascontiguousarray(array).data)
        self.rows += len(states)

    def blocks(self, multiple: int = 1) -> Iterator[Block]:
        """All rows in order, some at a time; each block but the last has a multiple of so many."""
        size = max(1, _BLOCK_BYTES // (_FLOAT64_BYTES * self._widths[0]) // multiple) * multiple
        with self._paths[0].open("rb") as states, self._paths[1].open("rb") as targets:
            for start in range(0, self.rows, size):
                count = min(size, self.rows - start)
                raw = torch.frombuffer(bytearray(states.read(count * self._row_bytes[0])), dtype=_DTYPES[self.dtype])
                said: Any = np.frombuffer(targets.read(count * self._row_bytes[1]), np.float64)
                table = torch.from_numpy(said.reshape(count, -1).copy())
                yield Block(raw.view(count, -1).float(), table[:, :-2], table[:, -2], table[:, -1].long())
