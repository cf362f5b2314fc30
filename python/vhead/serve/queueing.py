"""Requests that wait to be scored: what shares a batch, and whose turn it is."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import groupby, islice

import numpy as np

from vhead.rollouts import Rollout
from vhead.scoring.fields import Asked
from vhead.scoring.scores import Scores

# Of clients that are away, so many are remembered with what they have had.
_REMEMBERED_CLIENTS = 1024
# Of the requests that came since the oldest one that waits, the first of so many parts may come along out of turn. What
# overtakes a request is then at most a third of what came after it, and so at most half as many as may wait.
_PARTS = 3


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive rollouts of a request with one prompt, which fit into a batch together.

    Attributes:
        rollouts: At least one.
        prompt: Stands for the prompt.
        prompt_tokens: How many tokens it has.
        completion_tokens: How many tokens the completions have together.
        candidates: How many token ids of candidates they have together.
    """

    rollouts: tuple[Rollout, ...]
    prompt: bytes
    prompt_tokens: int
    completion_tokens: int
    candidates: int

    @property
    def tokens(self) -> int:
        """Of all its rollouts, prompts included."""
        return self.prompt_tokens * len(self.rollouts) + self.completion_tokens


# What may be scored together: by which model, what is asked for, and how many candidates each token has.
Kind = tuple[str, Asked, int]


@dataclass(slots=True, eq=False)
class QueuedRequest:
    """The rollouts of one request, as far as they are not yet scored."""

    number: int
    client: str
    kind: Kind
    runs: deque[Run]
    arrived: float
    left: int
    name: str = ""
    parts: list[Scores] = field(default_factory=list)
    future: Future[Scores] = field(default_factory=Future)

    @property
    def tokens(self) -> int:
        """Of the rollouts that wait."""
        return sum(run.tokens for run in self.runs)

    @property
    def candidates(self) -> int:
        """Of the rollouts that wait."""
        return sum(run.candidates for run in self.runs)


class Queue:
    """The requests that wait. The client that has had the fewest tokens is next; those who come back are not ahead.

    Requests about a prompt that is computed anyway come along out of turn, but no more than half as many as may wait
    overtake any other one.
    """

    def __init__(self) -> None:
        self.requests: dict[int, QueuedRequest] = {}
        self.tokens = self.candidates = 0
        self._waiting: dict[tuple[str, Kind], dict[int, QueuedRequest]] = {}
        self._alike: dict[tuple[Kind, bytes], dict[int, QueuedRequest]] = {}
        self._had: dict[str, int] = {}
        self._least = 0

    def add(self, request: QueuedRequest) -> None:
        self.requests[request.number] = request
        self.tokens += request.tokens
        self.candidates += request.candidates
        self._waiting.setdefault((request.client, request.kind), {})[request.number] = request
        self._had[request.client] = max(self._had.pop(request.client, 0), self._least)
        self._note_prompt(request)

    def remove(self, request: QueuedRequest) -> None:
        """Takes out what is left of a request; nothing where nothing waits any more."""
        if self.requests.pop(request.number, None) is None:
            return
        self.tokens -= request.tokens
        self.candidates -= request.candidates
        self._drop(self._waiting, (request.client, request.kind), request)
        if request.runs:
            self._drop(self._alike, (request.kind, request.runs[0].prompt), request)
        self._forget_clients()

    def take(self, room: int) -> tuple[list[tuple[QueuedRequest, Run]], int]:
        """The next batch of one kind, and how many tokens it takes through the model."""
        kind = min(self._firsts(), key=lambda request: (self._had[request.client], request.number)).kind
        taken: list[tuple[QueuedRequest, Run]] = []
        prompts: set[bytes] = set()
        cost = 0
        oldest = next(iter(self.requests))
        last = oldest + (next(reversed(self.requests)) - oldest) // _PARTS
        while request := self._next(kind):
            self._least = self._had[request.client]
            company = self._company(request, last)
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

    def _company(self, request: QueuedRequest, last: int) -> list[QueuedRequest]:
        """Who asks about the same prompt, which is computed anyway; nobody who came after the one of this number."""
        alike = self._alike[request.kind, request.runs[0].prompt]
        return [other for other in alike.values() if other is not request and other.number <= last]

    def _firsts(self) -> Iterator[QueuedRequest]:
        return (next(iter(requests.values())) for requests in self._waiting.values())

    def _next(self, kind: Kind) -> QueuedRequest | None:
        firsts = (request for request in self._firsts() if request.kind == kind)
        return min(firsts, key=lambda request: (self._had[request.client], request.number), default=None)

    def _take_run(self, request: QueuedRequest, cost: int) -> Run:
        run = request.runs.popleft()
        self.tokens -= run.tokens
        self.candidates -= run.candidates
        self._had[request.client] += cost
        self._drop(self._alike, (request.kind, run.prompt), request)
        if request.runs:
            self._note_prompt(request)
        else:
            del self.requests[request.number]
            self._drop(self._waiting, (request.client, request.kind), request)
            self._forget_clients()
        return run

    def _note_prompt(self, request: QueuedRequest) -> None:
        self._alike.setdefault((request.kind, request.runs[0].prompt), {})[request.number] = request

    @staticmethod
    def _drop(index: dict, key: object, request: QueuedRequest) -> None:  # type: ignore[type-arg]  # either index
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


def runs_of(rollouts: Sequence[Rollout], batch_tokens: int) -> Iterator[Run]:
    """The rollouts as runs of one prompt, none of which has more tokens than a batch if it has two rollouts or more."""
    for prompt, group in groupby(rollouts, key=lambda rollout: np.asarray(rollout.prompt).tobytes()):
        run: list[Rollout] = []
        length = completions = candidates = 0
        for rollout in group:
            length, own = len(rollout.prompt), len(rollout.completion)
            if run and length + completions + own > batch_tokens:
                yield Run(tuple(run), prompt, length, completions, candidates)
                run, completions, candidates = [], 0, 0
            run.append(rollout)
            completions += own
            candidates += 0 if rollout.candidates is None else rollout.candidates.size
        yield Run(tuple(run), prompt, length, completions, candidates)
