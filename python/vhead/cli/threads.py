"""How many threads a command computes with, and how they wait for each other.

OpenMP reads the environment once, when torch is loaded. Unless it is told otherwise, its threads spin while they wait,
which makes everything many times slower on a machine that has other work too, and there are as many of them as there
are cores, whatever a container's quota leaves of these. A command says otherwise, unless its user has said something.
"""

import os
from collections.abc import MutableMapping

from vhead.env import available_cores

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
COUNTING = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")

# Why a variable has the value that it was given here.
reasons: dict[str, str] = {}


def choose(environment: MutableMapping[str, str] = os.environ) -> None:
    """Tells OpenMP how to wait, and how many cores there are where it cannot know that; before torch is loaded."""
    if environment.keys().isdisjoint(WAITING):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
        reasons["OMP_WAIT_POLICY"] = "threads that spin while they wait are slow on a busy machine"
    cores = available_cores()
    if cores < _by_affinity() and environment.keys().isdisjoint(COUNTING):
        environment["OMP_NUM_THREADS"] = str(cores)
        reasons["OMP_NUM_THREADS"] = "what the container's quota leaves"


def described_cores() -> str:
    """The cores that this process may use, and what keeps it from using the others."""
    machine, allowed, cores = os.cpu_count() or 1, _by_affinity(), available_cores()
    limits = [f"{allowed} by affinity"] if allowed < machine else []
    limits += [f"{cores} by the container's quota"] if cores < allowed else []
    return f"{cores} of {machine} ({', '.join(limits)})" if limits else str(cores)


def _by_affinity() -> int:
    return len(os.sched_getaffinity(0))
