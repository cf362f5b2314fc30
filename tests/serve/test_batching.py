"""Many requests as batches: what shares one, whose turn it is, what happens when there is no room, or nobody waits."""

import threading
import time
from concurrent.futures import CancelledError, Future, wait

import numpy as np
import pytest

from vhead import Rollout, Scores
from vhead.errors import FieldError, ServerBusyError, ServerStoppingError, VheadError
from vhead.scoring.fields import Asked
from vhead.serve.batching import Batcher, BatchReport, QueueLimits, ScoredBatch

REWARD = Asked(("reward",))
PATIENCE_S = 20


def rollout(*completion: int, prompt: tuple[int, ...] = (1, 2), id: str | None = None, candidates=None) -> Rollout:
    return Rollout(list(prompt), list(completion), id, candidates=candidates)


def expected(rollout: Rollout) -> float:
    return float((rollout.prompt * 1000).sum() + rollout.completion.sum())


class Model:
    """Stands in for a scorer: a reward is a sum of tokens. It can be held up, and fails where it is told to."""

    def __init__(self) -> None:
        self.batches: list[list[Rollout]] = []
        self.asked: list[Asked] = []
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Event()
        self.broken: set[int] = set()
        self.fatal: set[int] = set()

    def __call__(self, model, rollouts, asked) -> ScoredBatch:
        self.batches.append(list(rollouts))
        self.asked.append(asked)
        self.entered.set()
        assert self.open.wait(PATIENCE_S)
        if any(int(rollout.completion[0]) in self.fatal for rollout in rollouts):
            raise MemoryError("no memory")
        errors = {
            place: FieldError(rollout.id, "reward", expected="finite numbers from the model", got="nan")
            for place, rollout in enumerate(rollouts)
            if int(rollout.completion[0]) in self.broken
        }
        good = [rollout for place, rollout in enumerate(rollouts) if place not in errors]
        tokens = sum(len(rollout.prompt) + len(rollout.completion) for rollout in rollouts)
        return ScoredBatch(scores_of(good), errors, tokens, tokens)

    def hold(self, batcher: Batcher) -> Future:
        """Occupies the thread with a rollout of its own, so that what comes next gathers in the queue."""
        self.open.clear()
        self.entered.clear()
        future = batcher.submit([rollout(1, prompt=(99,))], REWARD)
        assert self.entered.wait(PATIENCE_S)
        return future


def scores_of(rollouts: list[Rollout]) -> Scores:
    lengths = np.array([len(rollout.completion) for rollout in rollouts], np.int64)
    return Scores(
        ids=tuple(rollout.id for rollout in rollouts),
        indices=np.arange(len(rollouts)),
        prompt_lengths=np.array([len(rollout.prompt) for rollout in rollouts], np.int64),
        offsets=np.concatenate([[0], lengths.cumsum()]).astype(np.int64),
        computed={"reward": np.array([expected(rollout) for rollout in rollouts], np.float32)},
    )


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def make(model):
    """Batchers, which are stopped at the end."""
    made = []

    def make(on_batch=None, **limits) -> Batcher:
        made.append(Batcher(model, QueueLimits(**limits), on_batch=on_batch))
        return made[-1]

    yield make
    model.open.set()
    for batcher in made:
        assert batcher.stop(PATIENCE_S)


def rewards(future: Future) -> list[float]:
    return future.result(PATIENCE_S).reward.tolist()


def first_tokens(batch: list[Rollout]) -> list[int]:
    return [int(rollout.completion[0]) for rollout in batch]


def test_each_request_gets_its_own_scores_in_its_own_order(model, make):
    batcher = make()
    held = model.hold(batcher)
    rng = np.random.default_rng(0)
    requests = [
        [rollout(*rng.integers(0, 50, 3), prompt=tuple(rng.integers(0, 3, 1)), id=f"{n}.{m}") for m in range(1 + n % 4)]
        for n in range(40)
    ]
    futures = [batcher.submit(request, REWARD, client=f"client {n % 3}") for n, request in enumerate(requests)]
    model.open.set()
    held.result(PATIENCE_S)
    for request, future in zip(requests, futures, strict=True):
        scores = future.result(PATIENCE_S)
        assert scores.reward.tolist() == [expected(rollout) for rollout in request]
        assert scores.ids == tuple(rollout.id for rollout in request)
        assert scores.indices.tolist() == list(range(len(request)))


def test_requests_that_gathered_are_one_batch(model, make):
    batcher = make()
    model.hold(batcher)
    futures = [batcher.submit([rollout(n)], REWARD) for n in range(10)]
    model.open.set()
    wait(futures, PATIENCE_S)
    assert [len(batch) for batch in model.batches] == [1, 10]


