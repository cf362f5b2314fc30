"""Where the figures come from, with the commit; timing itself is `vhead bench`'s."""

import subprocess
from pathlib import Path

from vhead.benchmark import machine
from vhead.benchmark.timing import interleaved, load_average, quantiles

__all__ = ["ROOT", "interleaved", "load_average", "provenance", "quantiles"]

ROOT = Path(__file__).parent.parent
# What runs here, whose uncommitted changes would make a figure nobody's.
MEASURED = ("rust", "python/vhead", "benchmarks/*.py")


def provenance(threads: int, rounds: int) -> dict[str, object]:
    """The machine, the versions and the commit."""
    return {
        **machine.provenance(threads, rounds),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_sources": bool(_git("status", "--porcelain", "--", *MEASURED)),
    }


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
