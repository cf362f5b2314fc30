"""Many requests as batches, scored one after the other: a bounded queue, and a thread that scores what waits in it.

While one batch is computed, requests gather for the next one, which takes as many of them as it holds. Only where
nothing was being computed does a request wait for company, and no longer than `max_wait_s`.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, groupby
from math import ceil
from typing import Protocol

import numpy as np

from vhead.errors import RecordError, ServerBusyError, ServerStoppingError, VheadError
from vhead.rollouts import Rollout
from vhead.scoring.fields import Asked
from vhead.scoring.scores import Scores
from vhead.serve.queueing import Queue, QueuedRequest, Run, runs_of

logger = logging.getLogger("vhead.serve")

_LONGEST_RETRY_S = 60
# How much of the measured speed each batch replaces.
_NEW_SPEED = 0.25


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """How much may wait.

    Attributes:
        requests: Requests that are not yet, or not yet wholly, being computed.
        tokens: Tokens of their rollouts, prompts and candidates included: all that is held while they wait. Of the
            likeliest tokens that were asked for, nothing is there before the batch.
        batch_tokens: Tokens that a batch takes through the model, where shared prompts count once.
        max_wait_s: Seconds for which a request may wait for others to share its batch while nothing is computed.
    """

    requests: int = 1024
    tokens: int = 1_048_576
    batch_tokens: int = 8192
    max_wait_s: float = 0.002

    def __post_init__(self) -> None:
        for name in ("requests", "tokens", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 <= self.max_wait_s < threading.TIMEOUT_MAX:
            raise ValueError(f"max_wait_s: expected a number of seconds from 0 on, got {self.max_wait_s}")


@dataclass(frozen=True, slots=True)
class ScoredBatch:
    """What came of a batch.

    Attributes:
        scores: Of the rollouts that could be scored, in order.
        errors: What is wrong with the others, by their places in the batch.
        tokens: Tokens of the rollouts, prompts included.
        computed_tokens: Tokens that went through the model; fewer where rollouts shared some.
    """

    scores: Scores
    errors: Mapping[int, RecordError] = field(default_factory=dict)
    tokens: int = 0
    computed_tokens: int = 0


@dataclass(frozen=True, slots=True)
class BatchReport:
    """What is told of each batch: its rollouts, requests and tokens, how full it was, and how long it took.

    Attributes:
        number: How many there were before it.
        names: What its requests are called.
        fill: The tokens that it was expected to take through the model, as a share of those that a batch may have.
        waited_s: Seconds for which its oldest request had waited.
    """

    number: int
    names: tuple[str, ...]
    rollouts: int
    requests: int
    tokens: int
    computed_tokens: int
    fill: float
    seconds: float
    waited_s: float


class ScoreBatch(Protocol):
    """Scores rollouts together with one model, in the batcher's thread."""

    def __call__(self, model: str, rollouts: Sequence[Rollout], asked: Asked, /) -> ScoredBatch: ...


