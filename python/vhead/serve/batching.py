"""Many requests as batches, scored one after the other: a bounded queue, and a thread that scores what waits in it.

While one batch is computed, requests gather for the next one, which takes as many of them as it holds. Only where
nothing was being computed does a request wait for company, and no longer than `max_wait_s`.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, groupby, islice
from math import ceil
from typing import Protocol

import numpy as np

from vhead.errors import RecordError, ServerBusyError, ServerStoppingError, VheadError
from vhead.rollouts import Rollout
from vhead.scoring.fields import Asked
from vhead.scoring.scores import Scores

logger = logging.getLogger("vhead.serve")

_LONGEST_RETRY_S = 60
# How much of the measured speed each batch replaces.
_NEW_SPEED = 0.25
# Of clients that are away, so many are remembered with what they have had.
_REMEMBERED_CLIENTS = 1024


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """How much may wait.

    Attributes:
        requests: Requests that are not yet, or not yet wholly, being computed.
        tokens: Tokens of their rollouts, prompts included.
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
        fill: The tokens that it was expected to take through the model, as a share of those that a batch may have.
        waited_s: Seconds for which its oldest request had waited.
    """

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


@dataclass(frozen=True, slots=True)
class _Run:
    """Consecutive rollouts of a request with one prompt, which fit into a batch together.

    Attributes:
        rollouts: At least one.
        prompt: Stands for the prompt.
        prompt_tokens: How many tokens it has.
        completion_tokens: How many tokens the completions have together.
    """

    rollouts: tuple[Rollout, ...]
    prompt: bytes
    prompt_tokens: int
    completion_tokens: int

    @property
    def tokens(self) -> int:
        return self.prompt_tokens * len(self.rollouts) + self.completion_tokens


# What may be scored together: by which model, what is asked for, and how many candidates each token has.
_Kind = tuple[str, Asked, int]


@dataclass(slots=True, eq=False)
class _Request:
    """The rollouts of one request, as far as they are not yet scored."""

    number: int
    client: str
    kind: _Kind
    runs: deque[_Run]
    arrived: float
    left: int
    parts: list[Scores] = field(default_factory=list)
    future: Future[Scores] = field(default_factory=Future)

    @property
    def tokens(self) -> int:
        """Of the rollouts that wait."""
        return sum(run.tokens for run in self.runs)


class _Queue:
    """The requests that wait. The client that has had the fewest tokens is next; those who come back are not ahead."""

    def __init__(self) -> None:
        self.requests: dict[int, _Request] = {}
        self.tokens = 0
        self._waiting: dict[tuple[str, _Kind], dict[int, _Request]] = {}
        self._alike: dict[tuple[_Kind, bytes], dict[int, _Request]] = {}
        self._had: dict[str, int] = {}
        self._least = 0

    def add(self, request: _Request) -> None:
        self.requests[request.number] = request
        self.tokens += request.tokens
        self._waiting.setdefault((request.client, request.kind), {})[request.number] = request
        self._had[request.client] = max(self._had.pop(request.client, 0), self._least)
        self._note_prompt(request)

    def remove(self, request: _Request) -> None:
        """Takes out what is left of a request; nothing where nothing waits any more."""
        if self.requests.pop(request.number, None) is None:
            return
        self.tokens -= request.tokens
        self._drop(self._waiting, (request.client, request.kind), request)
        if request.runs:
            self._drop(self._alike, (request.kind, request.runs[0].prompt), request)
        self._forget_clients()

    def take(self, room: int) -> tuple[list[tuple[_Request, _Run]], int]:
        """The next batch of one kind, and how many tokens it takes through the model."""
        kind = min(self._firsts(), key=lambda request: (self._had[request.client], request.number)).kind
        taken: list[tuple[_Request, _Run]] = []
        prompts: set[bytes] = set()
        cost = 0
        while request := self._next(kind):
            self._least = self._had[request.client]
            # Whoever asks about the same prompt comes along, as the prompt is computed anyway.
            alike = self._alike[kind, request.runs[0].prompt]
            company = (other for other in list(alike.values()) if other is not request)
            before = len(taken)
            for one in (request, *company):
                run = one.runs[0]
                own = run.completion_tokens + (0 if run.prompt in prompts else run.prompt_tokens)
                if taken and cost + own > room:
                    break
                taken.append((one, self._take_run(one, own)))
                prompts.add(run.prompt)
                cost += own
            if len(taken) == before:
                break
        return taken, cost

    def _firsts(self) -> Iterator[_Request]:
        return (next(iter(requests.values())) for requests in self._waiting.values())

    def _next(self, kind: _Kind) -> _Request | None:
        firsts = (request for request in self._firsts() if request.kind == kind)
        return min(firsts, key=lambda request: (self._had[request.client], request.number), default=None)

    def _take_run(self, request: _Request, cost: int) -> _Run:
        run = request.runs.popleft()
        self.tokens -= run.tokens
        self._had[request.client] += cost
        self._drop(self._alike, (request.kind, run.prompt), request)
        if request.runs:
            self._note_prompt(request)
        else:
            del self.requests[request.number]
            self._drop(self._waiting, (request.client, request.kind), request)
            self._forget_clients()
        return run

    def _note_prompt(self, request: _Request) -> None:
        self._alike.setdefault((request.kind, request.runs[0].prompt), {})[request.number] = request

    @staticmethod
    def _drop(index: dict, key: object, request: _Request) -> None:  # type: ignore[type-arg]  # either index
        del index[key][request.number]
        if not index[key]:
            del index[key]

    def _forget_clients(self) -> None:
        """Of the many that are away, those who have been away the longest are forgotten."""
        if len(self._had) > _REMEMBERED_CLIENTS + len(self.requests):
            present = {request.client for request in self.requests.values()}
            away = [client for client in self._had if client not in present]
            for client in islice(away, len(away) - _REMEMBERED_CLIENTS // 2):
                del self._had[client]


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
        self._queue = _Queue()
        self._changed = threading.Condition()
        self._numbers = count()
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

    def submit(self, rollouts: Sequence[Rollout], asked: Asked, *, client: str = "", model: str = "") -> Future[Scores]:
        """Queues rollouts of token ids.

        Args:
            rollouts: At least one; where one has candidates, all have, and as many for each token.
            asked: What is asked for of them.
            client: Who asks.
            model: Which model scores them.

        Returns:
            The scores, in order, with the rollouts' places in `rollouts` as their indices. Cancelling it takes out of
            the queue what is not being computed yet.

        Raises:
            ServerBusyError: There is no room in the queue.
            ServerStoppingError: The batcher is stopping.
        """
        first = rollouts[0].candidates
        kind = (model, asked, 0 if first is None else first.shape[1])
        runs = deque(_runs(rollouts, self.limits.batch_tokens))
        request = _Request(next(self._numbers), client, kind, runs, time.monotonic(), len(rollouts))
        tokens = request.tokens
        with self._changed:
            self.check_open()
            self._check_room(tokens)
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

    def _check_room(self, tokens: int) -> None:
        queue, limits = self._queue, self.limits
        if len(queue.requests) >= limits.requests:
            message = f"the queue is full: {limits.requests} requests wait; try again later"
        elif queue.requests and queue.tokens + tokens > limits.tokens:
            message = (
                f"the queue is full: {queue.tokens} tokens wait, and with this request's {tokens} there would be more "
                f"than {limits.tokens}; try again later"
            )
        else:
            return
        raise ServerBusyError(message, self.retry_after)

    def _withdraw(self, request: _Request) -> None:
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

    def _run_batch(self, taken: list[tuple[_Request, _Run]], cost: int) -> None:
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

    def _compute(self, taken: list[tuple[_Request, _Run]], cost: int) -> None:
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

    def _try(self, taken: list[tuple[_Request, _Run]]) -> ScoredBatch | None:
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

    def _deliver(self, taken: list[tuple[_Request, _Run]], outcome: ScoredBatch) -> None:
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


def _finish(request: _Request) -> None:
    with suppress(InvalidStateError):  # It was cancelled meanwhile.
        scores = Scores.concat(request.parts)
        request.future.set_result(replace(scores, indices=np.arange(len(scores))))


def _fail(request: _Request, error: Exception) -> None:
    with suppress(InvalidStateError):  # As above, or it has failed before.
        request.future.set_exception(error)


def _runs(rollouts: Sequence[Rollout], batch_tokens: int) -> Iterator[_Run]:
    """The rollouts as runs of one prompt, none of which has more tokens than a batch if it has two rollouts or more."""
    for prompt, group in groupby(rollouts, key=lambda rollout: np.asarray(rollout.prompt).tobytes()):
        run: list[Rollout] = []
        length = completions = 0
        for rollout in group:
            length, own = len(rollout.prompt), len(rollout.completion)
            if run and length + completions + own > batch_tokens:
                yield _Run(tuple(run), prompt, length, completions)
                run, completions = [], 0
            run.append(rollout)
            completions += own
        yield _Run(tuple(run), prompt, length, completions)
