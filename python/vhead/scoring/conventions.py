"""Which position a number belongs to: the rules of the frameworks that read values and rewards."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from vhead.errors import FieldError, VheadError
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
        pooling: `"last"`: the last completion token that the model wrote. `"last_non_pad"`: the last token of prompt
            and completion that is not the model's `pad_token_id`, as transformers' sequence classification reads it,
            which is the token before the end where padding and end are one token. `"before_pad"`: the token before the
            completion's first `pad_token_id`, as TRL's `get_reward` and DeepSpeed-Chat read it.
        reward_mean: Subtracted from rewards.
        reward_std: Rewards less the mean are divided by it, as OpenRLHF's `normalize_reward` does.
        step_separator: What ends a step, as process reward models read them: a token's id, several ids in a row, or
            text, which may also be a part of a token's. The step is read at the separator's last token, which has to
            be one that the model wrote. None: a step is one turn of the model's.

    Raises:
        ValueError: An attribute is none of these, or the normalisation is not finite or divides by zero.
    """

    alignment: Alignment = "completion"
    pooling: Pooling = "last"
    reward_mean: float = 0.0
    reward_std: float = 1.0
    step_separator: "str | int | Sequence[int] | Separator | None" = None

    def __post_init__(self) -> None:
        for name, allowed in (("alignment", get_args(Alignment)), ("pooling", get_args(Pooling))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected {' or '.join(allowed)}, got {getattr(self, name)!r}")
        if not math.isfinite(self.reward_mean):
            raise ValueError(f"reward_mean: expected a finite number, got {self.reward_mean}")
        if not 0.0 < self.reward_std < math.inf:
            raise ValueError(f"reward_std: expected a positive number, got {self.reward_std}")
        if not _is_separator(self.step_separator):
            expected = "text, a token id, or several of them"
            raise ValueError(f"step_separator: expected {expected}, got {self.step_separator!r}")

    def resolved(self, tokenizer: Any) -> Self:
        """The same with the separator of steps as it is found among token ids.

        Raises:
            VheadError: The separator is text, and there is no tokenizer, or it makes no token of it.
        """
        separator = self.step_separator
        if separator is None or isinstance(separator, Separator):
            return self
        if isinstance(separator, str):
            if tokenizer is None:
                raise VheadError("step_separator: expected token ids, because the scorer has no tokenizer, got text")
            ids = tokenizer(separator, add_special_tokens=False)["input_ids"]
            if not ids:
                raise VheadError(f"step_separator: expected text that has tokens, got {separator!r}")
            return replace(self, step_separator=Separator(tuple(ids), separator, tokenizer))
        ids = (separator,) if isinstance(separator, int) else tuple(separator)
        return replace(self, step_separator=Separator(ids))

    def of_states(self) -> Self:
        """The same positions for hidden states: an entry for each completion token, and nothing normalised."""
        return replace(self, alignment="completion", reward_mean=0.0, reward_std=1.0)

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

    def mask(self, rollout: Encoded) -> NDArray[np.bool_]:
        """For each entry, whether it is about a token that the model wrote, bool `[entries]`."""
        mask = np.zeros(self.entries(rollout), np.bool_)
        mask[len(mask) - rollout.completion_length :] = True if rollout.mask is None else rollout.mask
        return mask

    def needs_no_logits(self, rollout: Encoded) -> NDArray[np.bool_]:
        """For each computed entry, whether it is about an observation, whose log-probability nobody asks for."""
        observed = np.zeros(len(rollout) - self.first_scored(rollout), np.bool_)
        if rollout.mask is not None:
            observed[len(observed) - rollout.completion_length :] = ~rollout.mask
        return observed

    def step_ends(self, rollout: Encoded) -> NDArray[np.int64]:
        """The last token of each step, counted in the completion, int64 `[S]`.

        Raises:
            FieldError: The model did not write the separator.
            TypeError: The separator is not resolved.
        """
        separator = self.step_separator
        written = np.ones(rollout.completion_length, np.bool_) if rollout.mask is None else rollout.mask
        if separator is None:
            return np.flatnonzero(written & ~np.append(written[1:], False))
        if not isinstance(separator, Separator):
            raise TypeError("step_separator: expected resolved conventions, got others")
        found = separator.ends(rollout.tokens[rollout.prompt_length :])
        found = found[written[found]]
        if not len(found):
            expected = f"the separator of steps, {separator}, at least once among what the model wrote"
            raise FieldError(rollout.name, "completion", expected=expected, got="none")
        return found

    def rewarded(self, rollout: Encoded, pad_token: int | None) -> int:
        """The token at which the reward is read."""
        if self.pooling == "last" or pad_token is None:
            last = rollout.completion_length if rollout.mask is None else int(np.flatnonzero(rollout.mask)[-1]) + 1
            return rollout.prompt_length + last - 1
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


class Separator:
    """What ends a step, as it is found among token ids.

    Args:
        ids: The tokens in a row.
        text: Their text, if it is to be found in longer tokens as well, as a tokenizer makes one token of `.` and two
            line breaks.
        tokenizer: What knows the text of tokens.
    """

    def __init__(self, ids: tuple[int, ...], text: str = "", tokenizer: Any = None) -> None:
        self._ids = np.array(ids, np.int64)
        self._text, self._tokenizer = text, tokenizer
        self._texts: dict[int, str] = {}

    def __str__(self) -> str:
        ids = f"the tokens {self._ids.tolist()}"
        return f"{self._text!r} or {ids}" if self._text else ids

    def ends(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """The last token of each separator among `tokens` `[C]`, in order, int64 `[S]`."""
        ends = set(self._ends_in_text(tokens)) if self._text else set()
        if len(self._ids) <= len(tokens):
            pieces = np.lib.stride_tricks.sliding_window_view(tokens, len(self._ids))
            ends.update((np.flatnonzero((pieces == self._ids).all(axis=1)) + len(self._ids) - 1).tolist())
        return np.array(sorted(ends), np.int64)

    def _ends_in_text(self, tokens: NDArray[np.int64]) -> Iterator[int]:
        texts = [self._text_of(int(token)) for token in tokens]
        stops = np.cumsum([len(text) for text in texts])
        whole, at = "".join(texts), 0
        while (place := whole.find(self._text, at)) >= 0:
            at = place + len(self._text)
            yield int(np.searchsorted(stops, at))

    def _text_of(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return self._texts[token]


def _is_separator(value: object) -> bool:
    if isinstance(value, Separator):
        return True
    if value is None or isinstance(value, str):
        return value != ""
    ids = [value] if isinstance(value, int) else value
    if not isinstance(ids, list | tuple) or not ids:
        return False
    return all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in ids)
