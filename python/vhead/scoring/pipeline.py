"""From a file of rollouts to a file of scores."""

from collections.abc import Iterator, Sequence
from itertools import islice

from vhead.errors import RecordError, ResumeError
from vhead.scoring.files import OutputFile, Reader
from vhead.scoring.journal import Journal
from vhead.scoring.progress import ScoringProgress
from vhead.scoring.rollout import Rollout
from vhead.scoring.rows import Row
from vhead.scoring.scorer import ErrorHandler, Scorer
from vhead.scoring.scores import Scores


def score_file(
    scorer: Scorer,
    reader: Reader,
    output: OutputFile,
    *,
    returns: Sequence[str],
    temperature: float,
    progress: ScoringProgress,
    limit: int | None = None,
    on_error: ErrorHandler | None = None,
) -> None:
    """Scores the records of a file in input order; each is written with its scores as soon as they are there.

    Args:
        scorer: The model.
        reader: The records.
        output: Where they go.
        returns: Some of values, logprobs, entropy, reward.
        temperature: Raw logits are divided by it before log-probabilities and entropies are taken.
        progress: Told of every batch that is computed, and of truncated rollouts.
        limit: Only the first so many records, those that an earlier run finished among them; None: all.
        on_error: Told of each record that cannot be scored, which is then left out; None: the first one is raised,
            after everything before it has been written.

    Raises:
        RecordError: A record cannot be scored, and `on_error` is None.
        ResumeError: The input does not begin with the records that an earlier run finished.
        FileFormatError: The file is broken.
        OSError: Reading or writing failed.
    """
    waiting = WaitingRows(reader, limit, output.done)

    def on_batch(rollouts: int, tokens: int, computed: int) -> None:
        if waiting.expected is not None:
            progress.expect(waiting.expected)
        progress.advance(rollouts, tokens, computed)

    for scores in scorer.windows(
        waiting.rollouts(), returns, temperature, on_error=on_error, on_batch=on_batch, name_of=waiting.name_of
    ):
        if scores.truncated is not None:
            progress.truncated += int(scores.truncated.sum())
        output.write(waiting.take(scores), scores, waiting.done)


class WaitingRows:
    """Rows that were read and whose scores are not there yet, by the index of their rollout.

    Args:
        reader: The records.
        limit: Only the first so many records; None: all.
        earlier: What an earlier run finished; these records are passed over.

    Attributes:
        done: How many records are done, up to the last one that was taken.
    """

    def __init__(self, reader: Reader, limit: int | None, earlier: Journal | None = None) -> None:
        self._reader = reader
        self._limit = limit
        self._earlier = earlier
        self._skipped = 0 if earlier is None else earlier.records
        self.done = self._skipped
        self._rows: dict[int, Row] = {}
        self._read = 0
        self._position = 0

    @property
    def expected(self) -> float | None:
        """How many records there are: an estimate from what was read so far, or None before that and for a pipe."""
        if self._reader.size is None or not self._position:
            return None if self._limit is None else self._limit - self._skipped
        expected = self._read * self._reader.size / self._position
        return (expected if self._limit is None else min(expected, self._limit)) - self._skipped

    def rollouts(self) -> Iterator[Rollout | RecordError]:
        """The rows' rollouts, and the errors of rows that hold none."""
        rows = iter(self._reader)
        self._pass_over(rows)
        remaining = None if self._limit is None else max(self._limit - self._skipped, 0)
        for index, row in enumerate(islice(rows, remaining)):
            self._read, self._position = self._skipped + index + 1, row.position
            try:
                rollout = row.rollout()
            except RecordError as error:
                yield error
            else:
                self._rows[index] = row
                yield rollout

    def _pass_over(self, rows: Iterator[Row]) -> None:
        """Passes over the records that are done, of which the last one must be the one that it was."""
        if self._earlier is None:
            return
        last = next(islice(rows, self._skipped - 1, None), None)
        if last is None or last.digest() != self._earlier.last_record:
            found = "the end of the input" if last is None else f"another one at {last.where}"
            raise ResumeError(
                f"record {self._skipped}: expected the last record that the earlier run finished, got {found}"
            )

    def name_of(self, index: int, rollout: Rollout) -> str:
        """What errors call a rollout: its place in the file, and its id where it has one."""
        where = self._rows[index].where
        return where if rollout.id is None else f"{where} (id {rollout.id!r})"

    def take(self, scores: Scores) -> list[Row]:
        """The rows of these rollouts, which wait no more, and neither do rows before them that got no scores."""
        indices = scores.indices.tolist()
        rows = [self._rows[index] for index in indices]
        self.done = self._skipped + indices[-1] + 1
        # A copy of the keys, as the next rows are read in another thread.
        for index in [index for index in list(self._rows) if index <= indices[-1]]:
            del self._rows[index]
        return rows
