"""The scripts of `benchmarks/`: they start, they run on small workloads, and the committed pages are theirs."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vhead.benchmark.run import Request, run
from vhead.benchmark.trl_head import trl_absence

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RESULTS = sorted((BENCHMARKS / "results").glob("*.json"))


def python(*words: object) -> str:
    """What Python prints for these words, started in the folder of the scripts."""
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=BENCHMARKS, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_pages_are_what_the_committed_figures_give(tmp_path):
    copies = [Path(shutil.copy(path, tmp_path)) for path in RESULTS]
    assert len(copies) >= 9
    python("report.py", *copies)
    for path, copy in zip(RESULTS, copies, strict=True):
        assert copy.with_suffix(".md").read_text() == path.with_suffix(".md").read_text()


def test_a_file_of_vhead_bench_gets_a_page(tmp_path):
    document = run(Request.usual("cpu", shapes=((16, 24),), dtypes=(torch.bfloat16,), rounds=2, quick=True))
    document.save(tmp_path / "bench.json")
    python("report.py", tmp_path / "bench.json")
    page = (tmp_path / "bench.md").read_text()
    assert "| inference | [16, 24] | bfloat16 | " in page
    assert "| grad_weight, frozen trunk | bfloat16 | " in page
    assert "masks follow torch.manual_seed: holds." in page
    assert "goal" not in page, "the goals are about other shapes"


@pytest.mark.slow
def test_every_script_starts_and_every_way_of_scoring_runs():
    scripts = {path.stem for path in BENCHMARKS.glob("*.py")}
    if importlib.util.find_spec("matplotlib") is None:
        scripts.remove("chart")
    assert len(scripts) >= 10
    lines = (
        f"import {', '.join(sorted(scripts))}",
        "from vhead.benchmark.trl_head import trl_absence",
        "body, rollouts = workloads.small_llama(1024), workloads.Grid(1024, 2, 2, 4, 4).rollouts()",
        "found = [*contestants.peers(), *contestants.ablations()]",
        "ways = [way for way in found if not (way.name.startswith('trl') and trl_absence())]",
        "print(len([way.make(body, rollouts)(fields) for way in ways for fields in way.fields]))",
    )
    assert int(python("-c", "\n".join(lines)).split()[-1]) >= (28 if trl_absence() else 30)


@pytest.mark.slow
def test_the_scorer_is_measured_beside_those_that_are_named(tmp_path):
    output = tmp_path / "scoring-long-bfloat16.json"
    counts = ("--layers", 1, "--prompts", 1, "--completions", 1, "--rounds", 1, "--threads", 1, "--slow-rounds", 0)
    named = ("--contestants", "vhead", "bare GEMM", "trl, forward only")
    printed = python("scoring.py", "peers", "--workload", "long", *counts, "--output", output, *named)
    times = json.loads(output.read_text())["times"]
    assert [row["contestant"] for row in times].count("vhead") == 3
    assert {row["contestant"] for row in times} == {"vhead", "bare GEMM"}, "slow ones take part in no round"
    assert output.with_suffix(".md").read_text() in printed
    assert "| vhead as it is: " in printed


def test_what_cannot_be_measured_is_said():
    lines = (
        "import sys, argparse, pathlib, torch, contestants, scoring, workloads, vllm_peer",
        "try: scoring._chosen(argparse.Namespace(contestants=['vhead', 'trl forward']), contestants.peers())",
        "except SystemExit as error: print(error)",
        "body, python = workloads.small_llama(64), pathlib.Path(sys.executable)",
        "try: vllm_peer.VllmServer(python, body, torch.nn.Linear(256, 1), workloads.Grid(64, 1, 1, 2, 2).rollouts())",
        "except RuntimeError as error: print(error)",
    )
    printed = python("-c", "\n".join(lines))
    assert "'trl, forward only', got 'trl forward'" in printed
    assert "vLLM ended without an answer" in printed
    assert "No module named 'vllm'" in printed


@pytest.mark.slow
def test_what_the_scorer_adds_to_its_model_is_measured(tmp_path):
    output = tmp_path / "overhead.json"
    counts = ("--prompts", 1, "--completions", 2, "--threads", 1, "--rounds", 1)
    python("scoring.py", "overhead", *counts, "--output", output)
    figures = json.loads(output.read_text())
    assert len(figures["times"]) == 7
    assert figures["provenance"]["workload"]["computed_tokens"] > figures["provenance"]["workload"]["batches"] > 0
    assert "| `Scorer.stream` of text | " in output.with_suffix(".md").read_text()
