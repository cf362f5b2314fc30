"""Measures `vhead serve` beside `Scorer.stream` on the same rollouts, and beside vLLM's server: see README.md.

Server and clients share the machine. Bodies are made before the clock starts; a client sends the next one as soon as
it has an answer, which it receives whole and does not read.
"""

import argparse
import http.client
import json
import multiprocessing
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import pyarrow as pa
import report
import torch
from measure import Figures, add_options
from transformers import AutoModelForTokenClassification, AutoTokenizer, Qwen2Config
from vllm_peer import vllm_environment
from workloads import QWEN2_VOCABULARY, as_ids, log_normal, sizes, texts

from vhead import Rollout, Scorer
from vhead.benchmark.document import Row
from vhead.benchmark.timing import load_average
from vhead.demo import demo_model_path

CLIENTS = 16
RETURNS = ("values",)
PATIENCE_S = 300
ARROW, JSON = "application/vnd.apache.arrow.stream", "application/json"
OWN_THREADS = ("MainThread", "vhead-http", "vhead-reader", "vhead-weights")


@dataclass(frozen=True)
class Asking:
    """The requests of a turn.

    Attributes:
        path: Where they go.
        kind: Their media type, which is also asked for.
        bodies: One for each request.
    """

    path: str
    kind: str
    bodies: Sequence[bytes]


def native(requests: Sequence[list[Rollout]], kind: str) -> Asking:
    """Requests of vhead's own protocol."""
    if kind == ARROW:
        return Asking(f"/score?returns={','.join(RETURNS)}", ARROW, [_stream(request) for request in requests])
    bodies = [
        {"rollouts": [{"prompt_ids": r.prompt.tolist(), "completion_ids": r.completion.tolist()} for r in request]}
        for request in requests
    ]
    return Asking("/score", JSON, [json.dumps({**body, "returns": RETURNS}).encode() for body in bodies])


def _stream(request: list[Rollout]) -> bytes:
    columns = {"prompt_ids": [r.prompt for r in request], "completion_ids": [r.completion for r in request]}
    table, sink = pa.table(columns), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def pooling(requests: Sequence[list[Rollout]], model: str) -> Asking:
    """Requests of vLLM's protocol: the head's output at each token."""
    about = {"model": model, "task": "token_classify", "use_activation": False, "encoding_format": "bytes"}
    sequences = [[[*r.prompt.tolist(), *r.completion.tolist()] for r in request] for request in requests]
    return Asking("/pooling", JSON, [json.dumps({**about, "input": each}).encode() for each in sequences])


def asked(port: int, asking: Asking) -> float:
    """Seconds until clients have the answers to all requests."""
    waiting: SimpleQueue[bytes] = SimpleQueue()
    for body in asking.bodies:
        waiting.put(body)
    failed: list[str] = []
    clients = [threading.Thread(target=_client, args=(port, asking, waiting, failed)) for _ in range(CLIENTS)]
    began = time.perf_counter()
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(asking.bodies)} requests failed; the first: {failed[0]}")
    return time.perf_counter() - began