def test_an_idle_server_waits_for_company_as_long_as_it_is_told(model, make):
    batcher = make(max_wait_s=PATIENCE_S, batch_tokens=12)
    futures = [batcher.submit([rollout(n, prompt=(n, n))], REWARD) for n in range(4)]
    wait(futures, PATIENCE_S)
    assert [first_tokens(batch) for batch in model.batches] == [[0, 1, 2, 3]]


def test_a_request_without_company_is_computed_after_the_wait(model, make):
    batcher = make(max_wait_s=0.01)
    assert rewards(batcher.submit([rollout(5)], REWARD)) == [3005.0]


def test_one_prompt_s_requests_share_a_batch_though_others_came_between(model, make):
    """All but the last one, which came too long after those that it would overtake."""
    batcher = make(batch_tokens=6)
    model.hold(batcher)
    prompts = [7, 8, 7, 9, 10, 11, 7]
    futures = [batcher.submit([rollout(n, prompt=(prompt,) * 3)], REWARD) for n, prompt in enumerate(prompts)]
    model.open.set()
    wait(futures, PATIENCE_S)
    assert [first_tokens(batch) for batch in model.batches[1:]] == [[0, 2], [1], [3], [4], [5], [6]]


def test_a_batch_holds_as_many_tokens_as_it_may(model, make):
    reports: list[BatchReport] = []
    batcher = make(batch_tokens=10, on_batch=reports.append)
    model.hold(batcher)
    futures = [batcher.submit([rollout(n, n, n, prompt=(n, n))], REWARD) for n in range(5)]
    model.open.set()
    wait(futures, PATIENCE_S)
    assert [len(batch) for batch in model.batches[1:]] == [2, 2, 1]
    assert [report.fill for report in reports] == [0.2, 1.0, 1.0, 0.5]
    assert [report.requests for report in reports] == [1, 2, 2, 1]
    assert all(report.seconds > 0 and report.waited_s >= 0 for report in reports)


def test_a_request_larger_than_a_batch_is_computed_in_several(model, make):
    batcher = make(batch_tokens=8)
    group = [rollout(n, n) for n in range(10)]
    assert rewards(batcher.submit(group, REWARD)) == [expected(rollout) for rollout in group]
    assert max(len(batch) for batch in model.batches) == 3


def test_a_rollout_larger_than_a_batch_is_computed_alone(model, make):
    batcher = make(batch_tokens=4)
    futures = [batcher.submit([one], REWARD) for one in (rollout(*range(20)), rollout(3))]
    assert [rewards(future) for future in futures] == [[3190.0], [3003.0]]
    assert max(map(len, model.batches)) == 1


def test_a_client_with_many_requests_does_not_keep_another_waiting(model, make):
    batcher = make(batch_tokens=6)
    model.hold(batcher)
    many = [batcher.submit([rollout(n, prompt=(n, 1))], REWARD, client="many") for n in range(20)]
    few = [batcher.submit([rollout(100 + n, prompt=(n, 2))], REWARD, client="few") for n in range(3)]
    model.open.set()
    wait([*many, *few], PATIENCE_S)
    order = [token for batch in model.batches[1:] for token in first_tokens(batch)]
    assert {100, 101, 102} < set(order[:8])


def test_a_client_with_long_rollouts_gets_no_more_tokens_than_one_with_short_ones(model, make):
    batcher = make(batch_tokens=10)
    model.hold(batcher)
    long = [batcher.submit([rollout(n, *range(8), prompt=(n,))], REWARD, client="long") for n in range(10)]
    short = [batcher.submit([rollout(100 + n, prompt=(n,))], REWARD, client="short") for n in range(10)]
    model.open.set()
    wait([*long, *short], PATIENCE_S)
    order = [token for batch in model.batches[1:] for token in first_tokens(batch)]
    # Five short rollouts have as many tokens as one long one.
    assert sum(token < 100 for token in order[: order.index(109)]) <= 3


def test_a_client_that_comes_late_is_not_ahead_of_those_who_were_there(model, make):
    batcher = make(batch_tokens=2)
    model.hold(batcher)
    model.open.set()
    first = [batcher.submit([rollout(n, prompt=(n,))], REWARD, client="early") for n in range(30)]
    wait(first, PATIENCE_S)
    model.hold(batcher)
    early = [batcher.submit([rollout(n, prompt=(n,))], REWARD, client="early") for n in range(6)]
    late = [batcher.submit([rollout(100 + n, prompt=(n,))], REWARD, client="late") for n in range(6)]
    model.open.set()
    wait([*early, *late], PATIENCE_S)
    order = [token for batch in model.batches[-12:] for token in first_tokens(batch)]
    assert sum(token >= 100 for token in order[:6]) == 3


