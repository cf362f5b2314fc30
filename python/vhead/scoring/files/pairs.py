"""Preference pairs in files: which records are some, and the scores of both sides side by side."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vhead.errors import FieldError, VheadError
from vhead.rollouts.fields import SIDES
from vhead.rollouts.files.rows import Row
from vhead.rollouts.rollout import Rollout
from vhead.rollouts.wording import named
from vhead.scoring.scores import Scores

MARGIN = "margin"
SUFFIXES = tuple(f"_{side}" for side in SIDES)


class Pairing:
    """Whether the records of a file are preference pairs: all of them are, or none.

    Args:
        reserved: The names of the columns that scoring adds to pairs, which the input may therefore not have.
        unpaired: What is asked for that pairs do not have; empty: nothing.

    Attributes:
        is_of_pairs: Whether they are, by the first record that can be read; None before that.
    """

    def __init__(self, reserved: Collection[str] = (), unpaired: Sequence[str] = ()) -> None:
        self._reserved = reserved
        self._unpaired = unpaired
        self.is_of_pairs: bool | None = None

    def add(self, row: Row, rollouts: Sequence[Rollout]) -> None:
        """Takes note of the next record.

        Raises:
            FieldError: It is a pair and the records before it are not, or the reverse; or it has a reserved column.
            VheadError: It is a pair, and something is asked for that pairs do not have.
        """
        is_pair = len(rollouts) == len(SIDES)
        name = named(row.where, rollouts[0].id)
        if self.is_of_pairs is None:
            self.is_of_pairs = is_pair
        if is_pair != self.is_of_pairs:
            forms = ("one completion", "`chosen` and `rejected`")
            expected = f"{forms[self.is_of_pairs]}, as the records before it have"
            raise FieldError(name, SIDES[0] if is_pair else "completion", expected=expected, got=forms[is_pair])
        if is_pair and self._unpaired:
            raise VheadError(
                f"{name}: expected one completion, because {' and '.join(self._unpaired)} are asked for, got a pair; "
                "leave them out of --returns"
            )
        if is_pair:
            for column in sorted(row.members(self._reserved)):
                expected = "no such column in the input, because the scores of pairs go there"
                got = "one; give the new columns other names with --suffix"
                raise FieldError(name, column, expected=expected, got=got)

    def paired(self, scores: Scores) -> "Scores | PairScores":
        """The scores of the records' rollouts by record."""
        return PairScores.of(scores) if self.is_of_pairs else scores


@dataclass(frozen=True, slots=True, eq=False)
class PairScores:
    """The scores of N preference pairs.

    Attributes:
        chosen: Those of the chosen sides.
        rejected: Those of the rejected sides, in the same order.
    """

    chosen: Scores
    rejected: Scores

    @classmethod
    def of(cls, scores: Scores) -> "PairScores":
        """The scores of 2 N rollouts, the two sides of each pair one after the other."""
        return cls(scores[::2], scores[1::2])

    @property
    def margin(self) -> NDArray[np.float32] | None:
        """How much more reward the chosen side has, float32 `[N]` or `[N, K]`; None: without rewards."""
        if "reward" not in self.chosen.computed:
            return None
        return self.chosen.reward - self.rejected.reward

    @property
    def truncated(self) -> NDArray[np.bool_] | None:
        """Which pairs have a side that lost tokens; None: the scorer truncates none."""
        if self.chosen.truncated is None or self.rejected.truncated is None:
            return None
        return self.chosen.truncated | self.rejected.truncated

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of what is written of them."""
        sides = tuple(f"{name}{suffix}" for suffix in SUFFIXES for name in self.chosen.columns)
        return sides if self.margin is None else (*sides, MARGIN)

    def without(self, places: Collection[int]) -> "PairScores":
        """The scores of all pairs but those at these places, in order."""
        return PairScores(self.chosen.without(places), self.rejected.without(places))

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, key: slice) -> "PairScores":
        return PairScores(self.chosen[key], self.rejected[key])


def sides_of(scores: Scores | PairScores) -> Mapping[str, Scores]:
    """The scores of each side, by what its columns' names end in; of records that are no pairs, all of them."""
    if isinstance(scores, Scores):
        return {"": scores}
    return dict(zip(SUFFIXES, (scores.chosen, scores.rejected), strict=True))
