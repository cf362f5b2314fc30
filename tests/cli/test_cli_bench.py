"""`vhead bench`: what it prints and writes, and how it ends."""

import json

import pytest
import torch

from tests.typer_runner import RUNNER
from vhead.benchmark import comparison
from vhead.cli.app import app
from vhead.ops import value_head

TINY = ("bench", "--device", "cpu", "--quick", "--shape", "16x24", "--dtype", "float16", "--rounds", "2")


def run(*arguments):
    return RUNNER.invoke(app, arguments, env={"COLUMNS": "120"})


def test_prints_bits_checks_and_times_and_writes_them(tmp_path):
    output = tmp_path / "bench.json"
    done = run(*TINY, "--output", str(output))
    assert done.exit_code == 0, done.stderr
    assert "device       cpu: " in done.stdout
    assert "bits         equal to the CPU's: values, grad_hidden" in done.stdout
    assert "check        masks follow torch.manual_seed: holds" in done.stdout
    for title in ("forward\n", "forward, dropout 0.1\n", "backward, dropout 0.1\n", "forward and backward, dropout"):
        assert any(line.strip().startswith(title.strip()) for line in done.stdout.splitlines())
    assert done.stdout.count("16 x 24 float16") == 4
    assert "trl path, x" in done.stdout
    assert f"all figures are in {output}" in done.stderr
    rows = json.loads(output.read_text())["times"]
    assert {(tuple(row["shape"]), row["dtype"], row["rounds"]) for row in rows} == {((16, 24), "float16", 2)}


def test_a_bit_that_differs_is_said_and_is_a_failure(monkeypatch, tmp_path):
    def broken(hidden, weight, bias=None, **mask):
        return value_head(hidden, weight, bias, **mask) * (1 + 2**-23)

    compare = comparison.compare_with_cpu
    monkeypatch.setattr(comparison, "compare_with_cpu", lambda device, plan: compare(device, plan, broken))
    output = tmp_path / "bench.json"
    done = run(*TINY, "--output", str(output))
    assert done.exit_code == 1
    assert "NOT equal: values in float32" in done.stdout
    assert "equal to the CPU's" not in done.stdout
    rows = json.loads(output.read_text())["comparisons"]
    assert any(row["differing"] for row in rows), "the figures are kept"


def test_a_check_that_does_not_hold_is_a_failure(monkeypatch):
    from vhead.benchmark import checks

    monkeypatch.setattr(checks, "CHECKS", {"masks are drawn": lambda device: "they are not"})
    done = run(*TINY)
    assert done.exit_code == 1
    assert "check        masks are drawn: does NOT hold: they are not" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_that_is_not_there_is_one_line():
    done = run("bench", "--device", "cuda")
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].startswith("vhead: device: CUDA was asked for, and torch ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shape", "16"), "expected NxH such as 8192x2048, got '16'"),
        (("--shape", "0x8"), "expected NxH such as 8192x2048, got '0x8'"),
        (("--dtype", "float64"), "float64"),
        (("--rounds", "1"), "--rounds"),
        (("--output", "/no/such/folder/bench.json"), "no such folder"),
    ],
)
def test_wrong_usage(arguments, message):
    done = run("bench", *arguments)
    assert done.exit_code == 2
    assert message in done.stderr


def test_threads_are_torch_s(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    assert run(*TINY, "--num-threads", "3").exit_code == 0
    assert asked == [3]
