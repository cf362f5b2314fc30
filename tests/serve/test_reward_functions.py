"""The example's reward functions: as trl calls them in a real training, and as verl and OpenRLHF call them."""

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest

from vhead import Rollout, Scorer
from vhead.demo.rollouts import read_demo_rollouts

EXAMPLE = Path(__file__).parents[2] / "examples" / "reward_functions.py"


@pytest.fixture
def functions(server, monkeypatch):
    monkeypatch.setenv("REWARD_URL", f"http://127.0.0.1:{server.port}")
    spec = importlib.util.spec_from_file_location("reward_functions", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    module.client().close()


@pytest.fixture(scope="module")
def prompts():
    return [rollout.prompt[-60:] for rollout in read_demo_rollouts()[:3]]


COMPLETIONS = [" is a list.", " of the", " returns None."]


@pytest.fixture(scope="module")
def expected(scorer: Scorer, prompts):
    found = scorer.score(list(map(Rollout, prompts, COMPLETIONS)), ("reward",)).reward.tolist()
    assert len(set(found)) == len(found)
    return found


def test_verl_s_batch_manager_gets_a_number_for_each_response(functions, prompts, expected):
    # As verl's batch reward manager calls it: by keywords, with what `reward_kwargs` of its configuration add.
    scores = functions.compute_score(
        data_sources=["demo"] * 4,
        solution_strs=[*COMPLETIONS, ""],
        ground_truths=[None] * 4,
        extra_infos=[{"prompt": prompt, "rollout_reward_scores": {}} for prompt in [*prompts, "?"]],
        prompt_key="prompt",
        of_nothing=-1.0,
    )
    assert scores == [*expected, -1.0]


def test_openrlhf_gets_tensors_of_queries_that_begin_with_their_prompts(functions, prompts, expected):
    queries = [prompt + completion for prompt, completion in zip(prompts, COMPLETIONS, strict=True)]
    found = functions.reward_func(queries, prompts, ["", "", ""])
    assert found["rewards"].tolist() == found["scores"].tolist() == pytest.approx(expected)
    assert found["extra_logs"]["served_reward"].shape == (3,)


def test_trl_gets_none_where_the_policy_wrote_nothing(functions, prompts, expected):
    texts = [COMPLETIONS[0], "", COMPLETIONS[2]]
    found = functions.served_reward(prompts=prompts, completions=texts, completion_ids=[[1], [2], [3]])
    assert found == [expected[0], None, expected[2]]


@pytest.mark.filterwarnings("ignore")
def test_trl_s_grpo_trainer_trains_on_the_server_s_rewards(server, tmp_path, monkeypatch, capsys):
    trl = pytest.importorskip("trl")
    if not hasattr(trl, "GRPOTrainer"):
        pytest.skip("this release of trl has no GRPOTrainer")
    monkeypatch.setenv("REWARD_URL", f"http://127.0.0.1:{server.port}")
    asked = len(server.lines())
    monkeypatch.setattr(sys, "argv", [EXAMPLE.name, "--steps", "2", "--output", str(tmp_path)])
    program = runpy.run_path(str(EXAMPLE), run_name="__main__")
    program["client"]().close()
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.partition(":")[0] for line in printed] == ["step 1", "step 2"]
    assert len({line.rpartition(" ")[2] for line in printed} - {"+0.000", "+nan"}) == 2
    assert len(server.lines()) >= asked + 2, "the rewards came from the server"
