"""What the device is given, and when the host waits for it: by the order of calls, never by time."""

import threading

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.scoring.scoring_models import critic, trees
from vhead import Rollout, Scorer
from vhead.backbone import placement
from vhead.scoring.ahead import Ahead
from vhead.scoring.engine import Engine, Queued
from vhead.scoring.fields import FIELDS, Asked

BUDGET = 40
# Operations that hand a number of the device's to the host, or make sizes of it.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2", "is_nonzero"}


@pytest.fixture
def order(monkeypatch) -> list[str]:
    """What happens, on a device that seems to compute by itself."""
    events: list[str] = []
    score, fields = Engine.score, Queued.fields
    numbers: dict[int, int] = {}

    def scoring(self, *arguments):
        queued = score(self, *arguments)
        numbers[id(queued)] = len(numbers)
        events.append(f"queue {numbers[id(queued)]}")
        return queued

    def reading(self):
        events.append(f"read {numbers[id(self)]}")
        return fields(self)

    kept = []
    monkeypatch.setattr(Engine, "score", lambda *arguments: kept.append(scoring(*arguments)) or kept[-1])
    monkeypatch.setattr(Queued, "fields", reading)
    monkeypatch.setattr(Engine, "computes_behind", property(lambda _self: True))
    return events


def behind(count: int) -> list[str]:
    """Each batch is queued before the one before it is read."""
    steps = [["queue 0"]] + [[f"queue {at}", f"read {at - 1}"] for at in range(1, count)] + [[f"read {count - 1}"]]
    return [event for step in steps for event in step]


