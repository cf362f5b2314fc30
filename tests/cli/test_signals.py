"""SIGINT and SIGTERM end a command at once, whatever it waits for: input, a reader of its output, or the model."""

import fcntl
import os
import signal
import struct
import termios
import time
from collections.abc import Iterator

import pytest

from tests.forked_commands import RECORD, Forks, draining, feeding
from vhead.demo import demo_model_path

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
# Waiting for a hang to be one; `make attack` asks for a second.
PATIENCE_S = 10.0
# What keeps torch much longer than that, without a line of Python in between.
COMPUTES = """
from vhead.scoring.engine import Engine
def compute(*_arguments):
    matrix = torch.randn(5000, 5000)
    sys.stdout.write("computing")
    sys.stdout.flush()
    torch.linalg.svd(matrix)
Engine.score = compute
"""
# The signal comes while a `__del__` runs, which Python never lets raise.
DELETES = """
import time
from vhead.scoring.engine import Engine
class Slow:
    def __del__(self):
        os.write(1, b"deleting")
        time.sleep(0.3)
        for _ in range(1000):
            pass
def compute(*_arguments):
    try:
        del_me = Slow()
        del del_me
        while True:
            time.sleep(0.01)
    finally:
        os.write(1, b"asked")
Engine.score = compute
"""
# The signal comes in the middle of a library's call, which makes an error of its own of what it raises.
TURNS = """
import time
from vhead.errors import LoadError
from vhead.scoring.engine import Engine
def compute(*_arguments):
    os.write(1, b"computing")
    try:
        time.sleep(30)
    except SystemExit:
        raise LoadError("could not determine the shape") from None
Engine.score = compute
"""
# Without the thread that ends the process where it does not end by itself.
ASKS_ONLY = """
from vhead.cli.signals import Signals
Signals._insist = lambda self: None
"""

both = pytest.mark.parametrize("sent", list(CODES))


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture
def score():
    """The command that writes each record's scores as soon as it has read it."""
    return [
        "score",
        "-",
        "-m",
        demo_model_path(),
        "-o",
        "-",
        "--returns",
        "reward",
        "--chunk-tokens",
        1,
        "--device",
        "cpu",
    ]


def unread(stream: int) -> int:
    return struct.unpack("i", fcntl.ioctl(stream, termios.FIONREAD, bytes(4)))[0]


def until_scored(command, records=1):
    os.write(command.stdin, RECORD * records)
    assert b"reward" in os.read(command.stdout, 1000)


def check_ended(command, sent):
    assert command.send(sent) < PATIENCE_S
    assert (command.wait(), command.errors()) == (CODES[sent], "vhead: interrupted\n")


@both
def test_an_idle_pipe_does_not_keep_a_signal_waiting(forks, score, sent):
    with forks.run(*score) as command:
        until_scored(command)
        check_ended(command, sent)


@both
def test_a_busy_pipe_does_not_keep_a_signal_waiting(forks, score, sent):
    with forks.run(*score) as command:
        until_scored(command)
        with feeding(command), draining(command):
            time.sleep(0.1)
            check_ended(command, sent)


@both
def test_a_computing_model_does_not_keep_a_signal_waiting(forks, score, sent):
    with forks.run(*score, before=COMPUTES) as command:
        os.write(command.stdin, RECORD)
        assert os.read(command.stdout, 100) == b"computing"
        check_ended(command, sent)


@both
def test_a_signal_in_the_middle_of_a_del_is_not_dropped(forks, score, sent):
    with forks.run(*score, before=DELETES) as command:
        os.write(command.stdin, RECORD)
        assert os.read(command.stdout, 100) == b"deleting"
        check_ended(command, sent)
        assert os.read(command.stdout, 100) == b"asked"


@both
def test_an_error_that_a_library_makes_of_a_signal_is_not_told(forks, score, sent):
    with forks.run(*score, before=TURNS) as command:
        os.write(command.stdin, RECORD)
        assert os.read(command.stdout, 100) == b"computing"
        check_ended(command, sent)
        assert os.read(command.stdout, 1000) == b""


def test_the_check_can_fail_where_nobody_insists(forks, score):
    with forks.run(*score, before=COMPUTES + ASKS_ONLY) as command:
        os.write(command.stdin, RECORD)
        assert os.read(command.stdout, 100) == b"computing"
        time.sleep(0.2)
        os.kill(command.pid, signal.SIGTERM)
        with pytest.raises(TimeoutError):
            command.wait(1.5)


def test_output_that_nobody_reads_does_not_keep_a_signal_waiting(forks, score):
    with forks.run(*score, "--chunk-tokens", 1000) as command:
        until_scored(command, records=100)
        with feeding(command):
            before = -1
            while (now := unread(command.stdout)) > before:
                before = now
                time.sleep(0.5)
            check_ended(command, signal.SIGTERM)


def test_a_swallowed_exception_does_not_keep_a_process_alive(forks, score):
    swallows = """
from vhead.scoring.engine import Engine
def compute(*_arguments):
    sys.stdout.write("computing")
    sys.stdout.flush()
    while True:
        try:
            import time; time.sleep(60)
        except BaseException:
            pass
Engine.score = compute
"""
    with forks.run(*score, before=swallows) as command:
        os.write(command.stdin, RECORD)
        assert os.read(command.stdout, 100) == b"computing"
        check_ended(command, signal.SIGINT)


def test_an_ignored_interrupt_stays_ignored(forks, score):
    with forks.run(*score, before="import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)") as command:
        until_scored(command)
        os.kill(command.pid, signal.SIGINT)
        until_scored(command)
        check_ended(command, signal.SIGTERM)


def test_a_bad_record_on_an_open_pipe_is_said_at_once(forks, score):
    with forks.run(*score) as command:
        until_scored(command)
        os.write(command.stdin, b'{"prompt": 5, "completion": "x"}\n')
        assert command.wait() == 1
        assert command.errors().startswith("vhead: -: line 2: prompt: expected text")
