"""Signals at any moment, on an idle and on a busy pipe: each ends the command within a second."""

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.attack.scale import scaled
from tests.forked_commands import Forks, draining, feeding
from vhead.demo import demo_model_path

TRIES = scaled(1, 50)
# A busy machine is no reason for the short form to fail: tests/cli/test_signals.py looks for hangs.
LIMIT_S = scaled(10, 1)
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    forks = Forks()
    yield forks
    forks.close()


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
@pytest.mark.parametrize("number", range(TRIES))
def test_a_signal_at_any_moment_ends_the_command(forks, number, busy):
    sent = list(CODES)[number % 2]
    command = ["score", "-", "-m", demo_model_path(), "-o", "-", "--returns", "reward", "--device", "cpu"]
    with forks.run(*command, "--chunk-tokens", 500) as process, ExitStack() as pipes:
        if busy:
            pipes.enter_context(feeding(process))
            pipes.enter_context(draining(process))
        # Spread over two seconds, of which loading takes about one.
        time.sleep(0.2 + number * 1.236 % 2)
        assert process.send(sent) < LIMIT_S
        assert (process.wait(), process.errors()) == (CODES[sent], "vhead: interrupted\n")
