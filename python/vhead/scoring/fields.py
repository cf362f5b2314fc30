"""What can be asked for, and the columns that it becomes: one table for computing, holding and writing scores."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vhead.ops.token_statistics.arguments import MAX_TOP

Unit = Literal["token", "rollout", "step"]
Origin = Literal["head", "logits", "rollout", "returns", "weights"]


@dataclass(frozen=True, slots=True)
class Column:
    """One column of scores.

    Attributes:
        name: What it is called everywhere.
        unit: What it has an entry for: each completion token, each rollout, or each step of a rollout.
        origin: What its entries come from: the head's outputs, the logits, the rollout itself, `vhead.returns`, or
            the weights that are followed.
        returned_as: The name among `returns` that stands for it; None: another argument asks for it.
        dtype: Of its entries.
        width: The shape of an entry; None: a number or several, as the head, the candidates or the request have it.
    """

    name: str
    unit: Unit
    origin: Origin
    returned_as: str | None
    dtype: type[np.generic] = np.float32
    width: tuple[int, ...] | None = None


# Float32 holds logits of up to 3e8 that are divided by it.
_LEAST_TEMPERATURE = 1e-30

# Beside the others where a scorer follows a directory.
WEIGHTS_STEP = "weights_step"

# In the order in which they are written.
COLUMNS = {
    column.name: column
    for column in (
        Column("values", "token", "head", "values"),
        Column("logprobs", "token", "logits", "logprobs", width=()),
        Column("entropy", "token", "logits", "entropy", width=()),
        Column("candidate_logprobs", "token", "logits", "candidates"),
        Column("top_tokens", "token", "logits", None, np.int64),
        Column("top_logprobs", "token", "logits", None),
        Column("reward", "rollout", "head", "reward"),
        Column("prompt_value", "rollout", "head", "prompt_value"),
        Column("bootstrap", "rollout", "head", "bootstrap"),
        Column("steps", "step", "head", "steps"),
        Column("step_positions", "step", "rollout", "steps", np.int64, ()),
        Column("advantages", "token", "returns", None, width=()),
        Column("returns", "token", "returns", None, width=()),
        Column("token_ids", "token", "rollout", "tokens", np.int64, ()),
        Column("token_offsets", "token", "rollout", "tokens", np.int64, (2,)),
        Column(WEIGHTS_STEP, "rollout", "weights", None, np.int64, ()),
    )
}
RETURNS = tuple(dict.fromkeys(column.returned_as for column in COLUMNS.values() if column.returned_as))
# What any rollout has, and the model computes.
FIELDS = ("values", "logprobs", "entropy", "reward", "prompt_value", "bootstrap", "steps")
DEFAULT_RETURNS = ("values", "logprobs", "reward")
# What is made of the scores when they are there.
ADVANTAGES = ("advantages", "returns")
TOP = ("top_tokens", "top_logprobs")
# What a column without a number holds, at tokens that the model did not write.
NOTHING = {"top_tokens": -1}


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked for of every rollout.

    Attributes:
        returns: Some of `RETURNS`, in their order.
        temperature: Raw logits are divided by it.
        top: How many of the likeliest tokens are wanted at each position.

    Raises:
        ValueError: A name is unknown or there is none, or a number is out of range.
    """

    returns: tuple[str, ...]
    temperature: float = 1.0
    top: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "returns", check_returns(self.returns))
        if not _LEAST_TEMPERATURE <= self.temperature < math.inf:
            expected = f"a positive number of {_LEAST_TEMPERATURE:g} or more"
            raise ValueError(f"temperature: expected {expected}, got {self.temperature}")
        if isinstance(self.top, bool) or not isinstance(self.top, int) or not 0 <= self.top <= MAX_TOP:
            raise ValueError(f"top_logprobs: expected a whole number from 0 to {MAX_TOP}, got {self.top!r}")

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns that this becomes, in order."""
        return tuple(column for name, column in COLUMNS.items() if name in self)

    @property
    def computed(self) -> tuple[str, ...]:
        """The names of the columns that the model computes."""
        return tuple(column.name for column in self.columns if column.origin in ("head", "logits"))

    @property
    def needs_logits(self) -> bool:
        """Whether a column needs the language-model head."""
        return any(column.origin == "logits" for column in self.columns)

    def __contains__(self, name: str) -> bool:
        """Whether a column, by its name, is among what is asked for."""
        return (self.top > 0 and name in TOP) or (name in COLUMNS and COLUMNS[name].returned_as in self.returns)


def check_returns(names: Sequence[str]) -> tuple[str, ...]:
    """What to compute, in the order of `RETURNS`.

    Raises:
        ValueError: A name is unknown, or there is none.
    """
    asked = (names,) if isinstance(names, str) else tuple(names)
    unknown = [name for name in asked if name not in RETURNS]
    if unknown or not asked:
        raise ValueError(f"returns: expected some of {', '.join(RETURNS)}, got {', '.join(map(repr, asked)) or 'none'}")
    return tuple(name for name in RETURNS if name in asked)


def is_per(unit: Unit, name: str) -> bool:
    """Whether the column of this name has an entry for each such unit."""
    return COLUMNS[name].unit == unit


def empty(name: str, length: int, width: tuple[int, ...] = ()) -> Any:
    """A new array for a column: `length` entries of the shape `width`, each of them nothing."""
    return np.full((length, *width), NOTHING.get(name, 0), COLUMNS[name].dtype)
