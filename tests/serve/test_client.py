"""`vhead.Client` and `vhead.AsyncClient`: the scorer's numbers over real sockets, and what comes back otherwise."""

import asyncio
import pickle
import threading

import httpx2
import numpy as np
import pytest

from vhead import AsyncClient, Client, Rollout
from vhead.errors import MissingExtraError, RecordError, ServerError
from vhead.serve import client as module
from vhead.serve.protocols import arrow, npy


@pytest.fixture(params=["Arrow", "JSON"])
def client(server, request, monkeypatch):
    """With pyarrow and without."""
    if request.param == "JSON":
        monkeypatch.setattr(arrow, "is_there", lambda: False)
    with Client(f"http://127.0.0.1:{server.port}/") as opened:
        yield opened


@pytest.fixture
def tokens():
    generator = np.random.default_rng(0)
    vocabulary = 256
    made = []
    for number in range(9):
        prompt, completion = generator.integers(5, vocabulary, 7), generator.integers(5, vocabulary, 3 + number)
        mask = generator.random(len(completion)) < 0.5
        mask[0] = True
        candidates = generator.integers(5, vocabulary, (len(completion), 4))
        made.append(Rollout(prompt, completion, id=f"t{number}", mask=mask, candidates=candidates))
    return made


def assert_same(found, expected):
    assert found.ids == expected.ids
    for name in ("indices", "prompt_lengths", "offsets", "mask"):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist()
    assert set(found.computed) - {"weights_step"} == set(expected.computed)
    for name, array in expected.computed.items():
        assert found.computed[name].dtype == array.dtype
        assert np.array_equal(found.computed[name], array), name


class TestScores:
    def test_of_texts(self, client, scorer, rollouts):
        returns = ("values", "logprobs", "entropy", "reward", "tokens")
        found = client.score(rollouts, returns, temperature=0.7)
        assert_same(found, scorer.score(rollouts, returns, temperature=0.7))
        assert found.weights_step.tolist() == [120] * len(rollouts)

    def test_of_token_ids_with_masks_and_candidates_in_many_requests(self, client, scorer, tokens):
        returns = ("values", "logprobs", "candidates", "prompt_value", "bootstrap", "tokens")
        client._rollouts = 2
        found = client.score(iter(tokens), returns, top_logprobs=3)
        assert_same(found, scorer.score(tokens, returns, top_logprobs=3))
        assert not np.array_equal(found.values, scorer.score(tokens[::-1], returns).values), "the check can fail"

    def test_of_steps_and_rewards_alone(self, client, scorer, tokens):
        plain = [Rollout(one.prompt, one.completion) for one in tokens]
        assert_same(client.score(plain, ("steps",)), scorer.score(plain, ("steps",)))
        assert client.rewards(plain).tolist() == scorer.score(plain, ("reward",)).reward.tolist()

    def test_of_a_mixture_of_texts_ids_and_chats_with_ids_of_several_kinds(self, client, scorer, rollouts, tokens):
        plain = [Rollout(one.prompt, one.completion, id=number) for number, one in enumerate(tokens)]
        assert_same(client.score([*rollouts, *plain], ("reward",)), scorer.score([*rollouts, *plain], ("reward",)))

    def test_of_none(self, client, scorer):
        returns = ("values", "reward", "tokens")
        found = client.score([], returns)
        assert_same(found, scorer.score([], returns))
        assert len(found.values) == 0

    def test_in_an_event_loop(self, server, scorer, tokens):
        async def score():
            async with AsyncClient(f"http://127.0.0.1:{server.port}", rollouts_per_request=4) as client:
                assert await client.models() == ["demo"]
                return await client.score(tokens, ("values", "reward"))

        plain = [Rollout(one.prompt, one.completion, id=one.id, mask=one.mask) for one in tokens]
        tokens[:] = plain
        assert_same(asyncio.run(score()), scorer.score(tokens, ("values", "reward")))

    def test_more_than_a_request_may_have_goes_in_halves(self, client, scorer, rollouts):
        many = rollouts * 20  # the server takes 64 in a request
        assert_same(client.score(many, ("reward",)), scorer.score(many, ("reward",)))


class TestForms:
    def test_arrow_goes_out_and_comes_back_where_it_can(self, moody, scorer, rollouts):
        transport, client = moody()
        with client:
            assert_same(client.score(rollouts, ("reward",)), scorer.score(rollouts, ("reward",)))
        assert transport.media_types == [(arrow.MEDIA_TYPE, arrow.MEDIA_TYPE)]

    def test_a_server_without_pyarrow_is_asked_in_json(self, moody, scorer, rollouts):
        transport, client = moody(httpx2.Response(415, json={"error": {"message": "expected application/json"}}))
        with client:
            assert_same(client.score(rollouts, ("reward",)), scorer.score(rollouts, ("reward",)))
        assert transport.media_types == [("application/json", arrow.MEDIA_TYPE)]


