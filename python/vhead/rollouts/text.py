"""Text to token ids: prompt and completion are tokenised as one text, and divided where the completion begins."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vhead.errors import VheadError

# Enough for completions that do not come one right after the other.
_REMEMBERED_PROMPTS = 64
# What tokenizers decode half a character to.
_HALF_A_CHARACTER = "\ufffd"
_NO_TEXT = -1

Spans = NDArray[np.int64]
_Tokenise = Callable[[str], list[int]]
# Ids, how many of them are the prompt's, and spans where they are known.
_Divided = tuple[list[int], int, Spans | None]


@dataclass(frozen=True, slots=True)
class Passage:
    """A prompt and its completion as one text.

    Attributes:
        text: The prompt, and the completion behind it.
        border: The first character after the prompt.
        start: Where the first character of what the user calls the completion stands.
        length: How many characters the completion has.
        turns: First and one-past-last character of each piece of the completion that the model wrote; None: it wrote
            all of it. In a completion of several messages, no character has a place of its own.
    """

    text: str
    border: int
    start: int
    length: int
    turns: tuple[tuple[int, int], ...] | None = None

    def within_completion(self, spans: Spans) -> Spans:
        """Spans of the whole text `[N, 2]` as spans of the completion; -1, which is no place, stays."""
        if self.turns is not None:
            return no_spans(len(spans))
        inside = (spans - self.start).clip(0, self.length)
        inside[spans == _NO_TEXT] = _NO_TEXT
        return inside


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """A passage's tokens.

    Attributes:
        ids: int64 `[P + C]`.
        prompt_length: P, the tokens of the prompt.
        spans: First and one-past-last character of each token in the passage, int64 `[P + C, 2]`, -1 where unknown;
            None where they were not asked for and not needed.
        mask: Which tokens of the completion the model wrote, bool `[C]`; None: all.
    """

    ids: NDArray[np.int64]
    prompt_length: int
    spans: Spans | None = None
    mask: NDArray[np.bool_] | None = None


def no_spans(count: int) -> Spans:
    """The spans of tokens whose characters are not known, int64 `[count, 2]`."""
    return np.full((count, 2), _NO_TEXT, np.int64)


class TextTokenizer:
    """Tokenises passages.

    A token that stands across the border is the completion's. Where a tokenizer states no offsets, or states them
    wrongly, the completion begins at the first token in which the prompt and the whole text differ.

    Args:
        tokenizer: Any tokenizer of transformers.
        separate: Whether prompt and completion are tokenised apart instead.
        append_eos: Whether plain text is followed by the tokenizer's end-of-sequence token, if it does not end in it.

    Raises:
        VheadError: `append_eos` is asked for, and the tokenizer has no such token.
    """

    def __init__(self, tokenizer: Any, *, separate: bool = False, append_eos: bool = False) -> None:
        self._tokenizer = tokenizer
        self._separate = separate
        self._end = getattr(tokenizer, "eos_token_id", None) if append_eos else None
        if append_eos and self._end is None:
            raise VheadError("append_eos: expected a tokenizer with an end-of-sequence token, got one without")
        # A prompt's other completions mostly come soon after.
        self._prompt_ids = lru_cache(_REMEMBERED_PROMPTS)(self._with_beginning)

    def plain(self, passage: Passage, *, with_spans: bool = False) -> Tokens:
        """A passage of plain text, with the tokens that the tokenizer puts in front of a text and none behind it."""
        tokens = self._divided(passage, beginning=True, with_spans=with_spans)
        if self._end is None or (len(tokens.ids) and tokens.ids[-1] == self._end):
            return tokens
        end = [[len(passage.text)] * 2]
        spans = None if tokens.spans is None else np.concatenate([tokens.spans, end])
        return Tokens(np.append(tokens.ids, self._end), tokens.prompt_length, spans)

    def rendered(self, passage: Passage, *, with_spans: bool = False) -> Tokens:
        """A passage that a chat template made, which holds every special token that it wants."""
        return self._divided(passage, beginning=False, with_spans=with_spans)

    def _divided(self, passage: Passage, *, beginning: bool, with_spans: bool) -> Tokens:
        prompt_ids = self._prompt_ids if beginning else self._ids
        if self._separate:
            ids, count, spans = self._in_two(passage, prompt_ids)
        else:
            ids, count, spans = self._as_one(passage, prompt_ids, beginning=beginning)
        mask = None if passage.turns is None else self._mask(passage, ids, count, spans)
        if with_spans and spans is None:
            spans = self._decoded_spans(ids, count, passage.text)
        return Tokens(np.asarray(ids, np.int64), count, spans, mask)

    def _mask(self, passage: Passage, ids: list[int], count: int, spans: Spans | None) -> NDArray[np.bool_]:
        """Which tokens of the completion are the model's: those that have a character of its turns."""
        mask = np.zeros(len(ids), np.bool_)
        for start, stop in passage.turns or ():
            if spans is not None:
                first = self._tokens_before(passage.text, start, ids, spans)
                last = int(np.searchsorted(spans[:, 0], stop, side="left"))
            else:
                first, _ = self._shared(passage, ids, count, start)
                shared, own = self._shared(passage, ids, count, stop)
                # A token across the end of a turn is the model's, as one across its beginning is.
                last = shared + (shared < own)
            mask[first:last] = True
        return mask[count:]

    def _shared(self, passage: Passage, ids: list[int], count: int, end: int) -> tuple[int, int]:
        """With how many of their tokens the whole and its text up to a character begin alike, and how many that has."""
        if self._separate:
            own = [*ids[:count], *self._ids(passage.text[passage.border : end])]
        else:
            own = self._ids(passage.text[:end])
        return _common_beginning(ids, own), len(own)

    def _as_one(self, passage: Passage, prompt_ids: _Tokenise, *, beginning: bool) -> _Divided:
        ids, spans = self._tokenised(passage.text)
        if beginning:
            ids, spans = self._begun(ids, spans)
        if spans is None:
            return ids, _common_beginning(ids, prompt_ids(passage.text[: passage.border])), None
        return ids, self._tokens_before(passage.text, passage.border, ids, spans), spans

    def _in_two(self, passage: Passage, prompt_ids: _Tokenise) -> _Divided:
        prompt = prompt_ids(passage.text[: passage.border])
        completion, spans = self._tokenised(passage.text[passage.border :])
        if spans is not None:
            spans = np.concatenate([np.zeros((len(prompt), 2), np.int64), spans + passage.border])
        return [*prompt, *completion], len(prompt), spans

    def _tokens_before(self, text: str, border: int, ids: Sequence[int], spans: Spans) -> int:
        """How many tokens end at the border or before it."""
        count = int(np.searchsorted(spans[:, 1], border, side="right"))
        if count < len(ids) and spans[count, 0] < border and ids[count] in self._added:
            # A marker that takes the white space behind it, as Phi's do, is the prompt's all the same.
            count += not text[border : spans[count, 1]].strip()
        return count

    def _tokenised(self, text: str) -> tuple[list[int], Spans | None]:
        """The ids of a text by itself, and their spans where the tokenizer states them and they can be right."""
        options = {"return_offsets_mapping": True} if getattr(self._tokenizer, "is_fast", False) else {}
        encoding = self._tokenizer(text, add_special_tokens=False, verbose=False, **options)
        if not options:
            return encoding["input_ids"], None
        spans = np.asarray(encoding["offset_mapping"], np.int64).reshape(-1, 2)
        ends = spans[:, 1]
        if (np.diff(ends) < 0).any() or text[ends[-1] if len(ends) else 0 :].strip():
            return encoding["input_ids"], None
        # Some tokenizers leave the white space at a token's beginning out of its span.
        spans[:1, 0] = 0
        gaps = np.flatnonzero(spans[1:, 0] > ends[:-1]) + 1
        spans[gaps, 0] = ends[gaps - 1]
        return encoding["input_ids"], spans

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _with_beginning(self, text: str) -> list[int]:
        return self._begun(self._ids(text), None)[0]

    def _begun(self, ids: list[int], spans: Spans | None) -> tuple[list[int], Spans | None]:
        """The tokens behind those that the tokenizer puts in front, unless the text itself begins with these."""
        beginning = self._beginning
        if not beginning or ids[: len(beginning)] == beginning:
            return ids, spans
        none = np.zeros((len(beginning), 2), np.int64)
        return [*beginning, *ids], None if spans is None else np.concatenate([none, spans])

    @cached_property
    def _beginning(self) -> list[int]:
        """What the tokenizer puts in front of any text, special tokens or not, by a mask or by code."""
        alone = self._ids("a")
        whole: list[int] = self._tokenizer("a", add_special_tokens=True, verbose=False)["input_ids"]
        places = range(len(whole) - len(alone) + 1)
        at = next((at for at in places if whole[at : at + len(alone)] == alone), None)
        if at is None:
            raise VheadError(
                f"{type(self._tokenizer).__name__}: expected a tokenizer that puts its special tokens before and behind"
                f" a text, got one that turns {alone} into {whole}; score token ids instead"
            )
        return whole[:at]

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._tokenizer.get_added_vocab().values())

    def _decoded_spans(self, ids: Sequence[int], first: int, text: str) -> Spans:
        """Where the tokens from the first on stand in the text that they end, found by decoding; -1 where it is not."""
        spans = np.zeros((len(ids), 2), np.int64)
        place = len(text) - len(self._decoded(ids[first:]))
        before, start = first, first
        for stop in range(first + 1, len(ids) + 1):
            # With the tokens before, as the first token of a text may lose its space.
            known = self._decoded(ids[before:start])
            piece = self._decoded(ids[before:stop])[len(known) :]
            if not piece or piece.endswith(_HALF_A_CHARACTER):
                continue
            if place < 0 or not text.startswith(piece, place):
                return no_spans(len(ids))
            spans[start:stop] = place, place + len(piece)
            place += len(piece)
            before, start = start, stop
        return spans if start == len(ids) else no_spans(len(ids))

    def _decoded(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


def _common_beginning(ids: Sequence[int], others: Sequence[int]) -> int:
    pairs = zip(ids, others, strict=False)
    return next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(ids), len(others)))
