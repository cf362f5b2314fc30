"""Advantages and returns of what was scored, with nothing to line up by hand."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vhead import returns
from vhead.errors import FieldError, VheadError
from vhead.rollouts.files.rows import Row
from vhead.rollouts.wording import Id, named
from vhead.scoring.fields import ADVANTAGES

if TYPE_CHECKING:
    from vhead.scoring.scores import Scores

# Why an engine says that it stopped, and whether the rollout would have gone on.
_FINISH_REASONS = {"length": True, "stop": False, "eos": False, "tool_calls": False, "function_call": False}


@dataclass(frozen=True, slots=True)
class AdvantageColumns:
    """Which columns of advantages and returns a file of scores gets, and by which numbers.

    Attributes:
        columns: Some of `advantages` and `returns`.
        gamma: Discount of one step.
        lam: Lambda of the advantages.
        value_lam: Lambda of the returns; None: `lam`.
        reward_field: The field of the records that holds the reward; None: the head's own is taken.
        cut_off_field: The field of the records that says whether the rollout was cut off, so that the value behind its
            last token counts; None: none was.
    """

    columns: tuple[str, ...]
    gamma: float = 1.0
    lam: float = 0.95
    value_lam: float | None = None
    reward_field: str | None = None
    cut_off_field: str | None = None

    @property
    def needed(self) -> tuple[str, ...]:
        """What has to be scored for them."""
        reward = () if self.reward_field else ("reward",)
        return ("values", *reward, *(("bootstrap",) if self.cut_off_field else ()))

    def check(self, row: Row, id: Id) -> None:
        """Raises `FieldError` where the record's reward is none, or where it does not say whether it was cut off."""
        if self.reward_field is not None:
            _reward(row, self.reward_field, id)
        if self.cut_off_field is not None:
            _is_cut_off(row, self.cut_off_field, id)

    def added(self, rows: Sequence[Row], scores: "Scores", kept: Sequence[str]) -> "Scores":
        """The scores with these columns, and without those that only these needed.

        Args:
            rows: The records, in the scores' order, each of which `check` has taken.
            scores: Their scores.
            kept: The columns that are asked for besides.
        """
        records = list(zip(rows, scores.ids, strict=True))
        rewards, cut_off = scores.computed.get("reward"), None
        if self.reward_field is not None:
            rewards = np.array([_reward(row, self.reward_field, id) for row, id in records], np.float32)
        if self.cut_off_field is not None:
            cut_off = np.array([_is_cut_off(row, self.cut_off_field, id) for row, id in records], bool)
        found = scores.advantages(rewards, cut_off=cut_off, gamma=self.gamma, lam=self.lam, value_lam=self.value_lam)
        computed = {name: array for name, array in scores.computed.items() if name in kept}
        computed |= {name: array for name, array in zip(ADVANTAGES, found, strict=True) if name in self.columns}
        return replace(scores, computed=computed)


def bootstrap_of(scores: "Scores", cut_off: Any) -> NDArray[np.float32]:
    """The value behind the last token of each rollout that was cut off, and 0 behind the others'.

    Raises:
        MissingFieldError: `bootstrap` is not among the scores.
        ValueError: `cut_off` is not a bool for each rollout.
    """
    array = np.asarray(cut_off)
    if array.dtype != bool or array.shape != (len(scores),):
        expected = f"a bool for each of {len(scores)} rollouts"
        raise ValueError(f"cut_off: expected {expected}, got {array.dtype} of shape {list(array.shape)}")
    bootstrap = scores.bootstrap.copy()
    bootstrap[~array] = 0
    return bootstrap


def advantages(scores: "Scores", reward: Any, kl: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Any]:
    """What `Scores.advantages` gives, with the arguments that `token_rewards` and `gae` take beside the rewards."""
    values = scores.values
    if values.ndim > 1:
        raise VheadError(
            f"advantages: expected a head with one output, got {values.shape[1]}; of several heads, take the scores of "
            "one by Scores.of(name)"
        )
    if reward is None:
        reward = scores.reward
    array = _rewards(reward)
    if array.shape == (len(scores),):
        rewards = returns.token_rewards(array, mask=scores.mask, offsets=scores.offsets, **kl)
    elif array.shape == (scores.token_count,):
        rewards = array
    else:
        expected = f"one number for each of {len(scores)} rollouts, or for each of their {scores.token_count} tokens"
        raise ValueError(f"reward: expected {expected}, got shape {list(array.shape)}")
    return returns.gae(rewards, values, mask=scores.mask, offsets=scores.offsets, **options)


def _rewards(reward: Any) -> NDArray[np.float32]:
    try:
        # What float32 cannot hold becomes infinite, and is refused as such.
        with np.errstate(over="ignore"):
            return np.asarray(reward, np.float32)
    except (TypeError, ValueError) as error:
        raise TypeError(f"reward: expected numbers, got: {error}") from error


def _reward(row: Row, field: str, id: Id) -> float:
    value = row.members((field,)).get(field)
    if isinstance(value, bool) or not isinstance(value, Real) or not _fits_float32(value):
        expected = "a finite number that float32 can hold, which is the reward"
        raise FieldError(named(row.where, id), field, expected=expected, got=_shown(value, row))
    return float(value)


def _fits_float32(number: Any) -> bool:
    return bool(abs(number) <= float(np.finfo(np.float32).max))


def _is_cut_off(row: Row, field: str, id: Id) -> bool:
    """From true or false, or from the reason that the engine gives for the end."""
    value = row.members((field,)).get(field)
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value in _FINISH_REASONS:
        return _FINISH_REASONS[value]
    expected = f"true or false, or one of the finish reasons {', '.join(_FINISH_REASONS)}"
    raise FieldError(named(row.where, id), field, expected=expected, got=_shown(value, row))


def _shown(value: Any, row: Row) -> str:
    """What a field holds; where that is nothing, also which fields the record has: another may have been meant."""
    return repr(value)[:40] if value is not None else f"nothing, in a record with {', '.join(row.columns())[:200]}"
