"""A server's beginning and end: who is let in, what happens when there is too much, and what SIGTERM leaves behind."""

import asyncio
import ctypes
import json
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from tests.serve.conftest import PATIENCE_S, RunningServer
from vhead.demo import demo_model_path
from vhead.serve import running
from vhead.serve.app import make_app
from vhead.serve.batching import QueueLimits
from vhead.serve.running import Address, Server
from vhead.serve.service import Service

LARGE = {"rollouts": [{"prompt_ids": [1, 2], "completion_ids": [3 + n % 90] * 400} for n in range(24)]}


def test_a_server_under_load_refuses_recovers_and_answers_what_it_has_accepted(tmp_path):
    server = RunningServer(
        tmp_path / "log", "--max-num-queued-reqs", "3", "--max-num-batched-tokens", "1024", "--api-key", "secret key"
    )
    key = {"Authorization": "Bearer secret key"}
    for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret key"}):
        refused = server.post("/score", LARGE, **given)
        assert (refused.status, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert server.ask("GET", "/metrics", **given).status == 401
    assert server.ask("GET", "/health").status == server.ask("GET", "/ready").status == 200

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: server.post("/score", LARGE, **key), range(12)))
    assert {answer.status for answer in answers} == {200, 503}
    for answer in answers:
        if answer.status == 503:
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            assert "the queue is full" in answer.message

    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(server.post, "/score", LARGE, **key) for _ in range(3)]
        until = time.monotonic() + PATIENCE_S
        while b"vhead_queued_requests 0.0" in server.ask("GET", "/metrics", **key).body:
            assert time.monotonic() < until
        assert server.stop() == 0
        answers = [future.result(PATIENCE_S) for future in waiting]
    assert [answer.status for answer in answers] == [200] * 3
    assert all(len(answer.json["scores"]) == 24 for answer in answers)
    log = server.log.read_text()
    assert "every accepted request was answered" in log
    assert "secret" not in log
    assert "Traceback" not in log


def test_a_server_that_is_full_refuses_a_request_before_it_reads_it(scorer):
    """The queue holds one; the second would be refused for what it says."""
    service, opened = Service(scorer, ["demo"], queue=QueueLimits(requests=1)), threading.Event()
    service.batcher.call(lambda: opened.wait(PATIENCE_S) and None)

    async def ask():
        transport = httpx2.ASGITransport(make_app(service))
        async with httpx2.AsyncClient(transport=transport, base_url="http://here") as client:
            first = asyncio.ensure_future(client.post("/score", json={"rollouts": LARGE["rollouts"][:1]}))
            while not service.batcher.queued_requests:
                await asyncio.sleep(0.01)
            refused = await client.post("/score", content=b"{")
            opened.set()
            return [
                (await first).status_code,
                refused.status_code,
                (await client.post("/score", content=b"{")).status_code,
            ]

    try:
        assert asyncio.run(ask()) == [200, 503, 400]
    finally:
        opened.set()
        service.close()


@contextmanager
def unread(server: RunningServer) -> Iterator[socket.socket]:
    """A connection whose answer is far larger than sockets hold, and which does not read it."""
    body = json.dumps({**LARGE, "returns": ["logprobs"], "top_logprobs": 100}).encode()
    head = f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(PATIENCE_S)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(head.encode() + body)
        wait_for(lambda: any(line.get("route") == "/score" for line in server.lines()))
        yield connection


def wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def refuses_connections(server: RunningServer) -> bool:
    """Whether a server has heard the first signal."""
    try:
        socket.create_connection(("127.0.0.1", server.port), PATIENCE_S).close()
    except ConnectionRefusedError:
        return True
    return False


def test_a_stopping_server_waits_for_who_reads_slowly(tmp_path):
    server = RunningServer(tmp_path / "log")
    with unread(server) as connection:
        server.process.terminate()
        wait_for(lambda: refuses_connections(server))
        received = bytearray()
        while part := connection.recv(1 << 20):
            received += part
    head, _, body = received.partition(b"\r\n\r\n")
    assert f"content-length: {len(body)}".encode() in head
    assert len(json.loads(body)["scores"]) == 24
    assert server.process.wait(PATIENCE_S) == 0
    assert "every accepted request was answered" in server.log.read_text()


def test_an_answer_that_nobody_has_read_in_time_is_said_to_be_none(tmp_path):
    server = RunningServer(tmp_path / "log", "--drain-timeout", "1")
    with unread(server):
        assert server.stop() == 1
    log = server.log.read_text()
    assert "before every accepted request was answered" in log
    assert "accepted requests that were ended without a whole answer: 1" in log