def test_a_batch_is_read_back_after_the_next_one_is_queued(order):
    scorer = Scorer(critic("llama"), token_budget=BUDGET, chunk_tokens=10_000)
    scorer.score(trees(), FIELDS)
    assert len(order) > 6
    assert order == behind(len(order) // 2)


def test_on_a_cpu_nothing_is_gained_by_that_and_each_is_read_at_once(order, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(Queued, "fields", lambda self, own=Queued.fields: order.append("read") or own(self))
    monkeypatch.setattr(Engine, "score", lambda *given, own=Engine.score: order.append("queue") or own(*given))
    Scorer(critic("llama"), token_budget=BUDGET).score(trees(), FIELDS)
    assert order == ["queue", "read"] * (len(order) // 2)


def test_a_chunk_is_given_while_the_device_computes_the_first_batch_of_the_next_one(order, monkeypatch):
    monkeypatch.setattr(Ahead, "has_next", property(lambda _self: True))
    scorer = Scorer(critic("llama"), token_budget=BUDGET, chunk_tokens=60)
    given = 0
    for scores in scorer.chunks(trees(), FIELDS):
        order.append(f"write {given}")
        given += 1
        assert len(scores)
    assert given > 3
    for number in range(given):
        before = " ".join(order[: order.index(f"write {number}")])
        # The chunk is read, and one batch beyond it is queued, which is not read yet.
        assert before.count("queue") - before.count("read") == (1 if number < given - 1 else 0)


def test_what_is_done_does_not_wait_for_input_that_is_not_there(order):
    more = threading.Event()

    def slowly():
        yield from trees()
        assert more.wait(60)
        yield from trees(seed=1)

    scorer = Scorer(
        critic("llama"), token_budget=BUDGET, chunk_tokens=sum(len(r.prompt) + len(r.completion) for r in trees())
    )
    seen = 0
    for scores in scorer.chunks(slowly(), FIELDS):
        seen += len(scores)
        if not more.is_set():
            assert order[-1].startswith("read")
            more.set()
    assert seen == 2 * len(trees())


def test_the_scores_are_the_same_bits(order, monkeypatch):
    scorer = Scorer(critic("llama"), token_budget=BUDGET, chunk_tokens=60)
    behind_scores = scorer.score(trees(), FIELDS)
    monkeypatch.setattr(Engine, "computes_behind", property(lambda _self: False))
    at_once = scorer.score(trees(), FIELDS)
    assert all(np.array_equal(behind_scores.flat(name)[0], at_once.flat(name)[0]) for name in FIELDS)


def test_numbers_that_are_not_finite_are_computed_again_when_they_are_read(order):
    model = critic("llama")
    with torch.no_grad():
        model.pretrained_model.model.embed_tokens.weight[7] = float("nan")
    records = [Rollout([5, 6], [8, 9, 10]), Rollout([5, 7], [8, 9]), Rollout([11, 6], [8, 9, 10])]
    errors = []
    scores = list(Scorer(model, token_budget=20).stream(records, ["values"], on_error=errors.append))
    assert [score.index for score in scores] == [0, 2]
    assert len(errors) == 1


class NothingWaits(TorchDispatchMode):
    """Refuses whatever would have the host wait for the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in WAITING:
            raise AssertionError(f"{name} waits for the device")
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("returns", [FIELDS, ("reward",), ("logprobs", "entropy")])
def test_nothing_waits_inside_a_batch(returns, monkeypatch):
    # The kernels on the CPU are called where nothing listens.
    monkeypatch.setattr(placement.Arriving, "arrays", lambda self: pytest.fail("waits for the device"))
    scorer = Scorer(critic("llama"))
    encoded = [scorer.encoder.encode(at, record, "") for at, record in enumerate(trees())]
    (work,) = scorer._engine.work(encoded, 10_000, Asked(returns))
    with NothingWaits():
        queued = scorer._engine.score(encoded, work, Asked(returns))
        with pytest.raises(AssertionError, match="waits for the device"):
            next(iter(queued.computed._copies.values())).sum().item()


def test_results_come_by_page_locked_copies_that_nobody_waits_for(monkeypatch):
    events: list[object] = []

    class Event:
        def synchronize(self) -> None:
            events.append("wait")

    class OnDevice(torch.Tensor):
        """Says that it is on CUDA."""

        @property
        def device(self):
            return torch.device("cuda", 0)

    def page_locked(like):
        events.append("page-locked")
        return Target(torch.empty(like.shape, dtype=like.dtype))

    class Target:
        def __init__(self, memory):
            self.memory = memory

        def copy_(self, source, *, non_blocking):
            events.append(f"copy, non_blocking={non_blocking}")
            return self.memory.copy_(source.as_subclass(torch.Tensor))

    monkeypatch.setattr(placement, "_page_locked", page_locked)
    monkeypatch.setattr(placement, "_recorded", lambda device: events.append(f"event on {device}") or Event())
    values = torch.randn(3)
    arriving = placement.Arriving({"values": values.as_subclass(OnDevice), "reward": values.as_subclass(OnDevice)})
    queued = ["page-locked", "copy, non_blocking=True"] * 2 + ["event on cuda:0"]
    assert events == queued
    assert np.array_equal(arriving.arrays()["values"], values.numpy())
    assert events == [*queued, "wait"]


def test_reading_tokenising_and_batching_go_on_while_a_batch_is_computed(monkeypatch):
    """The thread that reads has the next chunk ready before the batch that is computed is done."""
    read, ready = [], threading.Event()
    records = trees() + trees(seed=1)

    def source():
        for at, record in enumerate(records):
            read.append(threading.current_thread().name)
            if at == len(records) - 1:
                ready.set()
            yield record

    own = Engine.score

    def computing(self, *arguments):
        # With reading in this thread, nothing would ever set it.
        assert ready.wait(60)
        return own(self, *arguments)

    monkeypatch.setattr(Engine, "score", computing)
    scorer = Scorer(critic("llama"), token_budget=10_000, chunk_tokens=sum(len(r.prompt) for r in trees()))
    assert sum(map(len, scorer.chunks(source(), FIELDS))) == len(records)
    assert set(read) == {"vhead-ahead"}
