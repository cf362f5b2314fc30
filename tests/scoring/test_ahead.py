"""Reading ahead in a thread: order, back-pressure, errors, and ending early."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from vhead.scoring.ahead import Ahead


def running():
    return [thread for thread in threading.enumerate() if thread.name == "vhead-ahead"]


def gone():
    for _ in range(200):
        if not running():
            return True
        time.sleep(0.01)
    return False


def test_everything_in_order():
    with Ahead(iter(range(100))) as items:
        assert list(items) == list(range(100))
    assert gone()


def test_the_thread_waits_until_items_are_taken():
    made = []
    source = (made.append(item) or item for item in itertools.count())
    with Ahead(source, depth=1) as items:
        iterator = iter(items)
        assert next(iterator) == 0
        time.sleep(0.05)
        assert len(made) <= 3
        assert next(iterator) == 1
        time.sleep(0.05)
        assert len(made) <= 4
    assert gone()


def test_an_error_comes_after_the_items_before_it():
    def broken():
        yield 1
        raise OSError("the disk is gone")

    given = []
    with pytest.raises(OSError, match="the disk is gone"), Ahead(broken()) as items:
        given.extend(items)
    assert given == [1]
    assert gone()


def test_leaving_early_ends_the_thread():
    with Ahead(itertools.count()) as items:
        next(iter(items))
    assert gone()


def test_a_source_that_waits_for_ever_is_left_behind():
    release = threading.Event()

    def waits():
        yield 1
        release.wait()

    started = time.monotonic()
    with Ahead(waits()) as items:
        next(iter(items))
    assert time.monotonic() - started < 5
    release.set()
    assert gone()


SCRIPT = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from vhead.scoring.ahead import Ahead

def slow():
    yield 1
    print("waiting", flush=True)
    time.sleep(600)
    yield 2

try:
    with Ahead(slow()) as items:
        list(items)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.exit(130)
"""


def test_an_interrupt_ends_the_wait_for_the_next_item():
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "waiting\n"
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stdout.read() == "interrupted\n"