def test_what_is_asked_for_otherwise_is_another_batch_and_waits_for_nobody_s_end(model, make):
    batcher = make()
    model.hold(batcher)
    hot = Asked(("reward",), temperature=2.0)
    asked = [REWARD, hot, REWARD, hot]
    futures = [batcher.submit([rollout(n)], each) for n, each in enumerate(asked)]
    with_candidates = batcher.submit([rollout(9, candidates=[[1, 2]])], REWARD)
    model.open.set()
    wait([*futures, with_candidates], PATIENCE_S)
    assert [first_tokens(batch) for batch in model.batches[1:]] == [[0, 2], [1, 3], [9]]
    assert model.asked[1:] == [REWARD, hot, REWARD]


def test_a_full_queue_refuses_the_next_request_and_says_when_to_come_back(model, make):
    batcher = make(requests=2)
    model.hold(batcher)
    futures = [batcher.submit([rollout(n)], REWARD) for n in range(2)]
    with pytest.raises(ServerBusyError, match="the queue is full: 2 requests wait") as refused:
        batcher.submit([rollout(3)], REWARD)
    assert 1 <= refused.value.retry_after <= 60
    assert (batcher.queued_requests, batcher.queued_tokens) == (2, 6)
    model.open.set()
    wait(futures, PATIENCE_S)
    assert rewards(batcher.submit([rollout(3)], REWARD)) == [3003.0]
    assert (batcher.queued_requests, batcher.queued_tokens) == (0, 0)


def test_a_queue_with_too_many_tokens_refuses_the_next_request(model, make):
    batcher = make(tokens=10)
    model.hold(batcher)
    batcher.submit([rollout(1, 1, 1)], REWARD)
    full = "5 tokens wait, with candidates, and with this request's 6 there would be more than 10"
    with pytest.raises(ServerBusyError, match=full):
        batcher.submit([rollout(3, 3, 3, 3)], REWARD)
    assert batcher.submit([rollout(3, 3, 3)], REWARD)


def test_candidates_that_wait_take_room_in_the_queue(model, make):
    batcher = make(tokens=20)
    model.hold(batcher)
    first = batcher.submit([rollout(1, 2, candidates=[[5, 6, 7]] * 2)], REWARD)
    full = "10 tokens wait, with candidates, and with this request's 12 there would be more than 20"
    with pytest.raises(ServerBusyError, match=full):
        batcher.submit([rollout(1, 2, candidates=[[5, 6, 7, 8]] * 2)], REWARD)
    second = batcher.submit([rollout(3, candidates=[[5, 6, 7, 8, 9]]), rollout(3)][:1], REWARD)
    assert batcher.queued_tokens == 7
    assert second.cancel()
    third = batcher.submit([rollout(3, candidates=[[5, 6, 7, 8, 9, 10, 11]])], REWARD)
    model.open.set()
    wait([first, third], PATIENCE_S)
    assert (batcher._queue.tokens, batcher._queue.candidates) == (0, 0)


def test_the_more_waits_the_later_a_refused_client_is_to_come_back(model, make):
    batcher = make(requests=3)
    rewards(batcher.submit([rollout(1)], REWARD))
    assert batcher.retry_after == 1
    model.hold(batcher)
    batcher._speed = 10.0
    batcher.submit([rollout(*range(98))], REWARD)
    assert batcher.retry_after == 10


def test_a_cancelled_request_leaves_the_queue_and_is_not_computed(model, make):
    batcher = make()
    model.hold(batcher)
    gone, stays = (batcher.submit([rollout(n)], REWARD) for n in (1, 2))
    assert gone.cancel()
    assert (batcher.queued_requests, batcher.queued_tokens) == (1, 3)
    model.open.set()
    assert rewards(stays) == [3002.0]
    assert [first_tokens(batch) for batch in model.batches[1:]] == [[2]]
    with pytest.raises(CancelledError):
        gone.result(PATIENCE_S)


def test_a_request_cancelled_while_it_is_computed_takes_nothing_from_the_others(model, make):
    batcher = make(batch_tokens=8)
    model.open.clear()
    large = batcher.submit([rollout(n, n) for n in range(9)], REWARD)
    assert model.entered.wait(PATIENCE_S)
    other = batcher.submit([rollout(50)], REWARD)
    assert large.cancel()
    model.open.set()
    assert rewards(other) == [3050.0]
    assert [first_tokens(batch) for batch in model.batches] == [[0, 1, 2], [50]]
    assert batcher.queued_tokens == 0


