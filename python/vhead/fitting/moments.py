"""The sums that a linear regression needs, one set for each fold of prompts; no state is kept for them.

States and targets are shifted by the means of the first rows that come, so that little is lost to cancellation where a
mean is large beside what varies around it. All sums are float64.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Rows are widened to float64 in blocks of about this many bytes.
_BLOCK_BYTES = 64 * 2**20
_FLOAT64_BYTES = 8
# How many matrices of the size of a fold's sums there are besides, when the head is solved for.
_BESIDE = 4


def bytes_of_sums(folds: int, hidden_size: int) -> int:
    """What the sums of so many folds take, and what is made of them: 8 bytes for each number of `[H, H]`."""
    return _FLOAT64_BYTES * (folds + _BESIDE) * hidden_size**2


@dataclass(frozen=True, eq=False)
class Moments:
    """Weighted sums over rows with a state x `[H]` and targets y `[K]`, float64, both less their shifts.

    Attributes:
        weight: Sum of the weights, `[]`.
        x: `[H]`.
        y: `[K]`.
        xx: `[H, H]`.
        xy: `[H, K]`.
        yy: Squares, `[K]`.
    """

    weight: Tensor
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    def __sub__(self, other: "Moments") -> "Moments":
        return Moments(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    def centred(self) -> tuple[Tensor, Tensor]:
        """The sums `xx` and `xy` of deviations from the means."""
        xx = self.xx.addr(self.x, self.x, alpha=-1 / self.weight.item())
        return xx, self.xy.addr(self.x, self.y, alpha=-1 / self.weight.item())


class FoldMoments:
    """The sums of each of F folds.

    Args:
        folds: F.
        hidden_size: H.
        outputs: K.
        device: Where they are added up.
    """

    def __init__(self, folds: int, hidden_size: int, outputs: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(folds, *shape, dtype=torch.float64, device=device)

        self._sums = {
            "weight": zeros(),
            "x": zeros(hidden_size),
            "y": zeros(outputs),
            "xx": zeros(hidden_size, hidden_size),
            "xy": zeros(hidden_size, outputs),
            "yy": zeros(outputs),
        }
        self._shifts = {"shift_x": zeros(hidden_size)[0], "shift_y": zeros(outputs)[0]}
        self._is_shifted = False
        self._rows = max(1, _BLOCK_BYTES // (_FLOAT64_BYTES * hidden_size))
        self._device = device

    def __len__(self) -> int:
        return len(self._sums["weight"])

    @property
    def shift_x(self) -> Tensor:
        """What states are shifted by, `[H]`, float64."""
        return self._shifts["shift_x"]

    @property
    def shift_y(self) -> Tensor:
        """What targets are shifted by, `[K]`, float64."""
        return self._shifts["shift_y"]

    def __getitem__(self, fold: int) -> Moments:
        return Moments(**{name: sums[fold] for name, sums in self._sums.items()})

    def total(self) -> Moments:
        """The sums over all folds."""
        return Moments(**{name: sums.sum(0) for name, sums in self._sums.items()})

    def add(
        self,
        states: NDArray[np.float32],
        targets: NDArray[np.float64],
        weights: NDArray[np.float64],
        folds: NDArray[np.int64],
    ) -> None:
        """Adds rows: states `[N, H]`, targets `[N, K]`, weights `[N]`, and the fold of each, int64 `[N]`."""
        if not self._is_shifted:
            self.shift_x.copy_(torch.from_numpy(states.mean(0, dtype=np.float64)))
            self.shift_y.copy_(torch.from_numpy(targets.mean(0)))
            self._is_shifted = True
        for fold in np.unique(folds).tolist():
            places = np.flatnonzero(folds == fold)
            for start in range(0, len(places), self._rows):
                block = places[start : start + self._rows]
                self._add(fold, *(torch.from_numpy(a[block]).to(self._device) for a in (states, targets, weights)))

    def _add(self, fold: int, states: Tensor, targets: Tensor, weights: Tensor) -> None:
        own = self[fold]
        x, y = states.double().sub_(self.shift_x), targets - self.shift_y
        weighted = weights[:, None] * y
        own.weight.add_(weights.sum())
        own.x.add_(weights @ x)
        own.y.add_(weighted.sum(0))
        own.xy.addmm_(x.T, weighted)
        own.yy.add_((weighted * y).sum(0))
        own.xx.add_(gram(x if bool((weights == 1).all()) else x.mul_(weights.sqrt()[:, None])))

    def tensors(self) -> dict[str, Tensor]:
        """All that has been added up, by name, to be restored from."""
        return {name: tensor.cpu() for name, tensor in (self._sums | self._shifts).items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Continues from what `tensors` gave, after some rows."""
        for name, tensor in (self._sums | self._shifts).items():
            tensor.copy_(tensors[name])
        self._is_shifted = True


def gram(x: Tensor) -> Tensor:
    """The product `x.T @ x` of float64 rows `[N, H]`."""
    if x.device.type != "cpu":
        return x.T @ x
    # Numpy sees that both factors are one array, and computes a triangle only.
    rows = x.numpy()
    return torch.from_numpy(rows.T @ rows)
