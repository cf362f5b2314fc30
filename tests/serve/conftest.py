"""A server in a process of its own, on the bundled model, and clients with real sockets."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from vhead import Rollout, Scorer
from vhead.demo import demo_model_path, demo_rollouts_path

PATIENCE_S = 150


@dataclass(frozen=True)
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def message(self) -> str:
        return self.json["error"]["message"]


class RunningServer:
    """`vhead serve` in a process, whose standard error goes to a file."""

    def __init__(self, log: Path, *options: str, model: Path | None = None) -> None:
        self.log = log
        command = [sys.executable, "-m", "vhead", "serve", str(model or demo_model_path()), "--port", "0"]
        with log.open("w") as file:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen([*command, *options], stderr=file, stdout=file, env=environment)
        self.port = self._started()

    def _started(self) -> int:
        import time

        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until and self.process.poll() is None:
            if found := re.search(r"^vhead: serving .* on https?://\S+:(\d+)$", self.log.read_text(), re.MULTILINE):
                return int(found[1])
            time.sleep(0.02)
        self.process.kill()
        raise AssertionError(self.log.read_text())

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        try:
            content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            sent = {"Content-Type": "application/json"} if content is not None else {}
            sent |= {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, content, {name: value for name, value in sent.items() if value})
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())
        finally:
            connection.close()

    def post(self, path: str, body: object, **headers: str) -> Answer:
        return self.ask("POST", path, body, **headers)

    def lines(self) -> list[dict]:
        """The log's lines of JSON."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    running = RunningServer(
        tmp_path_factory.mktemp("serve") / "log", "--served-model-name", "demo", "--batch-invariant", "--step", "120",
        "--max-request-tokens", "5000", "--max-request-rollouts", "64", "--max-body-mib", "1", "--body-timeout", "1",
    )  # fmt: skip
    yield running
    assert running.stop() == 0
    assert "Traceback" not in running.log.read_text()


@pytest.fixture(scope="session")
def scorer() -> Scorer:
    return Scorer.from_pretrained(demo_model_path(), device="cpu", batch_invariant=True)


@pytest.fixture(scope="session")
def rollouts() -> list[Rollout]:
    records = [json.loads(line) for line in demo_rollouts_path().read_text().splitlines()[:6]]
    return [Rollout(record["prompt"][-120:], record["completion"][:80], id=record["id"]) for record in records]