def test_a_rollout_whose_numbers_are_not_finite_fails_its_request_alone(model, make):
    model.broken = {13}
    batcher = make()
    model.hold(batcher)
    requests = [[rollout(1)], [rollout(2), rollout(13), rollout(3)], [rollout(4), rollout(5)]]
    futures = [batcher.submit(request, REWARD) for request in requests]
    model.open.set()
    assert rewards(futures[0]) == [3001.0]
    with pytest.raises(FieldError, match="finite numbers"):
        futures[1].result(PATIENCE_S)
    assert rewards(futures[2]) == [3004.0, 3005.0]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_request_that_breaks_a_batch_is_found_and_the_others_are_answered(model, make):
    model.fatal = {13}
    batcher = make(batch_tokens=12)
    model.hold(batcher)
    fatal = [rollout(13), *(rollout(n) for n in range(20))]
    futures = [batcher.submit(request, REWARD, client="c") for request in ([rollout(1)], fatal, [rollout(2)])]
    model.open.set()
    assert rewards(futures[0]) == [3001.0]
    with pytest.raises(MemoryError):
        futures[1].result(PATIENCE_S)
    assert rewards(futures[2]) == [3002.0]
    assert batcher.queued_tokens == 0
    assert rewards(batcher.submit([rollout(7)], REWARD)) == [3007.0]


def test_a_defect_in_what_is_told_of_batches_does_not_end_the_thread(model, make):
    def broken(report: BatchReport) -> None:
        raise ZeroDivisionError

    batcher = make(on_batch=broken)
    with pytest.raises(VheadError, match="failed inside"):
        batcher.submit([rollout(1)], REWARD).result(PATIENCE_S)
    assert batcher.alive


def test_a_stopping_server_scores_what_it_has_accepted_and_takes_no_more(model, make):
    batcher = make(batch_tokens=3)
    held = model.hold(batcher)
    accepted = [batcher.submit([rollout(n, prompt=(n, 5))], REWARD) for n in range(5)]
    stopped: list[bool] = []
    stopping = threading.Thread(target=lambda: stopped.append(batcher.stop(PATIENCE_S)))
    stopping.start()
    until = time.monotonic() + PATIENCE_S
    while batcher.alive and time.monotonic() < until:
        time.sleep(0.001)
    with pytest.raises(ServerStoppingError):
        batcher.submit([rollout(9)], REWARD)
    model.open.set()
    stopping.join(PATIENCE_S)
    assert stopped == [True]
    assert held.done()
    assert [rewards(future) for future in accepted] == [[5000.0 + 1001 * n] for n in range(5)]


def test_a_server_that_may_not_wait_any_longer_says_so_to_those_who_do(model, make):
    batcher = make()
    model.hold(batcher)
    waiting = batcher.submit([rollout(1)], REWARD)
    assert not batcher.stop(0.01)
    with pytest.raises(ServerStoppingError, match="before this request's turn"):
        waiting.result(PATIENCE_S)


def test_clients_that_never_come_back_are_forgotten(model, make):
    batcher = make(max_wait_s=0)
    for n in range(2100):
        batcher.submit([rollout(1)], REWARD, client=f"client {n}").result(PATIENCE_S)
    assert len(batcher._queue._had) <= 1025
    assert not batcher._queue._waiting
    assert not batcher._queue._alike


def test_submitting_and_cancelling_from_many_threads_loses_nothing(model, make):
    batcher = make(batch_tokens=30, requests=10_000)
    answers: dict[int, list[float]] = {}

    def client(number: int) -> None:
        rng = np.random.default_rng(number)
        for n in range(60):
            group = [rollout(number, n, m, prompt=(int(rng.integers(3)),)) for m in range(int(rng.integers(1, 5)))]
            future = batcher.submit(group, REWARD, client=f"{number % 3}")
            if rng.random() < 0.3 and future.cancel():
                continue
            answers.setdefault(number, []).append(rewards(future) == [expected(each) for each in group])

    threads = [threading.Thread(target=client, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert len(answers) == 6
    assert all(all(right) for right in answers.values())
    assert (batcher.queued_requests, batcher.queued_tokens) == (0, 0)


@pytest.mark.parametrize(
    ("name", "number"),
    [("requests", 0), ("tokens", 0), ("batch_tokens", -1), ("max_wait_s", -0.1), ("max_wait_s", float("nan"))],
)
def test_limits_out_of_range_are_refused(name, number):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        QueueLimits(**{name: number})
