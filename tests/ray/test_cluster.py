"""Ray for real: a cluster of two workers on this machine, in a process of its own."""

import importlib.util
import json
import os
import secrets
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.conftest import ROOT
from vhead import AutoModelForCausalLMWithValueHead, Rollout, Scorer
from vhead.demo import demo_model_path
from vhead.sync import Publisher

pytestmark = [
    pytest.mark.slow,
    # Seven processes start, four of which import torch: beside other work, that takes minutes on two cores.
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="ray is not installed; it comes with: pip install 'vhead[ray]'"
    ),
]
STEP = 7


@pytest.fixture(scope="module")
def trained() -> torch.nn.Module:
    """The bundled model with another head than its file holds."""
    model = AutoModelForCausalLMWithValueHead.from_pretrained(demo_model_path()).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.v_head.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def found(trained: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `cluster.py` wrote."""
    folder = tmp_path_factory.mktemp("ray")
    Publisher(folder / "published").publish(trained, step=STEP)
    output = folder / "found.json"
    command = [sys.executable, "-m", "tests.ray.cluster", str(output), str(folder / "published")]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "RAY_USAGE_STATS_ENABLED": "0",
        # Without it, Ray would write one into the home folder.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-10_000:]
    return json.loads(output.read_text())


def test_a_worker_killed_midway_loses_nothing_and_does_nothing_twice(found: dict[str, Any]) -> None:
    scored = found["processed"]["rows"]
    assert sorted(row["name"] for row in scored) == sorted(row["id"] for row in found["rows"])
    assert {row["pid"] for row in scored} - {found["processed"]["killed"]}, "another actor went on"


def test_actors_follow_published_weights(found: dict[str, Any], trained: torch.nn.Module) -> None:
    scored = {row["name"]: row for row in found["processed"]["rows"]}
    given = [row for row in found["rows"] if row["id"] != "bad"]
    assert {scored[row["id"]]["weights_step"] for row in given} == {STEP}
    rollouts = [Rollout(row["question"], row["answer"]) for row in given]
    rewards = [scored[row["id"]]["reward"] for row in given]
    assert rewards == pytest.approx(Scorer(trained).score(rollouts, ("reward",)).reward.tolist(), abs=1e-4)
    own = Scorer.from_pretrained(demo_model_path(), device="cpu").score(rollouts, ("reward",)).reward.tolist()
    assert rewards != pytest.approx(own, abs=1e-2)


def test_a_processor_s_functions_see_the_good_rows_and_the_bad_one_says_why(found: dict[str, Any]) -> None:
    scored = {row["name"]: row for row in found["processed"]["rows"]}
    bad = scored.pop("bad")
    assert {row["__inference_error__"] for row in scored.values()} == {""}
    assert all("prompt_ids" not in row or row["prompt_ids"] is None for row in scored.values())
    assert "completion: expected token ids below the vocabulary's" in bad["__inference_error__"]
    assert bad["reward"] is None


def test_ray_serve_has_the_weights_the_routes_and_the_refusals_of_the_server(
    found: dict[str, Any], trained: torch.nn.Module
) -> None:
    served = found["served"]
    status, answer = served["scored"]
    expected = Scorer(trained).score([Rollout([1, 7, 9], [3, 5])], ("reward",)).reward.tolist()
    assert (status, answer["step"]) == (200, STEP)
    assert [row["reward"] for row in answer["scores"]] == pytest.approx(expected, abs=1e-4)
    assert served["no key"][0] == 401
    status, answer = served["unknown model"]
    assert (status, answer["error"]["message"]) == (404, "model: expected one of demo, got 'other'")