class Batcher:
    """Scores the rollouts of many requests in one thread, those with one prompt together.

    Of several clients, each gets as many tokens computed as the others while it has requests, however many it sends.

    Args:
        score: Scores a batch. Where it fails as a whole, each request of the batch is tried by itself.
        limits: How much may wait, and how much is computed at once.
        on_batch: Told of each batch, in the thread.
    """

    def __init__(
        self,
        score: ScoreBatch,
        limits: QueueLimits | None = None,
        *,
        on_batch: Callable[[BatchReport], None] | None = None,
    ) -> None:
        self.limits = limits or QueueLimits()
        self._score = score
        self._on_batch = on_batch
        self._queue = Queue()
        self._changed = threading.Condition()
        self._numbers = count()
        self._batches = count()
        self._calls: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._stopping = False
        self._speed = 0.0
        self._thread = threading.Thread(target=self._work, name="vhead-batcher", daemon=True)
        self._thread.start()

    @property
    def queued_requests(self) -> int:
        """How many requests wait."""
        return len(self._queue.requests)

    @property
    def queued_tokens(self) -> int:
        """How many tokens their rollouts have."""
        return self._queue.tokens

    @property
    def alive(self) -> bool:
        """Whether what is submitted will be scored."""
        return self._thread.is_alive() and not self._stopping

    @property
    def retry_after(self) -> int:
        """Whole seconds until what waits now has been computed, by the speed so far; 1 to 60."""
        seconds = self.queued_tokens / self._speed if self._speed else 1.0
        return min(max(ceil(seconds), 1), _LONGEST_RETRY_S)

    def submit(
        self, rollouts: Sequence[Rollout], asked: Asked, *, client: str = "", model: str = "", name: str = ""
    ) -> Future[Scores]:
        """Queues rollouts of token ids.

        Args:
            rollouts: At least one; where one has candidates, all have, and as many for each token.
            asked: What is asked for of them.
            client: Who asks.
            model: Which model scores them.
            name: What reports call the request.

        Returns:
            The scores, in order, with the rollouts' places in `rollouts` as their indices. Cancelling it takes out of
            the queue what is not being computed yet.

        Raises:
            ServerBusyError: There is no room in the queue.
            ServerStoppingError: The batcher is stopping.
        """
        first = rollouts[0].candidates
        kind = (model, asked, 0 if first is None else first.shape[1])
        runs = deque(runs_of(rollouts, self.limits.batch_tokens))
        request = QueuedRequest(next(self._numbers), client, kind, runs, time.monotonic(), len(rollouts), name)
        tokens = request.tokens + request.candidates
        with self._changed:
            self.check_open()
            self.check_room(tokens)
            self._queue.add(request)
            self._changed.notify_all()
        request.future.add_done_callback(lambda future: self._withdraw(request) if future.cancelled() else None)
        return request.future

    def call(self, work: Callable[[], None]) -> Future[None]:
        """Has something done in the thread that scores, between two batches, before any that waits.

        Raises:
            ServerStoppingError: The batcher is stopping.
        """
        future: Future[None] = Future()
        with self._changed:
            self.check_open()
            self._calls.append((work, future))
            self._changed.notify_all()
        return future

    def check_open(self) -> None:
        """Checks that requests are taken.

        Raises:
            ServerStoppingError: The batcher is stopping.
        """
        if not self.alive:
            raise ServerStoppingError("the server is stopping and takes no more requests")

    def check_room(self, tokens: int = 0) -> None:
        """Checks that a request of so many tokens, with candidates, would be taken now.

        Raises:
            ServerBusyError: There is no room in the queue.
        """
        queue, limits = self._queue, self.limits
        waiting = queue.tokens + queue.candidates
        if len(queue.requests) >= limits.requests:
            message = f"the queue is full: {limits.requests} requests wait; try again later"
        elif queue.requests and waiting + tokens > limits.tokens:
            message = (
                f"the queue is full: {waiting} tokens wait, with candidates, and with this request's {tokens} there "
                f"would be more than {limits.tokens}; try again later"
            )
        else:
            return
        raise ServerBusyError(message, self.retry_after)

    def _withdraw(self, request: QueuedRequest) -> None:
        with self._changed:
            self._queue.remove(request)

    def stop(self, timeout_s: float | None = None) -> bool:
        """Takes no more requests, scores those that wait, and ends the thread.

        Args:
            timeout_s: After so many seconds, what still waits fails; None: it may take as long as it takes.

        Returns:
            Whether all that had been accepted was scored.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        with self._changed:
            left = list(self._queue.requests.values())
            for request in left:
                self._queue.remove(request)
        for request in left:
            _fail(request, ServerStoppingError("the server has stopped before this request's turn"))
        return not left and not self._thread.is_alive()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            job()

    def _next(self) -> Callable[[], None] | None:
        """Waits for something to do, and takes it; None: there is nothing, and nothing will come."""
        with self._changed:
            while True:
                if self._calls:
                    return partial(_run, *self._calls.popleft())
                if self._queue.requests and not self._waits_for_company():
                    return partial(self._run_batch, *self._queue.take(self.limits.batch_tokens))
                if not self._queue.requests:
                    if self._stopping:
                        return None
                    self._changed.wait()

    def _run_batch(self, taken: list[tuple[QueuedRequest, Run]], cost: int) -> None:
        try:
            self._compute(taken, cost)
        except Exception:  # A defect here must not end the only thread that scores.
            logger.exception("a batch failed")
            for request, _ in taken:
                _fail(request, VheadError("the server failed inside while it scored this request"))

    def _waits_for_company(self) -> bool:
        """Whether the batch is not to begin yet; where it may become fuller, this waits once for a change."""
        first = next(iter(self._queue.requests.values()))
        left = first.arrived + self.limits.max_wait_s - time.monotonic()
        if left <= 0 or self._stopping or self._queue.tokens >= self.limits.batch_tokens:
            return False
        self._changed.wait(left)
        return True

    def _compute(self, taken: list[tuple[QueuedRequest, Run]], cost: int) -> None:
        # Runs of one request stand one after the other, so that its scores are one slice.
        taken = sorted(taken, key=lambda entry: entry[0].number)
        started = time.monotonic()
        outcome = self._try(taken)
        if outcome is None:
            return
        seconds = max(time.monotonic() - started, 1e-9)
        self._speed += (outcome.tokens / seconds - self._speed) * (_NEW_SPEED if self._speed else 1.0)
        requests = [request for request, _ in groupby(taken, key=lambda entry: entry[0])]
        if self._on_batch is not None:
            self._on_batch(
                BatchReport(
                    number=next(self._batches),
                    names=tuple(request.name for request in requests),
                    rollouts=sum(len(run.rollouts) for _, run in taken),
                    requests=len(requests),
                    tokens=outcome.tokens,
                    computed_tokens=outcome.computed_tokens,
                    fill=cost / self.limits.batch_tokens,
                    seconds=seconds,
                    waited_s=started - min(request.arrived for request in requests),
                )
            )
        self._deliver(taken, outcome)

    def _try(self, taken: list[tuple[QueuedRequest, Run]]) -> ScoredBatch | None:
        """Scores a batch; where that fails, each request by itself, so that one does not cost the others theirs."""
        rollouts = [rollout for _, run in taken for rollout in run.rollouts]
        try:
            model, asked, _ = taken[0][0].kind
            return self._score(model, rollouts, asked)
        except Exception as error:  # Whatever torch raises, such as for memory.
            alone = [list(entries) for _, entries in groupby(taken, key=lambda entry: entry[0].number)]
            if len(alone) == 1:
                logger.exception("a request of %d rollouts failed", len(rollouts))
                with self._changed:
                    self._queue.remove(taken[0][0])
                _fail(taken[0][0], error)
                return None
            logger.warning("a batch of %d requests failed, and each is tried by itself: %s", len(alone), error)
        for entries in alone:
            outcome = self._try(entries)
            if outcome is not None:
                self._deliver(entries, outcome)
        return None

    def _deliver(self, taken: list[tuple[QueuedRequest, Run]], outcome: ScoredBatch) -> None:
        place = good = 0
        for request, entries in groupby(taken, key=lambda entry: entry[0]):
            size = sum(len(run.rollouts) for _, run in entries)
            errors = [outcome.errors[at] for at in range(place, place + size) if at in outcome.errors]
            scores = outcome.scores[good : good + size - len(errors)]
            place, good = place + size, good + len(scores)
            if errors:
                with self._changed:
                    self._queue.remove(request)
                _fail(request, errors[0])
            else:
                request.parts.append(scores)
                request.left -= size
                if not request.left:
                    _finish(request)


def _run(work: Callable[[], None], future: Future[None]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        work()
    except Exception as error:  # It goes to whoever asked for it.
        future.set_exception(error)
    else:
        future.set_result(None)


def _finish(request: QueuedRequest) -> None:
    with suppress(InvalidStateError):  # It was cancelled meanwhile.
        scores = Scores.concat(request.parts)
        request.future.set_result(replace(scores, indices=np.arange(len(scores))))


def _fail(request: QueuedRequest, error: Exception) -> None:
    with suppress(InvalidStateError):  # As above, or it has failed before.
        request.future.set_exception(error)
