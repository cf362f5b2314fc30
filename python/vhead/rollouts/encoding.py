"""From a rollout to token ids that the model can take."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, cast, get_args

import numpy as np
from numpy.typing import NDArray

from vhead.errors import FieldError, VheadError
from vhead.rollouts.chat import chat_passage
from vhead.rollouts.messages import Message, check_unicode, checked_messages
from vhead.rollouts.rollout import Rollout
from vhead.rollouts.template import Template
from vhead.rollouts.text import Passage, Spans, TextTokenizer, Tokens, no_spans
from vhead.rollouts.wording import Id, shown

Truncation = Literal["prompt", "completion"]


@dataclass(frozen=True, slots=True)
class LengthLimit:
    """How many tokens a rollout may have, and which are cut off where it has more.

    Attributes:
        tokens: The most tokens of prompt and completion together; None: any number.
        truncation: `"prompt"` cuts the prompt's first tokens off, `"completion"` the completion's last ones, None none.
        is_context: Whether the limit is the model's own.
    """

    tokens: int | None
    truncation: Truncation | None = None
    is_context: bool = True

    @classmethod
    def of(cls, context_length: int | None, max_length: int | None, truncation: Truncation | None) -> Self:
        """The limit of a model that is asked to keep to `max_length`.

        Raises:
            ValueError: `truncation` is none of these, or `max_length` leaves no room for a prompt and a completion.
            VheadError: `max_length` is more than the model takes.
        """
        if truncation is not None and truncation not in get_args(Truncation):
            raise ValueError(f"truncation: expected None, {' or '.join(get_args(Truncation))}, got {truncation!r}")
        if max_length is None:
            return cls(context_length, truncation)
        if max_length < 2:
            raise ValueError(f"max_length: expected at least 2, a prompt's token and a completion's, got {max_length}")
        if context_length is not None and max_length > context_length:
            raise VheadError(f"max_length: expected at most the model's {context_length} tokens, got {max_length}")
        return cls(max_length, truncation, is_context=False)

    @property
    def said(self) -> str:
        """The limit in errors."""
        return f"the model's {self.tokens}" if self.is_context else f"{self.tokens}"

    def kept(self, prompt: int, completion: int, name: str, *, is_chat: bool = False) -> tuple[int, int]:
        """Which tokens stay, as the first one and the one past the last; at least one of each part is among them.

        Raises:
            FieldError: Both are too long together and nothing may be cut off, or the part that has to stay whole is too
                long by itself.
        """
        length = prompt + completion
        excess = 0 if self.tokens is None else length - self.tokens
        if excess <= 0:
            return 0, length
        if self.truncation == "prompt" and excess < prompt:
            return excess, length
        if self.truncation == "completion" and excess < completion:
            return 0, length - excess
        raise self._error(prompt, completion, name, is_chat=is_chat)

    def _error(self, prompt: int, completion: int, name: str, *, is_chat: bool) -> FieldError:
        if self.truncation is None:
            got = f"{prompt} + {completion} = {prompt + completion}"
            if is_chat:
                got = f"{got}, before and from the assistant's first scored turn on"
                return FieldError(name, "messages", expected=f"at most {self.said} tokens", got=got)
            expected = f"at most {self.said} tokens together with the prompt"
            return FieldError(name, "completion", expected=expected, got=got)
        kept, cut, length = "completion", "prompt", completion
        if self.truncation == "completion":
            kept, cut, length = cut, kept, prompt
        # Only a limit that there is can be exceeded.
        room = (self.tokens or 0) - 1
        expected = f"at most {room} tokens, because only the {cut} is truncated and at least one of its tokens stays"
        return FieldError(name, kept, expected=expected, got=str(length))


Messages = tuple[Message, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """A rollout as token ids.

    Attributes:
        index: Its position in the input.
        id: Its id.
        name: What errors call it.
        tokens: Prompt and completion, int64 `[P + C]`.
        prompt_length: P, the tokens of the prompt.
        truncated: Whether it has fewer tokens than it came with.
        spans: First and one-past-last character of the completion that each token stands for, int64 `[P + C, 2]`; -1
            where there is no text. None: they were not asked for.
        mask: True where the model wrote the completion's token, bool `[C]`, at least one of them. None: it wrote all.
        candidates: Ids whose log-probabilities are wanted at each token of the completion, int64 `[C, M]`, or None.
    """

    index: int
    id: Id
    name: str
    tokens: NDArray[np.int64]
    prompt_length: int
    truncated: bool = False
    spans: Spans | None = None
    mask: NDArray[np.bool_] | None = None
    candidates: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def completion_length(self) -> int:
        """C, the tokens of the completion."""
        return len(self.tokens) - self.prompt_length


class Encoder:
    """Turns rollouts into token ids, checked against what the model can take.

    Args:
        tokenizer: Needed for text and messages.
        vocabulary_size: Rows of the model's token embedding.
        limit: Tokens that a rollout may have, and what becomes of longer ones.
        separate_tokens: Whether prompt and completion are tokenised apart.
        append_eos: Whether a completion of plain text is followed by the end-of-sequence token.

    Attributes:
        limit: As given.

    Raises:
        VheadError: `append_eos` is asked for, and the tokenizer has no such token.
    """

    def __init__(
        self,
        tokenizer: Any,
        vocabulary_size: int,
        limit: LengthLimit,
        *,
        separate_tokens: bool = False,
        append_eos: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self.limit = limit
        self._text = TextTokenizer(tokenizer, separate=separate_tokens, append_eos=append_eos)
        self._vocabulary_size = vocabulary_size

    def encode(self, index: int, rollout: Rollout, name: str, *, with_spans: bool = False) -> Encoded:
        """The rollout's token ids.

        Raises:
            FieldError: Text came without a tokenizer, a part has no tokens, an id is not in the vocabulary, both
                together are longer than they may be and are not to be truncated, or no token of the model's is left.
        """
        if not isinstance(rollout, Rollout):
            expected = "a Rollout"
            if isinstance(rollout, Mapping):
                expected = "a Rollout; `vhead.rollouts.from_records` makes them from records and data sets"
            raise FieldError(name, "rollout", expected=expected, got=type(rollout).__name__)
        tokens = self._tokens(rollout, name, with_spans=with_spans)
        count, length = tokens.prompt_length, len(tokens.ids)
        if not 0 < count < length or tokens.ids.max() >= self._vocabulary_size:
            raise self._error(tokens, name)
        self._check_candidates(rollout.candidates, name)
        is_chat = rollout.kind == "messages"
        first, stop = self.limit.kept(count, length - count, name, is_chat=is_chat)
        mask = None if tokens.mask is None else tokens.mask[: stop - count]
        if mask is not None and not mask.any():
            expected = f"a token of the model's among the {stop - count} that stay when the completion is truncated"
            raise FieldError(name, "completion", expected=expected, got="none")
        return Encoded(
            index,
            rollout.id,
            name,
            tokens.ids[first:stop],
            count - first,
            truncated=stop - first < length,
            spans=None if tokens.spans is None else tokens.spans[first:stop],
            mask=mask,
            candidates=None if rollout.candidates is None else rollout.candidates[: stop - count],
        )

    def whole(
        self, given: str | Sequence[Message], field: str, *, generation_prompt: bool = False
    ) -> NDArray[np.int64]:
        """The token ids of a text or a chat that is not parted into prompt and completion, of any length.

        Args:
            given: Plain text, with what the tokenizer puts in front of a text; or messages, by the chat template.
            field: What errors call it.
            generation_prompt: Whether a chat ends with what makes the model answer.

        Raises:
            FieldError: There is no tokenizer or no template, or the template refuses the chat.
        """
        if self._tokenizer is None:
            raise FieldError(None, field, expected="token ids, because the model has no tokenizer", got=shown(given))
        if isinstance(given, str):
            check_unicode(given, None, field)
            return self._text.plain(Passage(given, 0, 0, len(given))).ids
        template = Template(self._tokenizer, None)
        template.check()
        messages = checked_messages(given, field, None)
        text = template.rendered(messages, add_generation_prompt=generation_prompt)
        return self._text.rendered(Passage(text, 0, 0, len(text))).ids

    def check_whole(self, ids: NDArray[np.int64], name: str, *, cut: Truncation) -> None:
        """Checks token ids of which nobody has said what prompt and completion are.

        Args:
            ids: At least one.
            name: What errors call them.
            cut: The side from which tokens may be cut off, where the limit says so.

        Raises:
            FieldError: One is not in the vocabulary, or they are more than are taken.
        """
        if ids.max() >= self._vocabulary_size:
            at = int(ids.argmax())
            raise FieldError(name, "tokens", expected=self._in_vocabulary(), got=f"{ids[at]} at position {at}")
        limit = self.limit
        if limit.tokens is not None and len(ids) > limit.tokens and limit.truncation != cut:
            raise FieldError(name, "tokens", expected=f"at most {limit.said} tokens", got=str(len(ids)))

    def _in_vocabulary(self) -> str:
        return f"token ids below the vocabulary's {self._vocabulary_size}"

    def _tokens(self, rollout: Rollout, name: str, *, with_spans: bool) -> Tokens:
        """The tokens, with spans of the completion's characters where they are asked for."""
        prompt, completion = rollout.prompt, rollout.completion
        if isinstance(prompt, np.ndarray):
            ids = np.concatenate([prompt, completion]).astype(np.int64, copy=False)
            return Tokens(ids, len(prompt), no_spans(len(ids)) if with_spans else None, rollout.mask)
        if self._tokenizer is None:
            expected = "token ids, because there is no tokenizer"
            raise FieldError(name, "prompt", expected=expected, got=rollout.kind)
        if isinstance(prompt, str) and isinstance(completion, str):
            passage = Passage(prompt + completion, len(prompt), len(prompt), len(completion))
            tokens = self._text.plain(passage, with_spans=with_spans)
        else:
            template = Template(self._tokenizer, name, rollout.tools)
            passage = chat_passage(template, cast("Messages", prompt), cast("Messages", completion))
            tokens = self._text.rendered(passage, with_spans=with_spans)
        spans = passage.within_completion(tokens.spans) if with_spans and tokens.spans is not None else None
        return Tokens(tokens.ids, tokens.prompt_length, spans, tokens.mask)

    def _check_candidates(self, candidates: NDArray[np.int64] | None, name: str) -> None:
        if candidates is not None and candidates.max() >= self._vocabulary_size:
            at, place = np.unravel_index(candidates.argmax(), candidates.shape)
            expected = self._in_vocabulary()
            got = f"{candidates[at, place]} at position {at}"
            raise FieldError(name, "candidates", expected=expected, got=got)

    def _error(self, tokens: Tokens, name: str) -> FieldError:
        """What is wrong with parts of which one has no tokens, or one that is not in the vocabulary."""
        count = tokens.prompt_length
        for field, ids in (("prompt", tokens.ids[:count]), ("completion", tokens.ids[count:])):
            if not len(ids):
                got = "a text without any" if field == "completion" else "a text in which no token ends"
                return FieldError(name, field, expected="at least one token", got=got)
            if ids.max() >= self._vocabulary_size:
                break
        at = int(ids.argmax())
        return FieldError(name, field, expected=self._in_vocabulary(), got=f"{ids[at]} at position {at}")


class IdRegistry:
    """Notices an id that comes twice; what it remembers grows with every id."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def add(self, id: Id, name: str) -> None:
        """Remembers an id and what errors call its record.

        Raises:
            FieldError: Another record had this id.
        """
        if id is None:
            return
        # By its text, since True and 1 are one key, and nan is none.
        if (first := self._names.setdefault(repr(id), name)) != name:
            raise FieldError(name, "id", expected="an id that no other record has", got=f"the id of {first}")
