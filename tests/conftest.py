"""What every test shares: no network, one thread, fixed seeds, and two Hypothesis profiles."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

# From here the code of a test in a process of its own finds `tests`.
ROOT = Path(__file__).parent.parent

# Read when torch and huggingface_hub are first imported, so set before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# The golden files are our own, and pickled ones of them are read on torch before 2.6 as well.
os.environ["VHEAD_ALLOW_PICKLE"] = "1"
# A measurement would batch differently from run to run.
os.environ["VHEAD_TOKEN_BUDGET"] = "2048"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A shell starts background jobs with Ctrl-C ignored, and their children inherit that: its tests would see nothing.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# `fast` runs the same examples every time; HYPOTHESIS_PROFILE=slow searches new ones.
hypothesis.settings.register_profile("fast", max_examples=20, deadline=None, derandomize=True)
hypothesis.settings.register_profile("slow", max_examples=1000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


@pytest.fixture(autouse=True)
def seed() -> None:
    """Seeds torch's generator, without importing torch for the tests that do not use it."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def transformers_logging() -> Iterator[None]:
    """Undoes what a test, or a command that it runs, does to transformers' logger."""
    logger = logging.getLogger("transformers")
    # Not set yet means not imported yet: a test's first import sets it to WARNING.
    level, handlers, propagates = logger.level or logging.WARNING, list(logger.handlers), logger.propagate
    yield
    if "transformers" in sys.modules:
        logger.setLevel(level)
    if handlers:
        logger.handlers, logger.propagate = handlers, propagates


@pytest.fixture
def fresh_python() -> Callable[[str], str]:
    """Runs code in a new interpreter and returns what it printed; fails with its traceback."""

    def run(code: str) -> str:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run
