"""The batches of a chunk on the device: what one gave is read back after the next one is queued."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic

from torch import nn

from vhead.rollouts.encoding import Encoded
from vhead.scoring.chunks import Results, Sourced
from vhead.scoring.engine import Engine, Queued, Work
from vhead.scoring.fields import Asked
from vhead.scoring.following import Following
from vhead.sync.swapping import TURNS

BatchHandler = Callable[[int, int, int], None]


@dataclass(frozen=True, slots=True, eq=False)
class Chunk(Generic[Sourced]):
    """Consecutive rollouts, ready for the model.

    Attributes:
        sources: Where they come from.
        rollouts: In input order, those of a source one after the other.
        work: Their batches.
        failure: What ended the input after them.
    """

    sources: list[Sourced]
    rollouts: list[Encoded]
    work: list[Work]
    failure: Exception | None


class Underway(Generic[Sourced]):
    """A chunk while it is computed.

    Args:
        engine: Computes its batches.
        model: The engine's model.
        chunk: The chunk.
        asked: What is asked for.
        results: Where its scores go.
        following: Keeps the model's weights; None: they stay.
        on_batch: Told of each batch that has been read back.

    Attributes:
        chunk: The chunk.
        computes_behind: Whether the device computes while the host goes on.
    """

    def __init__(
        self,
        engine: Engine,
        model: nn.Module,
        chunk: Chunk[Sourced],
        asked: Asked,
        results: Results,
        following: Following | None,
        on_batch: BatchHandler | None,
    ) -> None:
        self.chunk = chunk
        # New weights come in where no batch is underway.
        self.computes_behind = engine.computes_behind and following is None
        self._engine, self._model, self._following = engine, model, following
        self._asked, self._results, self._on_batch = asked, results, on_batch
        self._waiting = iter(chunk.work)
        self._before: tuple[Work, Queued] | None = None

    def queue(self, count: int) -> None:
        """Queues up to so many more batches: where the device computes behind, each before the last one is read."""
        for _, work in zip(range(count), self._waiting, strict=False):
            if self._following is not None:
                if self._following.refresh(self._model):
                    # What was kept of shared tokens is of the old weights.
                    self._engine.forget()
                self._results.stamp(work.batch.places, self._following.step)
            with TURNS.reading():
                queued = self._engine.score(self.chunk.rollouts, work, self._asked)
            self._read_back()
            self._before = work, queued
            if not self.computes_behind:
                self._read_back()

    def finish(self) -> Results:
        """Computes what is left, and gives the scores of all rollouts."""
        self.queue(len(self.chunk.work))
        self._read_back()
        self._engine.forget()
        return self._results

    def _read_back(self) -> None:
        if self._before is None:
            return
        (work, queued), self._before = self._before, None
        batch, rollouts = work.batch, self.chunk.rollouts
        with TURNS.reading():
            self._results.put(batch.places, queued.fields())
        if self._on_batch is not None:
            self._on_batch(len(batch.places), sum(len(rollouts[place]) for place in batch.places), batch.tokens)
