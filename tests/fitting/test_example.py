"""The example of a warm start says what its documentation says."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from vhead import AutoModelForCausalLMWithValueHead

EXAMPLE = Path(__file__).parents[2] / "examples" / "critic_warm_start.py"


@pytest.mark.filterwarnings("ignore")  # Examples are run as users run them.
def test_a_warm_critic_explains_what_a_fresh_one_does_not(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["critic_warm_start.py", "--steps", "5"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    fresh, fitted, promised, trained = (float(word) for word in re.findall(r"[+-]\d\.\d{3}", printed))
    assert fresh == pytest.approx(0.0, abs=1e-3)
    assert fitted > 0.25
    assert promised > 0.15
    assert trained < fitted
    assert AutoModelForCausalLMWithValueHead.from_pretrained("warm_critic").head_source is not None
