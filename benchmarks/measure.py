"""Timing in turns, and what a reader needs to know about where the figures come from."""

import gc
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

Work = Callable[[], object]

ROOT = Path(__file__).parent.parent
# Settings of the environment that change what is measured.
SETTINGS = ("OMP_", "MKL_", "KMP_", "MALLOC_", "VHEAD_")
# What runs here, whose uncommitted changes would make a figure nobody's.
MEASURED = ("rust", "python/vhead", "benchmarks/*.py")


def interleaved(contestants: Mapping[str, Work], rounds: int, block_s: float = 0.002) -> dict[str, list[float]]:
    """Seconds per call of each contestant, one figure a round.

    In a round all take turns in random order, so that a noisy machine is noisy for all of them. A turn is one call that
    is not timed, which leaves the caches as this contestant leaves them, then as many as fill `block_s`.
    """
    calls = {name: max(1, int(block_s / max(seconds_per_call(work, 1), 1e-9))) for name, work in contestants.items()}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    order, shuffle = list(contestants), random.Random(0)  # noqa: S311, not a secret
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle.shuffle(order)
            for name in order:
                contestants[name]()
                times[name].append(seconds_per_call(contestants[name], calls[name]))
    finally:
        gc.enable()
    return times


def seconds_per_call(work: Work, calls: int) -> float:
    """The mean of `calls` calls."""
    start = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - start) / calls


def quantiles(seconds: list[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile, in microseconds."""
    cuts = statistics.quantiles(seconds, n=10, method="inclusive")
    return {"p20_us": cuts[1] * 1e6, "p50_us": cuts[4] * 1e6, "p80_us": cuts[7] * 1e6}


def provenance(threads: int, rounds: int) -> dict[str, object]:
    """The machine, the versions and the commit."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_sources": bool(_git("status", "--porcelain", "--", *MEASURED)),
        "cpu": _cpu_field("model name"),
        "cores": os.cpu_count(),
        "simd": sorted(f for f in _cpu_field("flags").split() if f.startswith(("avx", "amx", "fma", "f16c"))),
        "caches": _caches(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "trl", "numpy", "vhead")},
        "torch_threads": threads,
        "rounds": rounds,
        "niceness": os.nice(0),
        "environment": {k: v for k, v in os.environ.items() if k.startswith(SETTINGS)},
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
    }


def load_average() -> float:
    """Processes that wanted a core over the last minute, this one included."""
    return os.getloadavg()[0]


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _cpu_field(name: str) -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "unknown")


def _caches() -> dict[str, str]:
    caches = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")
    return {
        f"L{(c / 'level').read_text().strip()} {(c / 'type').read_text().strip()}": (c / "size").read_text().strip()
        for c in caches
    }
