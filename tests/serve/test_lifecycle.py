"""A server's beginning and end: who is let in, what happens when there is too much, and what SIGTERM leaves behind."""

import asyncio
import json
import socket
import ssl
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from tests.serve.conftest import PATIENCE_S, RunningServer
from vhead.demo import demo_model_path
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


def test_a_second_signal_ends_a_server_that_is_busy(tmp_path):
    server = RunningServer(tmp_path / "log", "--max-num-batched-tokens", "1024")
    body = json.dumps({"rollouts": LARGE["rollouts"] * 20}).encode()
    head = f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), 30) as connection:
        connection.sendall(head.encode() + body)
        time.sleep(0.5)
        server.process.terminate()
        time.sleep(0.2)
        server.process.terminate()
        assert server.process.wait(PATIENCE_S) == 1
    assert "before every accepted request was answered" in server.log.read_text()


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
