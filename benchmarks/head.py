"""Measures the head against TRL's, plain torch, and a pass that only reads the same bytes: see README.md here."""

import argparse
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from accuracy import bias_errors, errors
from measure import load_average, provenance
from peers import all_peers, read_passes

from vhead.benchmark.cases import Case, kept_bytes, time_call, time_inference, time_training
from vhead.benchmark.document import Document, Row
from vhead.benchmark.peers import DROPOUT, Weights

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((8192, 2048), (8192, 896), (8192, 4096), (1, 2048), (1, 4096))
TINY = (4, 16)
TRAINED_SHAPES = ((8192, 2048), (8192, 896), (8192, 4096))
SEEDS = (1, 2, 3)
BIAS_DRAWS = 300
RESULTS = Path(__file__).parent / "results" / "head.json"

Rows = dict[str, list[Row]]


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


def measure(dtype: torch.dtype, rounds: int, threads: int) -> Rows:
    """Every case of one dtype, in a process of its own."""
    torch.set_num_threads(threads)
    times = [row for shape in SHAPES for row in _timings(shape, dtype, rounds)]
    times += time_call(Case.draw(TINY, dtype, all_peers, rounds))
    case = Case.draw(SHAPES[0], dtype, all_peers, rounds)
    return {"times": times, "saved": list(kept_bytes(case)), "errors": list(accuracy(case))}


def _timings(shape: tuple[int, int], dtype: torch.dtype, rounds: int) -> Iterator[Row]:
    case = Case.draw(shape, dtype, all_peers, rounds)
    yield from time_inference(case, read_passes(case.hidden))
    if shape in TRAINED_SHAPES:
        yield from time_training(case)
    print(dtype, shape, "measured", flush=True)


def measure_all(document: Document, rounds: int, threads: int) -> None:
    """Every dtype, one fresh process after the other: what the allocator keeps of one must not serve the next."""
    spawn = multiprocessing.get_context("spawn")
    for dtype in DTYPES:
        with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as process:
            for name, rows in process.submit(measure, dtype, rounds, threads).result().items():
                getattr(document, name).extend(rows)


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    document = Document(provenance(options.threads, options.rounds) | {"load_before": load_average()})
    measure_all(document, options.rounds, options.threads)
    document.provenance["load_after"] = load_average()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    document.save(options.output)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
