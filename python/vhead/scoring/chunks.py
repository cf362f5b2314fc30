"""Cutting the stream of rollouts into chunks, and putting a chunk's results back into the order of the input."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from vhead.errors import FieldError
from vhead.rollouts.encoding import Encoded
from vhead.rollouts.rollout import Rollout
from vhead.scoring.conventions import Conventions
from vhead.scoring.scores import PER_TOKEN, TOKENS, Scores, offsets_of

# A chunk is what is sorted by length: large enough to fill batches evenly, small enough to keep memory flat.
_ROLLOUTS = 4096


class Source(Protocol):
    """Where a rollout comes from: a record of a file, or a place in a list."""

    @property
    def where(self) -> str:
        """What errors call the place."""

    def rollout(self) -> Rollout:
        """The rollout.

        Raises:
            RecordError: There is none.
        """


Sourced = TypeVar("Sourced", bound=Source)


def chunks(
    encoded: Iterable[tuple[Sourced, Encoded]], tokens: int
) -> Iterator[tuple[list[tuple[Sourced, Encoded]], Exception | None]]:
    """Groups consecutive rollouts of about `tokens` tokens, with the exception that ended the input early, if any.

    So what was read before the exception is still scored.
    """
    chunk: list[tuple[Sourced, Encoded]] = []
    total = 0
    try:
        for source, rollout in encoded:
            chunk.append((source, rollout))
            total += len(rollout)
            if total >= tokens or len(chunk) >= _ROLLOUTS:
                yield chunk, None
                chunk, total = [], 0
    except Exception as error:  # Handed on as it came.
        yield chunk, error
        return
    if chunk:
        yield chunk, None


class Results:
    """The scores of a chunk while they are computed.

    Args:
        chunk: The rollouts in input order.
        returns: What is asked for.
        conventions: How many entries a rollout has in a per-token field.
        truncates: Whether the scores say which rollouts were truncated.

    Attributes:
        scores: The scores of all rollouts.
        errors: What is wrong with the rollouts whose numbers are not finite, by their places.
    """

    def __init__(
        self, chunk: Sequence[Encoded], returns: Sequence[str], conventions: Conventions, *, truncates: bool = False
    ) -> None:
        self._chunk = chunk
        lengths = np.fromiter((conventions.entries(rollout) for rollout in chunk), np.int64, len(chunk))
        offsets = offsets_of(lengths)
        computed: dict[str, NDArray[Any]] = {
            name: np.empty(offsets[-1] if name in PER_TOKEN else len(chunk), np.float32)
            for name in returns
            if name != TOKENS
        }
        if TOKENS in returns:
            computed |= _tokens(chunk, lengths)
        self.scores = Scores(
            ids=tuple(rollout.id for rollout in chunk),
            indices=np.fromiter((rollout.index for rollout in chunk), np.int64, len(chunk)),
            prompt_lengths=np.fromiter((rollout.prompt_length for rollout in chunk), np.int64, len(chunk)),
            offsets=offsets,
            computed=computed,
            truncated=np.array([rollout.truncated for rollout in chunk], np.bool_) if truncates else None,
        )
        self.errors: dict[int, FieldError] = {}

    def put(self, places: Sequence[int], computed: dict[str, NDArray[np.float32]]) -> None:
        """Stores the fields of the rollouts at `places`, which come one after the other in `computed`."""
        bounds = offsets_of(self.scores.token_counts[list(places)])
        for name, flat in computed.items():
            target = self.scores.computed[name]
            if name not in PER_TOKEN:
                target[list(places)] = flat
                continue
            for at, place in enumerate(places):
                offset = self.scores.offsets[place]
                target[offset : offset + bounds[at + 1] - bounds[at]] = flat[bounds[at] : bounds[at + 1]]
        for name, flat in computed.items():
            if not np.isfinite(flat).all():
                self._note_nonfinite(name, places)

    def _note_nonfinite(self, name: str, places: Sequence[int]) -> None:
        for place in places:
            numbers = np.atleast_1d(self.scores[place].computed[name])
            broken = np.flatnonzero(~np.isfinite(numbers))
            if len(broken):
                at = f" at completion token {broken[0]}" if name in PER_TOKEN else ""
                got = f"{numbers[broken[0]]}{at}"
                error = FieldError(self._chunk[place].name, name, expected="finite numbers from the model", got=got)
                self.errors.setdefault(place, error)


def _tokens(chunk: Sequence[Encoded], lengths: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """The columns that say which tokens the entries are about: the last ones of each rollout, so many."""
    ids, spans = [np.empty(0, np.int64)], [np.empty((0, 2), np.int64)]
    for rollout, length in zip(chunk, lengths.tolist(), strict=True):
        if length and rollout.spans is not None:
            ids.append(rollout.tokens[-length:])
            spans.append(rollout.spans[-length:])
    return {"token_ids": np.concatenate(ids), "token_offsets": np.concatenate(spans)}
