"""From a rollout to token ids that the model can take."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vhead.errors import FieldError
from vhead.scoring.rollout import Message, Rollout
from vhead.scoring.truncation import LengthLimit

# Enough for completions that do not come one right after the other.
_REMEMBERED_PROMPTS = 64


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """A rollout as token ids.

    Attributes:
        index: Its position in the input.
        id: Its id.
        name: What errors call it.
        tokens: Prompt and completion, int64 `[P + C]`.
        prompt_length: P.
        truncated: Whether it has fewer tokens than it came with.
    """

    index: int
    id: str | int | None
    name: str
    tokens: NDArray[np.int64]
    prompt_length: int
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def completion_length(self) -> int:
        """C."""
        return len(self.tokens) - self.prompt_length


class Encoder:
    """Turns rollouts into token ids, checked against what the model can take.

    Args:
        tokenizer: Needed for text and messages.
        vocabulary_size: Rows of the model's token embedding.
        limit: Tokens that a rollout may have, and what becomes of longer ones.
    """

    def __init__(self, tokenizer: Any, vocabulary_size: int, limit: LengthLimit) -> None:  # noqa: ANN401
        self._tokenizer = tokenizer
        self._vocabulary_size = vocabulary_size
        self._limit = limit
        self._prefix = [] if tokenizer is None else _prefix_tokens(tokenizer)
        # A prompt's other completions mostly come soon after.
        self._prompt_tokens = lru_cache(_REMEMBERED_PROMPTS)(self._tokens_of_prompt)

    def encode(self, index: int, rollout: Rollout, name: str) -> Encoded:
        """The rollout's token ids.

        Raises:
            FieldError: Text came without a tokenizer, a part has no tokens, an id is not in the vocabulary, or both
                together are longer than they may be and are not to be truncated.
        """
        if not isinstance(rollout, Rollout):
            raise FieldError(name, "rollout", expected="a Rollout", got=type(rollout).__name__)
        prompt, completion = self._parts(rollout, name)
        whole = np.concatenate([prompt, completion])
        if not len(prompt) or not len(completion) or whole.max() >= self._vocabulary_size:
            raise self._error(prompt, completion, name)
        prompt, completion, truncated = self._limit.fit(prompt, completion, name)
        tokens = np.concatenate([prompt, completion]) if truncated else whole
        return Encoded(index, rollout.id, name, tokens, len(prompt), truncated)

    def _parts(self, rollout: Rollout, name: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        prompt, completion = rollout.prompt, rollout.completion
        if isinstance(prompt, np.ndarray) and isinstance(completion, np.ndarray):
            return prompt.astype(np.int64, copy=False), completion.astype(np.int64, copy=False)
        if self._tokenizer is None:
            raise FieldError(name, "prompt", expected="token ids, as the scorer has no tokenizer", got=rollout.kind)
        if isinstance(prompt, str) and isinstance(completion, str):
            return self._prompt_tokens(prompt), _array(self._tokens(completion))
        return self._chat_parts(prompt, completion, name)  # type: ignore[arg-type]

    def _chat_parts(
        self, prompt: tuple[Message, ...], completion: tuple[Message, ...], name: str
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The template renders the chat with and without the completion; the difference is the completion."""
        if not getattr(self._tokenizer, "chat_template", None):
            raise FieldError(name, "messages", expected="a tokenizer with a chat template", got="one without")
        head = self._rendered(prompt, name, add_generation_prompt=True)
        whole = self._rendered((*prompt, *completion), name, add_generation_prompt=False)
        if not whole.startswith(head):
            raise FieldError(
                name,
                "messages",
                expected="a chat template that leaves the prompt as it is when the completion follows",
                got="one that changes it",
            )
        return _array(self._tokens(head)), _array(self._tokens(whole[len(head) :]))

    def _rendered(self, messages: tuple[Message, ...], name: str, *, add_generation_prompt: bool) -> str:
        try:
            rendered = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # A template is a program of its own and raises what it likes.
            raise FieldError(name, "messages", expected="a chat that the template takes", got=str(error)) from error
        return str(rendered)

    def _tokens_of_prompt(self, text: str) -> NDArray[np.int64]:
        return _array([*self._prefix, *self._tokens(text)])

    def _tokens(self, text: str) -> list[int]:
        tokens: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return tokens

    def _error(self, prompt: NDArray[np.int64], completion: NDArray[np.int64], name: str) -> FieldError:
        """What is wrong with parts of which one has no tokens, or one that is not in the vocabulary."""
        for field, tokens in (("prompt", prompt), ("completion", completion)):
            if not len(tokens):
                return FieldError(name, field, expected="at least one token", got="a text without any")
            if tokens.max() >= self._vocabulary_size:
                break
        at = int(tokens.argmax())
        expected = f"token ids below the vocabulary's {self._vocabulary_size}"
        return FieldError(name, field, expected=expected, got=f"{tokens[at]} at position {at}")


class IdRegistry:
    """Notices an id that comes twice.

    Args:
        limit: How many of the last ids are remembered, None for all.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._names: dict[str | int, str] = {}

    def add(self, id: str | int | None, name: str) -> None:  # noqa: A002, the field's name
        """Remembers an id and what errors call its record.

        Raises:
            FieldError: Another record had this id.
        """
        if id is None:
            return
        if id in self._names:
            raise FieldError(name, "id", expected="an id of its own", got=f"the id of {self._names[id]}")
        self._names[id] = name
        if self._limit is not None and len(self._names) > self._limit:
            del self._names[next(iter(self._names))]


def _prefix_tokens(tokenizer: Any) -> list[int]:  # noqa: ANN401, any tokenizer of transformers
    """The special tokens that the tokenizer puts in front of a text, such as a beginning-of-sequence token."""
    encoded = tokenizer("a", add_special_tokens=True, return_special_tokens_mask=True)
    mask = encoded["special_tokens_mask"]
    count = mask.index(0) if 0 in mask else len(mask)
    return list(encoded["input_ids"][:count])


def _array(tokens: list[int]) -> NDArray[np.int64]:
    return np.asarray(tokens, np.int64)
