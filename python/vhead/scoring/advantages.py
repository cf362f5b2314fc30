"""Advantages and returns of what was scored, with nothing to line up by hand."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vhead import returns
from vhead.errors import FieldError, RecordError, VheadError
from vhead.rollouts.files.rows import Row
from vhead.rollouts.wording import Id, named
from vhead.scoring.fields import ADVANTAGES

if TYPE_CHECKING:
    from vhead.scoring.scores import Scores


@dataclass(frozen=True, slots=True)
class AdvantageColumns:
    """Which columns of advantages and returns a file of scores gets, and by which numbers.

    Attributes:
        columns: Some of `advantages` and `returns`.
        gamma: Discount of one step.
        lam: Lambda of the advantages.
        value_lam: Lambda of the returns; None: `lam`.
        reward_field: The field of the records that holds the reward; None: the head's own is taken.
    """

    columns: tuple[str, ...]
    gamma: float = 1.0
    lam: float = 0.95
    value_lam: float | None = None
    reward_field: str | None = None

    @property
    def needed(self) -> tuple[str, ...]:
        """What has to be scored for them."""
        return ("values",) if self.reward_field else ("values", "reward")

    def added(
        self, rows: Sequence[Row], scores: "Scores", kept: Sequence[str]
    ) -> tuple["Scores", dict[int, RecordError]]:
        """The scores with these columns, and without those that only these needed.

        Args:
            rows: The records, in the scores' order.
            scores: Their scores.
            kept: The columns that are asked for besides.

        Returns:
            The scores, and by its place what is wrong with each record whose reward is none; its numbers mean nothing.
        """
        rewards, errors = scores.computed.get("reward"), dict[int, RecordError]()
        if self.reward_field is not None:
            rewards = np.zeros(len(rows), np.float32)
            for place, row in enumerate(rows):
                try:
                    rewards[place] = _reward(row, self.reward_field, scores.ids[place])
                except RecordError as error:
                    errors[place] = error
        found = scores.advantages(rewards, gamma=self.gamma, lam=self.lam, value_lam=self.value_lam)
        computed = {name: array for name, array in scores.computed.items() if name in kept}
        computed |= {name: array for name, array in zip(ADVANTAGES, found, strict=True) if name in self.columns}
        return replace(scores, computed=computed), errors


def advantages(scores: "Scores", reward: Any, kl: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Any]:
    """What `Scores.advantages` gives, with the arguments that `token_rewards` and `gae` take beside the rewards."""
    values = scores.values
    if values.ndim > 1:
        raise VheadError(
            f"advantages: expected a head with one output, got {values.shape[1]}; `Scores.of` takes one head's"
        )
    if reward is None:
        reward = scores.reward
    array: NDArray[Any] = np.asarray(reward, np.float32)
    if array.shape == (len(scores),):
        rewards = returns.token_rewards(array, mask=scores.mask, offsets=scores.offsets, **kl)
    elif array.shape == (scores.token_count,):
        rewards = array
    else:
        expected = f"one number for each of {len(scores)} rollouts, or for each of their {scores.token_count} tokens"
        raise ValueError(f"reward: expected {expected}, got shape {list(array.shape)}")
    return returns.gae(rewards, values, mask=scores.mask, offsets=scores.offsets, **options)


def _reward(row: Row, field: str, id: Id) -> float:
    value = row.members((field,)).get(field)
    if isinstance(value, bool) or not isinstance(value, Real) or not np.isfinite(float(value)):
        got = "nothing" if value is None else repr(value)[:40]
        raise FieldError(named(row.where, id), field, expected="a finite number, which is the reward", got=got)
    return float(value)
