"""Who comes to a server that is soaked: clients that count what they get, guests that behave badly, and a trainer."""

import http.client
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from tests.serve.conftest import RunningServer
from vhead import Rollout, Scorer
from vhead.sync import Publisher

PATIENCE_S = 120


@dataclass(frozen=True)
class Seen:
    """What a client saw of a request: no status where its connection ended."""

    name: str
    status: int | None
    seconds: float
    done: float
    rewards: tuple[float, ...] = ()
    step: int | None = None
    group: int = 0


class Groups:
    """Groups of rollouts with one prompt, and their rewards by the weights of each step."""

    def __init__(self, scorer: Scorer, count: int = 6) -> None:
        rng = np.random.default_rng(0)
        self.scorer = scorer
        prompts = [rng.integers(5, 250, 24) for _ in range(count)]
        self._rollouts = [[Rollout(prompt, rng.integers(5, 250, 20)) for _ in range(4)] for prompt in prompts]
        self.bodies = [json.dumps({"rollouts": [_record(r) for r in group]}).encode() for group in self._rollouts]
        self._rewards: dict[int | None, list[list[float]]] = {}
        self.note(None)

    def note(self, step: int | None) -> None:
        """Scores all of them by the weights as they are."""
        self._rewards[step] = [self.scorer.score(group, ["reward"]).reward.tolist() for group in self._rollouts]

    def are_right(self, seen: Seen) -> bool:
        """Whether a request has the very bits that the scorer gives by the weights of its step."""
        return list(seen.rewards) == self._rewards[seen.step][seen.group]


def _record(rollout: Rollout) -> dict[str, object]:
    return {"prompt_ids": rollout.prompt.tolist(), "completion_ids": rollout.completion.tolist()}


@dataclass
class Crowd:
    """Clients that ask until they are told to stop; the next request follows an answer, or comes at a pace.

    Attributes:
        port: The server's.
        name: What their requests' ids begin with.
        groups: What they ask about.
        rate: Requests a second of all together; None: as fast as answers come.
        seen: What they saw.
    """

    port: int
    name: str
    groups: Groups
    rate: float | None = None
    seen: list[Seen] = field(default_factory=list)

    @contextmanager
    def asking(self, clients: int) -> Iterator["Crowd"]:
        """They come, and at the end they wait for their last answers."""
        stop, began = threading.Event(), time.monotonic()

        def client(number: int) -> None:
            with suppress(ConnectionRefusedError):
                for turn, connection in enumerate(self._connections(stop)):
                    due = 0.0 if self.rate is None else began + (turn * clients + number) / self.rate
                    if not stop.wait(max(0.0, due - time.monotonic())):
                        self.seen.append(self._asked(connection, f"{self.name}.{number}.{turn}", number + turn))

        threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def _connections(self, stop: threading.Event) -> Iterator[http.client.HTTPConnection]:
        """One connection for as long as it lasts."""
        while not stop.is_set():
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
            connection.connect()
            while connection.sock is not None and not stop.is_set():
                yield connection
            connection.close()

    def _asked(self, connection: http.client.HTTPConnection, name: str, number: int) -> Seen:
        began, group = time.monotonic(), number % len(self.groups.bodies)
        try:
            headers = {"Content-Type": "application/json", "X-Request-ID": name}
            connection.request("POST", "/score", self.groups.bodies[group], headers)
            answer = connection.getresponse()
            content = json.loads(answer.read())
        except (OSError, http.client.HTTPException):
            connection.close()
            return Seen(name, None, 0.0, 0.0)
        done = time.monotonic()
        if answer.status != 200:
            return Seen(name, answer.status, done - began, done)
        rewards = tuple(float(np.float32(row["reward"])) for row in content["scores"])
        return Seen(name, 200, done - began, done, rewards, content["step"], group)


@contextmanager
def repeated(works: Sequence[Callable[[], None]], every_s: float) -> Iterator[None]:
    """Each of these is done again and again beside what the caller does, at least once."""
    stop, failed = threading.Event(), []

    def repeat(work: Callable[[], None]) -> None:
        try:
            work()
            while not stop.wait(every_s):
                work()
        except Exception as error:  # The caller raises it.
            failed.append(error)

    threads = [threading.Thread(target=repeat, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if failed:
        raise failed[0]


def bad_guests(port: int, body: bytes) -> list[Callable[[], None]]:
    """Guests that send slowly, half, too much or nothing sensible, or leave without a word."""
    head = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"

    def guest(parts: Sequence[bytes], pause_s: float = 0.0, *, resets: bool = False, reads: bool = True) -> None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), PATIENCE_S) as connection:
            if resets:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            for part in parts:
                connection.sendall(part)
                time.sleep(pause_s)
            if reads:
                connection.recv(64)

    whole = head % len(body) + body
    end = b"HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    return [
        lambda: guest([whole[:90], *(whole[at : at + 40] for at in range(90, len(whole), 40))], 0.01, reads=False),
        lambda: guest([whole[: len(whole) // 2]], 0.05, resets=True, reads=False),
        lambda: guest([whole], resets=True, reads=False),
        lambda: guest([head % (100 << 20), *[b"[" * (1 << 16)] * 4]),
        lambda: guest([b"GET / " + end, *(b"X-%d: %s\r\n" % (n, b"a" * 1000) for n in range(100)), b"\r\n"]),
        lambda: guest([b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"]),
    ]


class Trainer:
    """Publishes another head again and again, and tells the server to take it over, or to go one back."""

    def __init__(self, directory: Path, groups: Groups) -> None:
        self._groups = groups
        self._publisher = Publisher(directory)
        self.step = 0

    def publish(self) -> None:
        self.step += 1
        generator = torch.Generator().manual_seed(self.step)
        with torch.no_grad():
            for weight in self._groups.scorer.model.v_head.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator))
        # Before it is published, as it can be served from then on.
        self._groups.note(self.step)
        self._publisher.publish(self._groups.scorer.model, step=self.step)

    def disturb(self, server: RunningServer) -> None:
        """Publishes and reloads, and each third time goes back as well."""
        self.publish()
        assert server.post("/reload", {}).status == 200
        if self.step % 3 == 0:
            assert server.post("/weights/rollback", {}).status == 200