class TestRefusals:
    def test_a_rollout_is_named_by_its_place_among_all(self, server, rollouts):
        broken = [*rollouts, Rollout([1, 2], [10**6])]
        client = Client(f"http://127.0.0.1:{server.port}", rollouts_per_request=4)
        with client, pytest.raises(RecordError, match=r"rollouts\[6\]") as caught:
            client.score(broken)
        assert caught.value.record == 6

    def test_what_is_not_there(self, server, rollouts):
        with Client(f"http://127.0.0.1:{server.port}", model="other") as client:
            with pytest.raises(ServerError, match="other") as caught:
                client.score(rollouts)
            assert client.models() == ["demo"]
        error = pickle.loads(pickle.dumps(caught.value))
        assert (error.status, str(error), error.request_id) == (404, str(caught.value), caught.value.request_id)
        assert error.request_id

    @pytest.mark.parametrize(
        ("kind", "content", "message"),
        [
            (arrow.MEDIA_TYPE, "without its end", "cut off, as it has no marker at its end"),
            (arrow.MEDIA_TYPE, "half", "cut off or another one"),
            (npy.MEDIA_TYPE, "half", "cut off or another one"),
            ("text/html", "<p>welcome</p>", "cut off or another one"),
            ("application/json", "{}", "cut off or another one"),
        ],
    )
    def test_an_answer_that_was_cut_off_or_is_another_one(self, server, scorer, rollouts, kind, content, message):
        def cut(request):
            request.headers["accept"] = kind
            whole = transport.handle_request(request).read()
            bodies = {"without its end": whole[:-8], "half": whole[: len(whole) // 2]}
            return httpx2.Response(
                200,
                headers={"content-type": kind, "x-request-id": "cut"},
                content=bodies.get(content, content.encode()),
            )

        transport = httpx2.HTTPTransport()
        client = Client(f"http://127.0.0.1:{server.port}", transport=httpx2.MockTransport(cut))
        with transport, client, pytest.raises(ServerError, match=message) as caught:
            client.score(rollouts)
        assert (caught.value.status, caught.value.request_id) == (200, "cut")

    def test_nobody_listens(self, rollouts):
        with Client("http://127.0.0.1:9", timeout=0.3) as client:
            with pytest.raises(ServerError, match="no answer: ConnectError"):
                client.score(rollouts)
            with pytest.raises(ServerError, match="no answer: ConnectError"):
                client.models()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"concurrency": 0}, "concurrency: expected a whole number of 1 or more, got 0"),
            ({"rollouts_per_request": 2.5}, "rollouts_per_request: expected a whole number of 1 or more, got 2.5"),
            ({"timeout": 0}, "timeout: expected seconds above 0, got 0"),
        ],
    )
    def test_numbers_out_of_range(self, options, message):
        with pytest.raises(ValueError, match=message):
            Client("http://127.0.0.1:9", **options)

    def test_without_httpx2(self, monkeypatch):
        def gone(name):
            raise ImportError(name)

        with monkeypatch.context() as patch:
            patch.setattr(module.importlib, "import_module", gone)
            with pytest.raises(MissingExtraError, match=r"vhead\[client\]"):
                Client("http://127.0.0.1:9")


class Moody:
    """Says no so many times, then what the server says."""

    def __init__(self, *moods):
        self._moods, self._lock = list(moods), threading.Lock()
        self.real = httpx2.HTTPTransport()
        self.asked = 0
        self.media_types = []

    def __call__(self, request):
        with self._lock:
            self.asked += 1
            mood = self._moods.pop(0) if self._moods else None
        if isinstance(mood, Exception):
            raise mood
        if mood:
            return mood
        answer = self.real.handle_request(request)
        self.media_types.append((request.headers["content-type"], answer.headers["content-type"]))
        return answer


@pytest.fixture
def moody(server):
    transports = []

    def opened(*moods):
        transports.append(Moody(*moods))
        transport = httpx2.MockTransport(transports[-1])
        return transports[-1], Client(f"http://127.0.0.1:{server.port}", transport=transport)

    yield opened
    for transport in transports:
        transport.real.close()


class TestAskingAgain:
    def test_as_late_as_the_server_says(self, moody, scorer, rollouts, monkeypatch):
        pauses = []

        class Impatient(threading.Event):
            def wait(self, seconds):
                pauses.append(seconds)
                return False

        monkeypatch.setattr(module, "Event", Impatient)
        busy = httpx2.Response(503, headers={"retry-after": "7"}, json={"error": {"message": "the queue is full"}})
        transport, client = moody(busy, httpx2.ReadError("reset"), httpx2.Response(502))
        with client:
            assert_same(client.score(rollouts, ("reward",)), scorer.score(rollouts, ("reward",)))
        assert transport.asked == 4
        assert [7 <= pauses[0] <= 8.75, pauses[1] < 1, pauses[2] < 1] == [True] * 3

    def test_not_beyond_its_patience(self, moody, rollouts):
        busy = httpx2.Response(503, headers={"retry-after": "700"}, json={"error": {"message": "the queue is full"}})
        transport, client = moody(busy)
        with client, pytest.raises(ServerError, match="the queue is full") as caught:
            client.score(rollouts)
        assert (caught.value.status, transport.asked) == (503, 1)

    def test_never_what_is_wrong_for_good(self, moody, rollouts):
        transport, client = moody(httpx2.Response(401, json={"error": {"message": "expected a key"}}))
        with client, pytest.raises(ServerError, match="expected a key"):
            client.score(rollouts)
        assert transport.asked == 1
