"""The script for people with a GPU, tried on the CPU: what it compares is the same."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vhead.benchmark import comparison, run
from vhead.ops import value_head

SCRIPT = Path(__file__).parents[2] / "tools" / "cuda_smoke.py"


@pytest.fixture
def smoke(monkeypatch):
    """The script as a module, on an input that takes no time."""
    monkeypatch.setattr(run, "QUICK_SHAPES", {"cpu": ((8, 16),)})
    monkeypatch.setattr(run, "QUICK_ROUNDS", 2)
    monkeypatch.setattr(comparison, "QUICK", (replace(comparison.QUICK[0], columns=(16,)),))
    spec = importlib.util.spec_from_file_location("cuda_smoke", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_goes_into_one_file(smoke, tmp_path, capsys):
    output = tmp_path / "smoke.json"
    assert smoke.main(["--device", "cpu", "--quick", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "bits         equal to the CPU's: values, grad_hidden" in printed
    assert "check        the head's own kernels run: holds" in printed
    assert "8 x 16 bfloat16" in printed
    written = json.loads(output.read_text())
    assert {"provenance", "times", "comparisons", "checks"} <= set(written)
    assert "cpu" in written["provenance"]["backends"]


def test_a_kernel_that_is_wrong_is_a_failure(smoke, tmp_path, capsys, monkeypatch):
    def broken(hidden, weight, bias=None, **mask):
        return value_head(hidden.clone(), weight * (1 - 2**-24), bias, **mask)

    compare = comparison.compare_with_cpu
    monkeypatch.setattr(comparison, "compare_with_cpu", lambda device, plans: compare(device, plans, broken))
    output = tmp_path / "smoke.json"
    assert smoke.main(["--device", "cpu", "--quick", "--output", str(output)]) == 1
    assert "NOT equal: values in bfloat16" in capsys.readouterr().out
    assert output.exists(), "what is wrong is what one wants to see"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(smoke, tmp_path, capsys):
    output = tmp_path / "smoke.json"
    assert smoke.main(["--output", str(output)]) == 1
    assert capsys.readouterr().err.startswith("device: CUDA was asked for, and torch ")
    assert not output.exists()


def test_without_a_compiler_the_rest_is_measured(smoke, capsys, monkeypatch):
    def no_compiler(_):
        raise RuntimeError("no compiler")

    request = run.Request.usual("cpu")
    monkeypatch.setattr(torch, "compile", lambda forward: forward)
    assert smoke.with_compiler(request).compiles
    monkeypatch.setattr(torch, "compile", no_compiler)
    assert not smoke.with_compiler(request).compiles
    assert "left out: compile: torch.compile does not work here: no compiler" in capsys.readouterr().err
