"""What the scores of the bundled rollouts say: per character, per rollout, and over all of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vhead.demo.rollouts import IN_THE_MIDDLE, NATURAL, TO_THE_END, DemoRollout


class ByteScore(Protocol):
    """The part of a `vhead.Score` of a byte-level model that is read here."""

    @property
    def values(self) -> NDArray[np.float32]:
        """The head's output at the position that predicts each completion token."""

    @property
    def logprobs(self) -> NDArray[np.float32]:
        """Log-probability of each completion token, in nats."""

    @property
    def reward(self) -> float:
        """The head's output at the last completion token."""


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """A rollout with what its scores say.

    Attributes:
        rollout: The record.
        values: The head's output after each character of the completion has been read, float32 `[characters]`.
        reward: The last of them.
        bits_per_byte: Mean information of the completion's bytes.
    """

    rollout: DemoRollout
    values: NDArray[np.float32]
    reward: float
    bits_per_byte: float

    @property
    def mean_value(self) -> float:
        """Mean over the completion's characters."""
        return float(self.values.mean())


def judge(rollout: DemoRollout, score: ByteScore) -> Judged:
    """Reads a score of the byte-level model, character by character.

    Raises:
        MissingFieldError: The score lacks values, logprobs or reward.
        ValueError: It does not have one token per byte of the completion.
    """
    ends = _last_bytes(rollout.completion)
    if len(score.values) != ends[-1] + 1:
        raise ValueError(f"{rollout.id}: expected {ends[-1] + 1} tokens, one per byte, got {len(score.values)}")
    # values[t] is read before token t, so that what the head says after a token stands one place further on.
    after = np.append(score.values[1:], np.float32(score.reward))
    return Judged(rollout, after[ends], score.reward, float(-score.logprobs.mean() / math.log(2)))


def _last_bytes(text: str) -> NDArray[np.int64]:
    """Where the last UTF-8 byte of each character stands; before it, a byte-level model has not seen the character."""
    return np.cumsum([len(character.encode()) for character in text]) - 1


def auc(positive: ArrayLike, negative: ArrayLike) -> float:
    """The probability that a positive scores above a negative, a tie counting half: the area under the ROC curve.

    Args:
        positive: Scores `[N]` of what should score high.
        negative: Scores `[M]` of what should score low.
    """
    high, low = np.asarray(positive), np.sort(np.asarray(negative))
    below = np.searchsorted(low, high, "left").sum()
    not_above = np.searchsorted(low, high, "right").sum()
    return float((below + not_above) / 2 / (high.size * low.size))


@dataclass(frozen=True, slots=True)
class Summary:
    """Natural passages against twins that are corrupted to the end, and what becomes of those that recover.

    Attributes:
        natural: Mean reward of natural passages.
        corrupted: Mean reward of twins that are corrupted to the end.
        recovered: Mean reward of twins that are corrupted in the middle and natural at the end.
        auc: Area under the ROC curve of the reward, natural against corrupted to the end.
        token_auc: The same of the values of single characters, inside corrupted spans against outside, all rollouts.
        pairs: Natural passages with such a twin.
        ordered: How many of them have the higher reward.
    """

    natural: float
    corrupted: float
    recovered: float
    auc: float
    token_auc: float
    pairs: int
    ordered: int


def summarise(judged: Sequence[Judged]) -> Summary:
    """Compares the rewards; each passage in `judged` comes with both its twins."""
    rewards = {
        extent: np.array([j.reward for j in judged if j.rollout.extent == extent])
        for extent in (NATURAL, TO_THE_END, IN_THE_MIDDLE)
    }
    values = np.concatenate([j.values for j in judged])
    corrupted = np.concatenate([corrupted_characters(j.rollout) for j in judged])
    return Summary(
        natural=float(rewards[NATURAL].mean()),
        corrupted=float(rewards[TO_THE_END].mean()),
        recovered=float(rewards[IN_THE_MIDDLE].mean()),
        auc=auc(rewards[NATURAL], rewards[TO_THE_END]),
        token_auc=auc(values[~corrupted], values[corrupted]),
        pairs=len(rewards[NATURAL]),
        ordered=int((rewards[NATURAL] > rewards[TO_THE_END]).sum()),
    )


def corrupted_characters(rollout: DemoRollout) -> NDArray[np.bool_]:
    """Which characters of the completion the corruption changed, bool `[characters]`."""
    positions = np.arange(len(rollout.completion))
    return (positions >= rollout.span[0]) & (positions < rollout.span[1])
