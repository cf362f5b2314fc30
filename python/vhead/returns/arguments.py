"""What callers give, checked: numbers, and which token belongs to which rollout."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Rollouts:
    """How the tokens of N rollouts lie in the callers' arrays.

    Attributes:
        shape: Of an array with one number a token.
        offsets: int64 `[N + 1]` into the flat array.
    """

    shape: tuple[int, ...]
    offsets: NDArray[np.int64]

    @property
    def count(self) -> int:
        """Rollouts."""
        return len(self.offsets) - 1


def rollouts_of(name: str, shape: Sequence[int], offsets: object) -> Rollouts:
    """The rollouts in the array of this name: flat with offsets, padded, or one alone.

    Raises:
        TypeError: The offsets are no integers.
        ValueError: The offsets do not rise from 0 to the array's length, or the array has another number of dimensions.
    """
    shape = tuple(shape)
    if offsets is None:
        if len(shape) not in {1, 2}:
            raise ValueError(f"{name}: expected [T] or [B, T], or flat with offsets, got {list(shape)}")
        count, length = (1, *shape)[-2:]
        return Rollouts(shape, np.arange(count + 1, dtype=np.int64) * length)
    if len(shape) != 1:
        raise ValueError(f"{name}: expected a flat array [T] beside offsets, got {list(shape)}")
    found = np.asarray(on_cpu(offsets))
    if found.dtype.kind not in "iu":
        raise TypeError(f"offsets: expected int64, got {found.dtype}")
    if found.ndim != 1 or len(found) < 1:
        raise ValueError(f"offsets: expected [N + 1] for N rollouts, got {list(found.shape)}")
    if found[0] != 0 or found[-1] != shape[0] or (np.diff(found.astype(np.int64)) < 0).any():
        raise ValueError(
            f"offsets: expected numbers that rise from 0 to the {shape[0]} tokens of {name}, got {_shortened(found)}"
        )
    return Rollouts(shape, np.ascontiguousarray(found, np.int64))


def on_cpu(array: Any) -> Any:
    """The same where numpy can read it: torch tensors without their gradients, wherever they are."""
    return array.detach().cpu() if hasattr(array, "detach") else array


def check_shape(name: str, shape: Sequence[int], expected: Sequence[int], like: str) -> None:
    """Refuses another shape.

    Raises:
        ValueError: The shapes differ.
    """
    if tuple(shape) != tuple(expected):
        raise ValueError(f"{name}: expected {list(expected)} as {like}, got {list(shape)}")


def fraction(name: str, number: object) -> float:
    """A number from 0 to 1.

    Raises:
        TypeError: It is no number.
        ValueError: It lies outside.
    """
    if isinstance(number, bool | str) or not hasattr(number, "__float__"):
        raise TypeError(f"{name}: expected a number in [0, 1], got {type(number).__name__}")
    found = float(number)
    if not 0.0 <= found <= 1.0:
        raise ValueError(f"{name}: expected a number in [0, 1], got {found}")
    return found


def fractions(name: str, numbers: Any, count: int) -> list[float]:
    """One number from 0 to 1 for all rollouts, or one for each.

    Raises:
        TypeError: They are no numbers.
        ValueError: One lies outside, or there are others than `count`.
    """
    found = np.asarray(on_cpu(numbers))
    if found.ndim == 0:
        return [fraction(name, found.item())]
    if found.dtype.kind not in "fiu":
        raise TypeError(f"{name}: expected numbers in [0, 1], got {found.dtype}")
    check_shape(name, found.shape, (count,), "one for each rollout, or one number")
    wrong = ~((found >= 0) & (found <= 1))
    if wrong.any():
        place = int(wrong.argmax())
        raise ValueError(f"{name}: expected numbers in [0, 1], got {found[place]} for rollout {place}")
    return [float(number) for number in found]


def finite(name: str, number: object, *, positive: bool = False) -> float:
    """A number that is finite.

    Raises:
        TypeError: It is no number.
        ValueError: It is NaN or infinite, or not above 0 where it must be.
    """
    what = "a number above 0" if positive else "a finite number"
    if isinstance(number, bool | str) or not hasattr(number, "__float__"):
        raise TypeError(f"{name}: expected {what}, got {type(number).__name__}")
    found = float(number)
    if not math.isfinite(found) or (positive and found <= 0):
        raise ValueError(f"{name}: expected {what}, got {found}")
    return found


def _shortened(offsets: NDArray[Any]) -> str:
    shown = [str(number) for number in offsets.tolist()]
    return f"[{', '.join(shown if len(shown) <= 8 else [*shown[:4], '...', *shown[-3:]])}]"
