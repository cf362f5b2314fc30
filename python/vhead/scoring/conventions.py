"""Which position a number belongs to: the rules of the frameworks that read values and rewards."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from vhead.rollouts.encoding import Encoded

Alignment = Literal["completion", "right_shift"]
Pooling = Literal["last", "last_non_pad", "before_pad"]


@dataclass(frozen=True)
class Conventions:
    """How per-token fields are aligned with tokens, and which token the reward is read at.

    Attributes:
        alignment: `"completion"`: one entry per completion token t, from the position that predicts t; what TRL,
            LLaMA-Factory, OpenRLHF, verl and slime slice out. `"right_shift"`: one entry per token of prompt and
            completion, entry t from the position before t and entry 0 zero, as NeMo-RL shifts its values.
        pooling: `"last"`: the last completion token. `"last_non_pad"`: the last token of prompt and completion that is
            not the model's `pad_token_id`, as transformers' sequence classification reads it, which is the token before
            the end where padding and end are one token. `"before_pad"`: the token before the completion's first
            `pad_token_id`, as TRL's `get_reward` and DeepSpeed-Chat read it.
        reward_mean: Subtracted from rewards.
        reward_std: Rewards less the mean are divided by it, as OpenRLHF's `normalize_reward` does.

    Raises:
        ValueError: An attribute is none of these, or the normalisation is not finite or divides by zero.
    """

    alignment: Alignment = "completion"
    pooling: Pooling = "last"
    reward_mean: float = 0.0
    reward_std: float = 1.0

    def __post_init__(self) -> None:
        for name, allowed in (("alignment", get_args(Alignment)), ("pooling", get_args(Pooling))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected {' or '.join(allowed)}, got {getattr(self, name)!r}")
        if not math.isfinite(self.reward_mean):
            raise ValueError(f"reward_mean: expected a finite number, got {self.reward_mean}")
        if not 0.0 < self.reward_std < math.inf:
            raise ValueError(f"reward_std: expected a positive number, got {self.reward_std}")

    @property
    def leading_zeros(self) -> int:
        """Entries of a rollout that stand before the first one that is computed."""
        return 1 if self.alignment == "right_shift" else 0

    def first_scored(self, rollout: Encoded) -> int:
        """The first token that an entry is computed for."""
        return 1 if self.alignment == "right_shift" else rollout.prompt_length

    def entries(self, rollout: Encoded) -> int:
        """Entries of a rollout in every per-token field."""
        return len(rollout) - self.first_scored(rollout) + self.leading_zeros

    def rewarded(self, rollout: Encoded, pad_token: int | None) -> int:
        """The token at which the reward is read."""
        if self.pooling == "last" or pad_token is None:
            return len(rollout) - 1
        if self.pooling == "last_non_pad":
            others = np.flatnonzero(rollout.tokens != pad_token)
            return int(others[-1]) if len(others) else 0
        pads = np.flatnonzero(rollout.tokens[rollout.prompt_length :] == pad_token)
        return rollout.prompt_length + (int(pads[0]) if len(pads) else rollout.completion_length) - 1

    def normalised(self, rewards: NDArray[np.float32]) -> NDArray[np.float32]:
        """Rewards less the mean, divided by the standard deviation, float32."""
        if (self.reward_mean, self.reward_std) == (0.0, 1.0):
            return rewards
        return (rewards - np.float32(self.reward_mean)) / np.float32(self.reward_std)
