"""Measures `vhead.fit` beside scoring the same rollouts, and how its memory grows: about three minutes.

    python benchmarks/fitting.py

Time: fit and score take turns in one process, on the group workload with Qwen2-0.5B's shape and four layers.
Memory: the process's peak after 10^4, 10^5 and 10^6 completion tokens, by a small model.
"""

import json
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from workloads import log_normal, qwen2, small_llama

import vhead
from vhead import AutoModelForCausalLMWithValueHead, Rollout, Scorer
from vhead.benchmark.machine import provenance
from vhead.benchmark.timing import load_average

ROUNDS = 5
RESULTS = Path(__file__).parent / "results" / "fitting.json"
SIZES = (10**4, 10**5, 10**6)
COMPLETION = 100


def timed(dtype: torch.dtype) -> dict[str, object]:
    """Seconds of scoring values alone and of fitting, and their ratio, round by round."""
    model = AutoModelForCausalLMWithValueHead.from_pretrained(qwen2(4).to(dtype)).eval()
    scorer, rollouts = Scorer(model), log_normal(4, 8)
    rewards = np.random.default_rng(0).normal(size=len(rollouts)).tolist()
    times: dict[str, list[float]] = {"score": [], "fit": []}
    for _ in range(ROUNDS + 1):
        times["score"].append(seconds(lambda: scorer.score(rollouts, ("values",))))
        times["fit"].append(seconds(lambda: vhead.fit(scorer, rollouts, rewards, folds=2, strengths=1.0)))
    scored, fitted = (times[name][1:] for name in ("score", "fit"))
    ratio = statistics.median(b / a for a, b in zip(scored, fitted, strict=True))
    return {"dtype": str(dtype), "score": scored, "fit": fitted, "ratio": ratio}


def seconds(action: Callable[[], object]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def drawn(tokens: int) -> Iterator[Rollout]:
    """Rollouts with so many completion tokens, made one by one."""
    rng = np.random.default_rng(0)
    for _ in range(tokens // COMPLETION):
        yield Rollout(rng.integers(0, 256, 10), rng.integers(0, 256, COMPLETION))


def peaks() -> list[dict[str, float]]:
    """Peak MiB of the process after fits of growing size."""
    scorer = Scorer(AutoModelForCausalLMWithValueHead.from_pretrained(small_llama(256)).eval())
    found = []
    for tokens in SIZES:
        rng = np.random.default_rng(1)
        vhead.fit(scorer, drawn(tokens), (float(rng.normal()) for _ in range(tokens // COMPLETION)))
        found.append({"tokens": tokens, "MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024})
        print(f"{tokens:>9,} tokens: peak {found[-1]['MiB']:,.0f} MiB", flush=True)
    return found


def main() -> None:
    """Measures, prints and stores."""
    document: dict[str, object] = {
        **provenance(torch.get_num_threads(), ROUNDS),
        "load": load_average(),
        "memory": peaks(),
    }
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        row = timed(dtype)
        rows.append(row)
        print(f"{dtype}: fit takes {row['ratio']:.3f} times as long as scoring values", flush=True)
    RESULTS.write_text(json.dumps(document | {"time": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
