"""Two scorings of the same tokens, lined up: flat arrays and the offsets of the rollouts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from vhead.rollouts.ragged import positions_of
from vhead.rollouts.wording import Id

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Pairs:
    """The tokens of N rollouts with T tokens in all, as both sides scored them.

    Attributes:
        ours: Log-probabilities, float64 `[T]`; None where one side has none.
        theirs: The other side's.
        offsets: int64 `[N + 1]`.
        mask: bool `[T]`, the tokens that count.
        ids: The rollouts' ids.
        entropy: Ours, float64 `[T]`; None where there is none.
        prompt_lengths: Tokens of each prompt, int64 `[N]`; None where unknown.
        others: `values` and `reward`: both sides' numbers, float64 `[n, K]`, and the rollout and the position of each
            row, int64 `[n, 2]`.
    """

    ours: Floats | None
    theirs: Floats | None
    offsets: NDArray[np.int64]
    mask: NDArray[np.bool_]
    ids: Sequence[Id]
    entropy: Floats | None = None
    prompt_lengths: NDArray[np.int64] | None = None
    others: Mapping[str, tuple[Floats, Floats, NDArray[np.int64]]] = field(default_factory=dict)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each rollout, masked ones included."""
        return np.diff(self.offsets)

    @cached_property
    def rollouts(self) -> NDArray[np.int64]:
        """The rollout of each token."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @cached_property
    def positions(self) -> NDArray[np.int64]:
        """The place of each token in its completion."""
        return positions_of(self.lengths)
