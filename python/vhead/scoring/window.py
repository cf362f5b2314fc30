"""Collecting the results of a window of rollouts, which are computed out of order, back in input order."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from vhead.errors import FieldError
from vhead.scoring.conventions import Conventions
from vhead.scoring.encode import Encoded
from vhead.scoring.scores import PER_TOKEN, Scores, offsets_of

# A window is what is sorted by length: large enough to fill batches evenly, small enough to keep memory flat.
_ROLLOUTS = 4096


def windows(encoded: Iterable[Encoded], tokens: int) -> Iterator[tuple[list[Encoded], Exception | None]]:
    """Groups consecutive rollouts of about `tokens` tokens, with the exception that ended the input early, if any.

    What was read before the exception is so still scored.
    """
    window: list[Encoded] = []
    total = 0
    try:
        for rollout in encoded:
            window.append(rollout)
            total += len(rollout)
            if total >= tokens or len(window) >= _ROLLOUTS:
                yield window, None
                window, total = [], 0
    except Exception as error:  # Handed on as it came.
        yield window, error
        return
    if window:
        yield window, None


class Results:
    """The scores of a window while they are computed.

    Args:
        window: The rollouts in input order.
        fields: What is computed.
        conventions: How many entries a rollout has in a per-token field.
        truncates: Whether the scores say which rollouts were truncated.
    """

    def __init__(
        self, window: Sequence[Encoded], fields: Sequence[str], conventions: Conventions, *, truncates: bool = False
    ) -> None:
        self._window = window
        lengths = np.fromiter((conventions.entries(rollout) for rollout in window), np.int64, len(window))
        offsets = offsets_of(lengths)
        flat = {name: np.empty(offsets[-1] if name in PER_TOKEN else len(window), np.float32) for name in fields}
        self._scores = Scores(
            ids=tuple(rollout.id for rollout in window),
            indices=np.fromiter((rollout.index for rollout in window), np.int64, len(window)),
            prompt_lengths=np.fromiter((rollout.prompt_length for rollout in window), np.int64, len(window)),
            offsets=offsets,
            truncated=np.array([rollout.truncated for rollout in window], np.bool_) if truncates else None,
            **flat,
        )
        self._bad: dict[int, FieldError] = {}

    def put(self, places: Sequence[int], computed: dict[str, NDArray[np.float32]]) -> None:
        """Stores the fields of the rollouts at `places`, which come one after the other in `computed`."""
        bounds = offsets_of(self._scores.token_counts[list(places)])
        for name, flat in computed.items():
            target = getattr(self._scores, name)
            if name not in PER_TOKEN:
                target[list(places)] = flat
                continue
            for at, place in enumerate(places):
                offset = self._scores.offsets[place]
                target[offset : offset + bounds[at + 1] - bounds[at]] = flat[bounds[at] : bounds[at + 1]]
        for name, flat in computed.items():
            if not np.isfinite(flat).all():
                self._note_nonfinite(name, places)

    def _note_nonfinite(self, name: str, places: Sequence[int]) -> None:
        for place in places:
            score = self._scores[place]
            numbers = np.atleast_1d(np.asarray(getattr(score, name)))
            broken = np.flatnonzero(~np.isfinite(numbers))
            if len(broken):
                at = f" at completion token {broken[0]}" if name in PER_TOKEN else ""
                got = f"{numbers[broken[0]]}{at}"
                error = FieldError(self._window[place].name, name, expected="finite numbers from the model", got=got)
                self._bad.setdefault(place, error)

    def before_first_error(self) -> Scores:
        """The scores up to the first rollout whose numbers are not finite: all of them when there is none."""
        return self._scores[: min(self._bad, default=len(self._window))]

    def good(self) -> Iterator[Scores]:
        """The scores of all rollouts but those of `errors`."""
        start = 0
        for place in [*sorted(self._bad), len(self._window)]:
            if place > start:
                yield self._scores[start:place]
            start = place + 1

    @property
    def errors(self) -> list[FieldError]:
        """Of rollouts whose numbers are not finite, in input order."""
        return [self._bad[place] for place in sorted(self._bad)]
