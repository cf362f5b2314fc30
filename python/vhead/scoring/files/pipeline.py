"""From a file of rollouts to a file of scores."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice

from vhead.errors import RecordError
from vhead.rollouts.encoding import IdRegistry
from vhead.rollouts.fields import SIDES
from vhead.rollouts.files.opening import Reader
from vhead.rollouts.files.rows import Row
from vhead.rollouts.rollout import Rollout
from vhead.rollouts.wording import named
from vhead.scoring.advantages import AdvantageColumns
from vhead.scoring.files.journal import Journal
from vhead.scoring.files.output import Output
from vhead.scoring.files.pairs import Pairing, PairScores
from vhead.scoring.progress import ScoringProgress
from vhead.scoring.scorer import ErrorHandler, Scorer
from vhead.scoring.scores import Scores


def score_file(
    scorer: Scorer,
    reader: Reader,
    output: Output,
    *,
    returns: Sequence[str] | None,
    temperature: float,
    progress: ScoringProgress,
    top_logprobs: int = 0,
    advantages: AdvantageColumns | None = None,
    limit: int | None = None,
    on_error: ErrorHandler | None = None,
    unique_ids: bool = False,
) -> None:
    """Scores the records of a file in input order; each is written with its scores as soon as they are there.

    Args:
        scorer: The model.
        reader: The records.
        output: Where they go, begun.
        returns: As `Scorer.score`; None: what the checkpoint can give.
        temperature: Raw logits are divided by it before log-probabilities and entropies are taken.
        progress: Told of every batch that is computed.
        top_logprobs: How many of the likeliest tokens are wanted at each position.
        advantages: Which columns of advantages and returns are wanted besides; None: none.
        limit: Only the first so many records, those that an earlier run finished among them; None: all.
        on_error: Told of each record that cannot be scored or written, which is then left out; None: the first one is
            raised, after everything before it has been written.
        unique_ids: Whether a record whose id another one had cannot be scored.

    Raises:
        RecordError: A record cannot be scored or written, and `on_error` is None.
        ResumeError: The input does not begin with the records that an earlier run finished.
        FileFormatError: The file is broken.
        OSError: Reading or writing failed.
    """
    asked = scorer.asked(returns, temperature, top_logprobs)
    kept = [column.name for column in asked.columns]
    if advantages is not None:
        asked = replace(asked, returns=(*asked.returns, *advantages.needed))
    ids = IdRegistry() if unique_ids else None
    nothing = scorer.nothing(asked)
    reserved = [f"{name}{output.suffix}" for name in PairScores.of(nothing).columns]
    pairing = Pairing(reserved, () if advantages is None else advantages.columns)
    rows = RemainingRows(reader, limit, output.journal, ids, pairing)

    def on_batch(rollouts: int, tokens: int, computed: int) -> None:
        if rows.expected is not None:
            progress.expect(rows.expected * (len(SIDES) if pairing.is_of_pairs else 1))
        progress.advance(rollouts, tokens, computed)

    def check(row: Row, rollouts: Sequence[Rollout]) -> None:
        pairing.add(row, rollouts)
        if advantages is not None:
            advantages.check(row, rollouts[0].id)

    def finished(sources: Sequence[Row], scores: Scores) -> Scores | PairScores:
        return pairing.paired(scores if advantages is None else advantages.added(sources, scores, kept))

    for chunk in scorer.scored(rows, asked, on_error=on_error, on_batch=on_batch, ids=ids, check=check):
        output.write(chunk.sources, finished(chunk.sources, chunk.scores), chunk.last, on_error)
    output.publish(rows.last, finished([], nothing))


class RemainingRows:
    """The rows of a file that no earlier run has finished.

    Args:
        reader: The records.
        limit: Only the first so many records; None: all.
        journal: What an earlier run finished; None: nothing.
        ids: Told of the ids that are passed over; None: they are not read.
        pairing: Told of the records that are passed over, until it knows whether they are pairs.

    Attributes:
        last: The last row that was given.

    Raises:
        ResumeError: The limit is below what an earlier run finished.
    """

    def __init__(
        self, reader: Reader, limit: int | None, journal: Journal | None, ids: IdRegistry | None, pairing: Pairing
    ) -> None:
        self._reader = reader
        self._limit = limit
        self._journal = journal
        self._ids = ids
        self._pairing = pairing
        if journal is not None:
            journal.check_limit(limit)
        self._done = 0 if journal is None else journal.records
        self.last: Row | None = None

    @property
    def expected(self) -> float | None:
        """How many there are: an estimate from what was read so far, or None before that and for a pipe."""
        last, limit = self.last, self._limit
        if self._reader.size is None or last is None:
            return None if limit is None else limit - self._done
        expected = last.count * self._reader.size / last.position
        return (expected if limit is None else min(expected, limit)) - self._done

    def __iter__(self) -> Iterator[Row]:
        rows = iter(self._reader)
        if self._journal is not None:
            for row in self._journal.pass_over(rows):
                self._remember(row)
        remaining = None if self._limit is None else self._limit - self._done
        for row in islice(rows, remaining):
            self.last = row
            yield row

    def _remember(self, row: Row) -> None:
        """Remembers the id of a record that is done, if it has one that can be read, and whether it is a pair."""
        if self._ids is None and self._pairing.is_of_pairs is not None:
            return
        with suppress(RecordError):
            rollouts = row.rollouts()
            self._pairing.add(row, rollouts)
            if self._ids is not None:
                self._ids.add(rollouts[0].id, named(row.where, rollouts[0].id))
