"""Timing in turns, so that a noisy machine is noisy for every contestant."""

import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TypeAlias, TypeVar

import torch

Work: TypeAlias = Callable[[], object]
# Seconds per call of a work that is called so many times in a row.
Timer: TypeAlias = Callable[[Work, int], float]

Contestant = TypeVar("Contestant")


def host_seconds(work: Work, calls: int) -> float:
    """The mean of `calls` calls, by the clock."""
    start = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - start) / calls


def cuda_seconds(work: Work, calls: int, device: torch.device) -> float:
    """The mean of `calls` calls, by events on the device's current stream.

    What the host adds is in it only where the device waits for the host.
    """
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(calls):
            work()
        end.record()
        end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / calls


def clocked(work: Work) -> dict[str, float]:
    """Seconds of one call by the clock, and of the processors in all threads.

    Processor time is what a loaded machine leaves of a comparison: other programs' turns are not in it.
    """
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return {"wall_s": time.perf_counter() - wall, "processor_s": time.process_time() - processor}


def timer_of(device: torch.device) -> Timer:
    """How time is taken on a device."""
    return partial(cuda_seconds, device=device) if device.type == "cuda" else host_seconds


def turns(contestants: Iterable[Contestant], rounds: int) -> Iterator[tuple[int, Contestant]]:
    """Each contestant once in every round, in random order, with the round's number."""
    order, shuffle = list(contestants), random.Random(0)  # noqa: S311, not a secret
    for number in range(rounds):
        shuffle.shuffle(order)
        yield from ((number, contestant) for contestant in order)


def interleaved(
    contestants: Mapping[str, Work], rounds: int, block_s: float = 0.002, timer: Timer = host_seconds
) -> dict[str, list[float]]:
    """Seconds per call of each contestant, one figure a round.

    In a round all take turns in random order. A turn is one call that is not timed, which leaves the caches as this
    contestant leaves them, then as many as fill `block_s`.
    """
    for work in contestants.values():
        work()
    calls = {name: max(1, int(block_s / max(timer(work, 1), 1e-9))) for name, work in contestants.items()}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    gc.collect()
    gc.disable()
    try:
        for _, name in turns(contestants, rounds):
            contestants[name]()
            times[name].append(timer(contestants[name], calls[name]))
    finally:
        gc.enable()
    return times


def quantiles(seconds: list[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile, in microseconds."""
    cuts = statistics.quantiles(seconds, n=10, method="inclusive")
    return {"p20_us": cuts[1] * 1e6, "p50_us": cuts[4] * 1e6, "p80_us": cuts[7] * 1e6}


def load_average() -> float:
    """Processes that wanted a core over the last minute, this one included."""
    return os.getloadavg()[0]