def test_a_second_signal_ends_a_server_that_is_busy(tmp_path):
    """By the first alone it would end after hours."""
    server = RunningServer(tmp_path / "log", "--drain-timeout", "10000")
    with unread(server):
        server.process.terminate()
        wait_for(lambda: refuses_connections(server))
        assert server.process.poll() is None
        server.process.terminate()
        assert server.process.wait(PATIENCE_S) == 1
    assert "before every accepted request was answered" in server.log.read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="signals go to a thread by a call of Linux's C library")
def test_a_signal_that_another_thread_gets_stops_the_server_all_the_same(tmp_path):
    server = RunningServer(tmp_path / "log")
    pid = server.process.pid
    others = {int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()} - {pid}
    assert ctypes.CDLL(None).tgkill(pid, min(others), signal.SIGTERM) == 0
    try:
        assert server.process.wait(PATIENCE_S) == 0
    finally:
        server.process.kill()


@pytest.mark.parametrize("is_told_twice", [False, True])
def test_a_request_that_is_not_scored_in_time_is_said_to_be_unanswered(scorer, is_told_twice):
    """The thread that scores is held for as long as the request waits, and has nothing left to do at the end."""
    address = Address(port=0)
    service = Service(scorer, ["demo"])
    waits = threading.Event()
    service.batcher.call(lambda: waits.wait(PATIENCE_S) and wait_for(lambda: not service.batcher.queued_requests))
    body = json.dumps({"rollouts": LARGE["rollouts"][:1]}).encode()
    bound = address.bound()
    server, outcome = Server(service, address, bound, 10_000 if is_told_twice else 1), []
    with socket.create_connection(bound.getsockname(), PATIENCE_S) as connection:
        running = threading.Thread(target=lambda: outcome.append(server.run()))
        running.start()
        connection.sendall(f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(lambda: service.batcher.queued_requests)
        waits.set()
        server.stop()
        if is_told_twice:
            server.stop()
        running.join(PATIENCE_S)
    assert outcome == [False]


def test_a_server_takes_connections_before_it_says_that_it_serves(scorer):
    address = Address(port=0)
    bound = address.bound()
    place = bound.getsockname()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(place, PATIENCE_S)
    service = Service(scorer, ["demo"])
    server = Server(service, address, bound)
    with socket.create_connection(place, PATIENCE_S):
        server.stop()
        assert server.run()


def test_connections_beyond_the_limit_are_refused_in_the_form_of_all_errors(scorer, monkeypatch):
    monkeypatch.setattr(running, "_CONNECTIONS", 2)
    address = Address(port=0)
    bound = address.bound()
    place = bound.getsockname()
    server = Server(Service(scorer, ["demo"]), address, bound)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        with httpx2.Client(base_url=f"http://{place[0]}:{place[1]}") as client:
            assert client.get("/health").status_code == 200
            with socket.create_connection(place, PATIENCE_S), socket.create_connection(place, PATIENCE_S):
                answers = (client.get("/health") for _ in range(1000))
                refused = next(answer for answer in answers if answer.status_code != 200)
    finally:
        server.stop()
        thread.join(PATIENCE_S)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert "more than 2 connections" in refused.json()["error"]["message"]


def command(*options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "vhead", "serve", str(demo_model_path()), *options],
        capture_output=True, text=True, check=False, timeout=PATIENCE_S,
    )  # fmt: skip


def test_other_machines_are_not_let_in_without_a_key():
    done = command("--host", "0.0.0.0")
    assert done.returncode == 2
    assert "lets other machines in" in " ".join(done.stderr.split())


def test_an_address_that_is_taken_is_an_error_before_the_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = command("--port", str(taken.getsockname()[1]))
    assert done.returncode == 1
    assert "Address already in use" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.1", False), ("localhost.evil.example", False)],
)  # fmt: skip
def test_which_addresses_only_this_machine_reaches(host, is_loopback):
    assert Address(host).is_loopback == is_loopback


def test_https_with_a_certificate_and_its_key(tmp_path):
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-keyout", tmp_path / "key.pem", "-out", tmp_path / "cert.pem"],
        capture_output=True, check=False,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("needs openssl")
    server = RunningServer(
        tmp_path / "log", "--ssl-certfile", str(tmp_path / "cert.pem"), "--ssl-keyfile", str(tmp_path / "key.pem")
    )
    context = ssl.create_default_context(cafile=tmp_path / "cert.pem")
    with (
        socket.create_connection(("127.0.0.1", server.port), 30) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    assert server.stop() == 0
