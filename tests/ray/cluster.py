"""A program that scores on a local cluster of two workers, and writes what came out as JSON.

It is run in a process of its own, since Ray leaves threads and handlers behind in the process that starts it.
"""

import http.client
import json
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
import ray.serve

import vhead.ray
from vhead.demo import demo_model_path
from vhead.ray import datasets

MODEL = str(demo_model_path())


def rows() -> list[dict[str, Any]]:
    good = [{"id": f"row {at}", "question": [at + 1, 7, 9], "answer": [3 + at, 5]} for at in range(59)]
    return [*good, {"id": "bad", "question": [1, 2], "answer": [10**6]}]


class DyingScorer(vhead.ray.BatchScorer):
    """Kills its process when it has scored a batch and is to hand over the next, once on the whole cluster."""

    def __init__(self, model: str, *, marker: str, **options: Any) -> None:
        super().__init__(model, **options)
        self._marker = Path(marker)
        self._batches = 0

    def __call__(self, batch: Any) -> Any:
        scored = super().__call__(batch)
        if self._batches and not self._marker.exists():
            self._marker.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        self._batches += 1
        return scored.append_column("pid", pa.array([os.getpid()] * len(batch)))


def processed(folder: Path, publications: str) -> dict[str, Any]:
    """A processor whose two actors follow published weights; one of them is killed in the middle."""
    datasets.BatchScorer = DyingScorer
    marker = folder / "killed"
    config = vhead.ray.ScorerProcessorConfig(
        model_source=MODEL,
        scorer_kwargs={"returns": ["reward"], "follow": publications, "marker": str(marker)},
        batch_size=5,
        concurrency=2,
        resources={"num_cpus": 0.5},
        should_continue_on_error=True,
    )
    processor = vhead.ray.build_processor(
        config,
        preprocess=lambda row: {"name": row["id"], "prompt_ids": row["question"], "completion_ids": row["answer"]},
        postprocess=lambda row: {"name": row["name"], **{key: row[key] for key in ("reward", "weights_step", "pid")}},
        preprocess_map_kwargs={"num_cpus": 0.5},
        postprocess_map_kwargs={"num_cpus": 0.5},
    )
    scored = processor(ray.data.from_items(rows(), override_num_blocks=12)).take_all()
    return {"rows": scored, "killed": int(marker.read_text())}


def served() -> dict[str, Any]:
    """The server as an application: who has no key, and whose body is wrong, hears it from vhead's own server."""
    arguments = {"model": MODEL, "served_model_names": ["demo"], "api_key": "secret"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.serve.start(http_options={"host": "127.0.0.1", "port": port})
    ray.serve.run(vhead.ray.build_app(arguments), name="scores")
    body = {"model": "demo", "rollouts": [{"prompt_ids": [1, 7, 9], "completion_ids": [3, 5]}], "returns": ["reward"]}
    return {
        "scored": ask(port, body, Authorization="Bearer secret"),
        "no key": ask(port, body),
        "unknown model": ask(port, {**body, "model": "other"}, Authorization="Bearer secret"),
    }


def ask(port: int, body: dict[str, Any], **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/score", json.dumps(body), {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def main(output: Path, publications: str) -> None:
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        ray.init(num_cpus=2, object_store_memory=80 * 2**20, include_dashboard=False, _temp_dir=folder)
        found = {"rows": rows(), "processed": processed(output.parent, publications), "served": served()}
        output.write_text(json.dumps(found))
        ray.serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
