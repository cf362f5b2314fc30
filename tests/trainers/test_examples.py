"""The examples run, learn what they say they learn, and save what loads."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from tests.library_versions import TRANSFORMERS
from vhead import AutoModelForCausalLMWithValueHead

EXAMPLES = Path(__file__).parents[2] / "examples"
# Examples are run as users run them: with the warnings of the libraries that they call.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs an example in an empty folder and returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(name, *words):
        monkeypatch.setattr(sys, "argv", [name, *words])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def numbers(line):
    return [float(word) for word in re.findall(r"-?\d+\.\d+", line)]


def line_with(text, printed):
    (line,) = [line for line in printed.splitlines() if text in line]
    return line


def assert_saved(printed, folder):
    assert "saved; head read from" in printed
    assert AutoModelForCausalLMWithValueHead.from_pretrained(folder).head_source is not None


def test_accelerate_loop(run):
    pytest.importorskip("accelerate")
    printed = run("accelerate_loop.py")
    (fresh,) = numbers(line_with("with a fresh head", printed))
    (trained,) = numbers(line_with("with the trained one", printed))
    assert fresh < 0.3
    assert trained > 0.5
    assert_saved(printed, "critic")
    assert (Path("critic") / "state").is_dir()


def test_pairwise_reward_model(run):
    printed = run("pairwise_reward_model.py")
    first, last = numbers(line_with("pairwise loss", printed))
    assert last < 0.1 * first
    pairs = [numbers(line) for line in printed.splitlines() if "rejected" in line]
    assert len(pairs) == 3
    assert all(chosen > rejected for chosen, rejected in pairs)
    assert "value_head.safetensors" in line_with("saved:", printed)


@pytest.mark.skipif(
    Version("4.53") > TRANSFORMERS or Version("2.6") > Version(torch.__version__),
    reason="rows packed on any attention: transformers >= 4.53 with torch >= 2.6",
)
def test_verl_critic(run):
    printed = run("verl_critic.py", "--steps", "2")
    first, last = numbers(line_with("value loss", printed))
    assert last < 0.9 * first
    assert_saved(printed, "critic")


def test_llama_factory_training(run):
    pytest.importorskip("llamafactory")
    printed = run("llama_factory_training.py")
    first, last = numbers(line_with("pairwise loss", printed))
    assert last < first
    assert "value_head.safetensors" in line_with("saved:", printed)