def _client(port: int, asking: Asking, waiting: "SimpleQueue[bytes]", failed: list[str]) -> None:
    headers = {"Content-Type": asking.kind, "Accept": "*/*" if asking.path == "/pooling" else asking.kind}
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)) as connection:
        while True:
            try:
                body = waiting.get_nowait()
            except Empty:
                return
            connection.request("POST", asking.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
            if answer.status != 200:
                failed.append(f"{answer.status}: {content[:300]!r}")


class _Timed:
    """A function with the processor time of the threads that called it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.seconds = 0.0

    def __call__(self, *arguments: Any) -> Any:
        began = time.thread_time()
        try:
            return self._function(*arguments)
        finally:
            self.seconds += time.thread_time() - began


def _serve(folder: str, threads: int, dtype: str, pipe: Any) -> None:
    """A server in a process of its own, which tells how much processor time it has had, and the model of it."""
    from vhead.serve.running import Address, Server  # fastapi
    from vhead.serve.service import Service  # as above

    torch.set_num_threads(threads)
    service = Service(Scorer.from_pretrained(folder, num_threads=threads, dtype=getattr(torch, dtype)), ["model"])
    # The thread that scores belongs to the model while it computes a batch, and to the server while it gathers one.
    model = service.batcher._score = _Timed(service.batcher._score)
    address = Address(port=0)
    bound = address.bound()
    server = Server(service, address, bound)
    threading.Thread(target=server.run, name="runs", daemon=True).start()
    pipe.send(bound.getsockname()[1])
    while pipe.recv():
        own = [t for t in threading.enumerate() if t.name.startswith((*OWN_THREADS, "vhead-batcher"))]
        seconds = sum(time.clock_gettime(time.pthread_getcpuclockid(thread.ident or 0)) for thread in own)
        pipe.send((seconds - model.seconds, time.process_time()))
    server.stop()


@dataclass(frozen=True)
class Served:
    """A server that runs.

    Attributes:
        port: Where.
        processor: Its own processor seconds so far, and those with the model's.
    """

    port: int
    processor: Callable[[], tuple[float, float]]


@contextmanager
def served(folder: Path, options: argparse.Namespace, dtype: str) -> Iterator[Served]:
    """Our server on a model."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(str(folder), options.threads, dtype, there))
    process.start()

    def processor() -> tuple[float, float]:
        here.send("processor")
        own, whole = here.recv()
        return own, whole

    try:
        yield Served(here.recv(), processor)
        here.send(None)
    finally:
        process.join(60)
        process.kill()


def turn(server: Served, asking: Asking) -> Row:
    """One turn of a server: seconds, and whose the processor time was."""
    clients = time.process_time()
    own, whole = server.processor()
    seconds = asked(server.port, asking)
    own, whole = (after - before for after, before in zip(server.processor(), (own, whole), strict=True))
    return {
        "seconds": seconds,
        "own_s": own,
        "server_s": whole,
        "own_share": own / whole,
        "clients_s": time.process_time() - clients,
        "load": load_average(),
    }


def measured(folder: Path, groups: list[list[Rollout]], options: argparse.Namespace, dtype: str) -> Iterator[Row]:
    """`Scorer.stream` and the server on the same rollouts, in turns."""
    rollouts = [*chain(*groups)]
    scorer = Scorer.from_pretrained(folder, num_threads=options.threads, dtype=getattr(torch, dtype))
    units = {"groups": groups, "rollouts": [[rollout] for rollout in rollouts]}
    askings = {
        (unit, body): native(requests, kind)
        for unit, requests in units.items()
        for body, kind in (("Arrow", ARROW), ("JSON", JSON))
    }
    with served(folder, options, dtype) as server:
        for number in range(options.rounds + 1):
            began, processor = time.perf_counter(), time.process_time()
            for _ in scorer.stream(rollouts, RETURNS):
                pass
            row = {"seconds": time.perf_counter() - began, "server_s": time.process_time() - processor}
            rows: list[Row] = [{"unit": "stream", "body": "", "own_share": 0.0, **row, "load": load_average()}]
            for (unit, body), asking in askings.items():
                rows.append({"unit": unit, "body": body, **turn(server, asking)})
            # The first round warms up.
            yield from ({"round": number, **row} for row in rows if number)


def qwen2_classifier(folder: Path, layers: int, dtype: str) -> Path:
    """A checkpoint of Qwen2-0.5B's shape with fewer layers, and a head of random weights that vLLM knows too."""
    torch.manual_seed(0)
    config = Qwen2Config(
        num_hidden_layers=layers, hidden_size=896, intermediate_size=4864, num_attention_heads=14,
        num_key_value_heads=2, vocab_size=QWEN2_VOCABULARY, max_position_embeddings=4096, num_labels=1,
    )  # fmt: skip
    AutoModelForTokenClassification.from_config(config).to(getattr(torch, dtype)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo_model_path()).save_pretrained(folder)
    return folder


@contextmanager
def vllm_served(python: Path, folder: Path, options: argparse.Namespace) -> Iterator[int]:
    """The port of vLLM's server on a model, with as many threads."""
    port = 8765
    command = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--served-model-name", "model", "--port",
        str(port), "--runner", "pooling", "--dtype", options.dtype, "--enforce-eager", "--enable-prefix-caching",
        "--skip-tokenizer-init", "--max-model-len", "2048",
    ]  # fmt: skip
    with (folder / "vllm.log").open("w") as log:
        process = subprocess.Popen(
            list(map(str, command)), stdout=log, stderr=log, env=vllm_environment(options.threads, cache_gib=1)
        )
    try:
        until = time.monotonic() + PATIENCE_S
        while not _is_ready(port):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError((folder / "vllm.log").read_text()[-4000:])
            time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait(60)


def _is_ready(port: int) -> bool:
    try:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
    except OSError:
        return False


def beside_vllm(folder: Path, groups: list[list[Rollout]], options: argparse.Namespace) -> Iterator[Row]:
    """Both servers with the same requests of vLLM's protocol, in turns."""
    asking = pooling(groups, "model")
    with served(folder, options, options.dtype) as own, vllm_served(options.vllm, folder, options) as port:
        servers = {"vhead": partial(asked, own.port, asking), "vLLM": partial(asked, port, asking)}
        for number in range(options.rounds + 1):
            for name, ask in servers.items():
                row = {"round": number, "server": name, "requests": len(groups), "seconds": ask()}
                if number:
                    yield {**row, "load": load_average()}


def _groups(rollouts: list[Rollout]) -> list[list[Rollout]]:
    return [list(group) for _, group in groupby(rollouts, key=lambda rollout: bytes(rollout.prompt))]


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "serving", rounds=3, layers=4, prompts=32, completions=4)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help="the interpreter of an environment with vLLM")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    groups = _groups(log_normal(options.prompts, options.completions))
    bundled = _groups([as_ids(rollout) for rollout in texts(2 * options.prompts, options.completions)])
    works = {"work": sizes([*chain(*groups)]), "bundled_work": sizes([*chain(*bundled)])}
    figures = Figures(options, clients=CLIENTS, layers=options.layers, dtype=options.dtype, **works)
    with tempfile.TemporaryDirectory() as folder:
        model = qwen2_classifier(Path(folder) / "model", options.layers, options.dtype)
        figures.add("qwen2", measured(model, groups, options, options.dtype))
        figures.add("bundled", measured(Path(demo_model_path()), bundled, options, "float32"))
        if options.vllm:
            figures.add("vllm", beside_vllm(model, groups, options))
    figures.close(report.serving)


if __name__ == "__main__":
    _main()
