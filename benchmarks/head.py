"""Measures the head against TRL's, plain torch, and a pass that only reads the same bytes: see README.md here."""

import argparse
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accuracy import bias_errors, errors, saved_bytes
from measure import interleaved, load_average, provenance, quantiles
from peers import DROPOUT, Forward, Peer, Weights, all_peers, read_passes
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((8192, 2048), (8192, 896), (8192, 4096), (1, 2048), (1, 4096))
TINY = (4, 16)
TRAINED_SHAPES = ((8192, 2048), (8192, 896), (8192, 4096))
SEEDS = (1, 2, 3)
BIAS_DRAWS = 300
RESULTS = Path(__file__).parent / "results" / "head.json"

Row = dict[str, object]
Document = dict[str, list[Row]]


@dataclass(frozen=True)
class Case:
    """Hidden states [N, H] of one dtype, and the head over them."""

    hidden: Tensor
    weights: Weights
    peers: list[Peer]

    @classmethod
    def draw(cls, shape: tuple[int, int], dtype: torch.dtype) -> "Case":
        """Standard normal hidden states, default weights."""
        torch.manual_seed(0)
        weights = Weights.draw(shape[1])
        return cls(torch.randn(shape).to(dtype), weights, all_peers(weights))

    @property
    def label(self) -> Row:
        """The columns that name this case."""
        return {"shape": list(self.hidden.shape), "dtype": str(self.hidden.dtype).removeprefix("torch.")}


def time_inference(case: Case, rounds: int) -> Iterator[Row]:
    """Forward in eval mode under `no_grad`, beside the reading passes."""
    works = {peer.name: partial(peer.at(0.0), case.hidden) for peer in case.peers}
    with torch.no_grad():
        yield from _timed(case, "inference", works | read_passes(case.hidden), rounds)


def time_call(case: Case, rounds: int) -> Iterator[Row]:
    """The same on an input so small that only the cost of a call is left; torch's own `linear` is the floor."""
    weight, bias = case.weights.weight.to(case.hidden.dtype), case.weights.bias.to(case.hidden.dtype)
    works = {peer.name: partial(peer.at(0.0), case.hidden) for peer in case.peers}
    works["linear"] = partial(torch.nn.functional.linear, case.hidden, weight, bias)
    with torch.no_grad():
        yield from _timed(case, "call", works, rounds)


def time_training(case: Case, rounds: int) -> Iterator[Row]:
    """Forward and backward with dropout: the gradients of hidden states, weight and bias, into fresh memory."""
    leaf, grad_values = case.hidden.clone().requires_grad_(), torch.randn(case.hidden.shape[0])

    def step(forward: Forward, parameters: tuple[Tensor, Tensor]) -> object:
        values = forward(leaf)
        return torch.autograd.grad(values, (leaf, *parameters), grad_values.view_as(values))

    works = {peer.name: partial(step, peer.at(DROPOUT), peer.parameters) for peer in case.peers}
    yield from _timed(case, "training", works, rounds)


def _timed(case: Case, mode: str, works: dict[str, Callable[[], object]], rounds: int) -> Iterator[Row]:
    size = case.hidden.nbytes
    before = load_average()
    for name, seconds in interleaved(works, rounds).items():
        row = {"mode": mode, **case.label, "implementation": name, **quantiles(seconds), "rounds": rounds}
        row["gb_per_s"] = size / float(row["p50_us"]) / 1e3
        yield row | {"load_before": before, "load_after": load_average()}


def memory(case: Case) -> Iterator[Row]:
    """What a training forward keeps, beyond the hidden states and the parameters."""
    for peer in case.peers:
        yield {**case.label, "implementation": peer.name, "saved_bytes": saved_bytes(peer, case.hidden, DROPOUT)}


def accuracy(case: Case) -> Iterator[Row]:
    """Errors against float64 without dropout and with each peer's own mask."""
    narrow = case.hidden[:, : TINY[1]].contiguous()
    for dropout in (0.0, DROPOUT):
        for peer in all_peers(Weights.draw(TINY[1])):
            row = bias_errors(peer, narrow, dropout, BIAS_DRAWS)
            yield {**case.label, "dropout": dropout, "seed": None, "implementation": peer.name, **row}
        for seed in SEEDS:
            for peer in case.peers:
                for row in errors(peer, case.hidden, case.weights, dropout, seed):
                    yield {**case.label, "dropout": dropout, "seed": seed, "implementation": peer.name, **row}


def measure(dtype: torch.dtype, rounds: int, threads: int) -> Document:
    """Every case of one dtype, in a process of its own."""
    torch.set_num_threads(threads)
    times = [row for shape in SHAPES for row in _timings(shape, dtype, rounds)]
    times += time_call(Case.draw(TINY, dtype), rounds)
    case = Case.draw(SHAPES[0], dtype)
    return {"times": times, "saved": list(memory(case)), "errors": list(accuracy(case))}


def _timings(shape: tuple[int, int], dtype: torch.dtype, rounds: int) -> Iterator[Row]:
    case = Case.draw(shape, dtype)
    yield from time_inference(case, rounds)
    if shape in TRAINED_SHAPES:
        yield from time_training(case, rounds)
    print(dtype, shape, "measured", flush=True)


def measure_all(rounds: int, threads: int) -> Document:
    """Every dtype, one fresh process after the other: what the allocator keeps of one must not serve the next."""
    document: Document = {"times": [], "saved": [], "errors": []}
    spawn = multiprocessing.get_context("spawn")
    for dtype in DTYPES:
        with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as process:
            for name, rows in process.submit(measure, dtype, rounds, threads).result().items():
                document[name] += rows
    return document


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    source = provenance(options.threads, options.rounds) | {"load_before": load_average()}
    measured = measure_all(options.rounds, options.threads)
    source["load_after"] = load_average()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"provenance": source} | measured, indent=1) + "\n")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
