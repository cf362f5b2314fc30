"""A scorer as what the batcher calls."""

from collections.abc import Sequence
from dataclasses import dataclass

from vhead.errors import RecordError
from vhead.rollouts import Rollout
from vhead.rollouts.wording import named
from vhead.scoring.fields import Asked
from vhead.scoring.scorer import Scorer
from vhead.scoring.scores import Scores
from vhead.serve.batching import ScoredBatch


@dataclass(frozen=True, slots=True, eq=False)
class _Queued:
    """A rollout of a batch, and its place there."""

    place: int
    rollout: Rollout

    @property
    def where(self) -> str:
        return f"rollout {self.place} of a batch"

    def rollouts(self) -> tuple[Rollout]:
        return (self.rollout,)


class ScorerBatches:
    """Scores batches of rollouts with a scorer.

    Args:
        scorer: It is used in one thread at a time.
    """

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    def __call__(self, rollouts: Sequence[Rollout], asked: Asked) -> ScoredBatch:
        """Scores the rollouts that can be scored; errors name the others by their ids alone."""
        queued = [_Queued(place, rollout) for place, rollout in enumerate(rollouts)]
        places = {named(entry.where, entry.rollout.id): entry.place for entry in queued}
        errors: dict[int, RecordError] = {}
        counts = [0, 0]

        def note(error: RecordError) -> None:
            errors[places[str(error.record)]] = error

        def add(_rollouts: int, tokens: int, computed: int) -> None:
            counts[0] += tokens
            counts[1] += computed

        parts = [chunk.scores for chunk in self._scorer.scored(queued, asked, on_error=note, on_batch=add)]
        scores = Scores.concat(parts or [self._scorer.nothing(asked)])
        return ScoredBatch(scores, errors, *counts)
