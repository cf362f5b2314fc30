"""Whose turn it is, with batches in place of a clock: how far a shared prompt lets requests overtake others."""

import random
from collections import deque
from collections.abc import Callable
from itertools import accumulate

import pytest

from vhead import Rollout
from vhead.scoring.fields import Asked
from vhead.serve import queueing
from vhead.serve.queueing import Queue, QueuedRequest, runs_of

KIND = ("", Asked(("reward",)), 0)
SEEDS = range(5)


class Simulation:
    """A queue that is full whenever a batch is taken, as under too much load.

    Attributes:
        batches: The numbers of the requests in each batch, which are numbered as they came.
        came: How many batches had been taken when each of them came.
        tokens: How many tokens the batches took through the model.
    """

    def __init__(
        self, prompts: Callable[[int], int], *, waiting: int, room: int, lengths: tuple[int, int], batches: int
    ) -> None:
        self.queue, self.batches, self.came, self.tokens = Queue(), [], [], 0
        self._room, self._lengths, self._prompts = room, lengths, prompts
        for _ in range(batches):
            self._fill(waiting)
            taken, cost = self.queue.take(room)
            self.batches.append([request.number for request, _ in taken])
            self.tokens += cost

    def _fill(self, waiting: int) -> None:
        while len(self.queue.requests) < waiting:
            number = len(self.came)
            prompt, completion = self._lengths
            rollouts = [Rollout([5 + self._prompts(number)] * prompt, [7] * completion)]
            runs = deque(runs_of(rollouts, self._room))
            self.queue.add(QueuedRequest(number, "one client", KIND, runs, arrived=0.0, left=1))
            self.came.append(len(self.batches))

    @property
    def tokens_a_request(self) -> float:
        return self.tokens / sum(map(len, self.batches))

    def overtaken(self) -> int:
        """The most requests of earlier batches that came after a request."""
        batch_of = {number: at for at, batch in enumerate(self.batches) for number in batch}
        return max(
            sum(other > number for batch in self.batches[self.came[number] : at] for other in batch)
            for number, at in batch_of.items()
        )

    def waited(self) -> int:
        """The most requests that were answered from when one came until its own answer."""
        answered = [0, *accumulate(map(len, self.batches))]
        # The batch that was being computed when it came is one of them.
        return max(
            answered[at + 1] - answered[max(self.came[number] - 1, 0)]
            for at, batch in enumerate(self.batches)
            for number in batch
        )


def some_of(count: int, seed: int) -> Callable[[int], int]:
    rng = random.Random(seed)
    return lambda number: rng.randrange(count)


def unlike_then_alike(number: int) -> int:
    """The worst for request 59: all before it have prompts about which everybody after it asks."""
    return number if number < 60 else number % 59


@pytest.fixture(params=[queueing._PARTS, 1], ids=["as it is", "without the bound"])
def is_bounded(request, monkeypatch):
    monkeypatch.setattr(queueing, "_PARTS", request.param)
    return request.param > 1


def test_a_request_is_overtaken_by_half_as_many_as_may_wait_at_most(is_bounded):
    setting = {"waiting": 200, "room": 150, "lengths": (20, 10), "batches": 200}
    runs = [Simulation(some_of(20, seed), **setting) for seed in SEEDS]
    runs += [Simulation(some_of(60, seed), **setting) for seed in SEEDS]
    runs.append(Simulation(unlike_then_alike, **setting))
    assert max(run.overtaken() for run in runs) > 0
    assert all(run.overtaken() <= 100 for run in runs) == is_bounded


def test_nobody_waits_longer_than_the_queue_and_two_batches(is_bounded):
    """The soak's queue, batches, prompts and bound, with time counted in answers."""
    runs = [Simulation(some_of(6, seed), waiting=32, room=2048, lengths=(24, 80), batches=300) for seed in SEEDS]
    assert all(run.waited() <= 32 + 2 * 25 for run in runs) == is_bounded


def test_prompts_are_shared_though_the_queue_is_deep(monkeypatch):
    setting = {"waiting": 500, "room": 2000, "lengths": (100, 10), "batches": 100}
    shared = Simulation(some_of(60, 0), **setting).tokens_a_request
    monkeypatch.setattr(queueing, "_PARTS", 10**9)
    in_turn = Simulation(some_of(60, 0), **setting).tokens_a_request
    monkeypatch.setattr(queueing, "_PARTS", 1)
    most = Simulation(some_of(60, 0), **setting).tokens_a_request
    assert most < shared < (most + in_turn) / 2
