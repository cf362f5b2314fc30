"""How many threads a command has and how they wait: decided before torch is loaded, unless its user has decided."""

import os
import subprocess
import sys

import pytest

from tests.typer_runner import RUNNER
from vhead import env
from vhead.cli import threads
from vhead.cli.app import app


@pytest.fixture(autouse=True)
def reasons(monkeypatch):
    monkeypatch.setattr(threads, "reasons", {})


def test_threads_sleep_while_they_wait():
    environment: dict[str, str] = {}
    threads.choose(environment)
    assert environment == {"OMP_WAIT_POLICY": "PASSIVE"}


@pytest.mark.parametrize("name", threads.WAITING)
def test_what_the_user_has_said_about_waiting_stays(name):
    environment = {name: "whatever"}
    threads.choose(environment)
    assert environment == {name: "whatever"}


def test_a_container_s_quota_is_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(threads, "available_cores", lambda: 3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    environment: dict[str, str] = {}
    threads.choose(environment)
    assert environment["OMP_NUM_THREADS"] == "3"
    assert threads.described_cores() == "3 of 64 (8 by affinity, 3 by the container's quota)"


@pytest.mark.parametrize("name", threads.COUNTING)
def test_what_the_user_has_said_about_their_number_stays(monkeypatch, name):
    monkeypatch.setattr(threads, "available_cores", lambda: 0)
    environment = {name: "5"}
    threads.choose(environment)
    assert {name for name in environment if "THREADS" in name} == {name}
    assert environment[name] == "5"


def test_cores_are_those_that_affinity_leaves(fresh_python):
    code = "import os; os.sched_setaffinity(0, {0}); from vhead.env import available_cores; print(available_cores())"
    assert fresh_python(code) == "1"
    assert 1 <= env.available_cores() <= len(os.sched_getaffinity(0))


def test_env_says_what_was_set_and_why():
    environment = {name: value for name, value in os.environ.items() if name not in threads.WAITING}
    done = subprocess.run(
        [sys.executable, "-m", "vhead", "env"], env=environment, capture_output=True, text=True, check=True
    )
    facts = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    assert facts["cpu cores"].split()[0] == str(env.available_cores())
    expected = "PASSIVE (set by vhead: threads that spin while they wait are slow on a busy machine)"
    assert facts["OMP_WAIT_POLICY"].strip() == expected
    assert facts["OMP_NUM_THREADS"].strip() == os.environ["OMP_NUM_THREADS"]


@pytest.mark.parametrize("command", ["score", "bench"])
@pytest.mark.parametrize("number", [0, -1, 2**20, 2**62, 2**70])
def test_threads_that_no_machine_runs_are_wrong_usage(command, number, source):
    arguments = {"score": [str(source), "-m", "unused", "-o", "-"], "bench": []}[command]
    done = RUNNER.invoke(app, [command, *arguments, "--num-threads", str(number)])
    assert done.exit_code == 2
    assert "--num-threads" in done.stderr
