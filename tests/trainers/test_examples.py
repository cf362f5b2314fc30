"""The examples run, learn what they say they learn, save what loads, and print what a slow reference gives."""

import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.version import Version
from transformers import AutoTokenizer

from tests.library_versions import TRANSFORMERS
from vhead import AutoModelForCausalLMWithValueHead
from vhead.demo import demo_model_path

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


def written(trace):
    """The pieces of a trace's text, and whether the model wrote each: the example's chat template, by hand."""
    schemas = [tool["function"] for tool in trace["tools"]]
    yield "".join(f"{each['name']}({', '.join(each['parameters']['properties'])})\n" for each in schemas), False
    for message in trace["messages"]:
        if message["role"] != "assistant":
            yield f"{message['role']}: {message['content']}\n", False
            continue
        calls = [call["function"] for call in message.get("tool_calls", [])]
        words = [message["content"], *(f"{call['name']} {json.dumps(call['arguments'])}" for call in calls)]
        yield "assistant: ", False
        yield " ".join(word for word in words if word) + "</s>", True


@torch.no_grad()
def token_by_token(model, ids, first):
    """Before each token from `first` on, and behind the last: the value and the token's log-probability.

    The model reads everything before the token anew.
    """
    values, logprobs = [], []
    for at in range(first, len(ids) + 1):
        logits, _, value = model(torch.tensor([ids[:at]]))
        values.append(value[0, -1].item())
        if at < len(ids):
            logprobs.append(logits[0, -1].double().log_softmax(-1)[ids[at]].item())
    return values, logprobs


def slow_gae(reward, values, mask, bootstrap, lam):
    """Advantages and returns of the tokens that the model wrote, from the last to the first, with gamma 1."""
    advantages, returns = [0.0] * len(mask), [0.0] * len(mask)
    running, following, earned = 0.0, bootstrap, reward
    for at in reversed(range(len(mask))):
        if mask[at]:
            running = earned + following - values[at] + lam * running
            following, earned = values[at], 0.0
            advantages[at], returns[at] = running, running + values[at]
    return advantages, returns


@pytest.fixture(scope="module")
def agent_traces():
    """The example's functions, its traces by id, and what it makes of them."""
    example = runpy.run_path(str(EXAMPLES / "agent_traces.py"))
    traces = example["read_traces"]()
    rollouts = example["as_rollouts"](traces, example["load_tokenizer"]())
    rewards, cut_off = ([trace[name] for trace in traces] for name in ("reward", "cut_off"))
    return traces, example["score"](rollouts, rewards, cut_off)


@pytest.mark.parametrize("name", ["division", "rounding", "cut off", "many turns"])
def test_agent_traces_get_the_numbers_of_a_slow_loop(agent_traces, name):
    traces, (scores, advantages, returns) = agent_traces
    at = scores.ids.index(name)
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    pieces = [(tokenizer(text, add_special_tokens=False).input_ids, own) for text, own in written(traces[at])]
    ids = [token for tokens, _ in pieces for token in tokens]
    mask = [own for tokens, own in pieces for _ in tokens]
    first = mask.index(True)
    end = len(ids) - (
        ids[-1] == tokenizer("\n", add_special_tokens=False).input_ids[0]
    )  # white space at the end is cut
    ids, mask = ids[:end], mask[first:end]

    model = AutoModelForCausalLMWithValueHead.from_pretrained(demo_model_path()).float().eval()
    (*values, after), logprobs = token_by_token(model, ids, first)
    expected = slow_gae(traces[at]["reward"], values, mask, after if traces[at]["cut_off"] else 0.0, lam=0.95)

    own = slice(scores.offsets[at], scores.offsets[at + 1])
    assert scores.mask[own].tolist() == mask
    np.testing.assert_allclose(scores.values[own], values, atol=1e-4)
    np.testing.assert_allclose(scores.logprobs[own], np.where(mask, logprobs, 0.0), atol=1e-4)
    np.testing.assert_allclose(advantages[own], expected[0], atol=1e-4)
    np.testing.assert_allclose(returns[own], expected[1], atol=1e-4)


def test_agent_traces_prints_what_each_turn_of_a_trace_got(run, agent_traces):
    traces, (scores, advantages, _) = agent_traces
    printed = run("agent_traces.py", "--show", "many turns")
    assert [line_with(f"{trace['id']:13}", printed) for trace in traces]
    at = scores.ids.index("many turns")
    last = int(np.flatnonzero(scores[at].mask)[-1])
    *_, advantage, returned = numbers(line_with(f" {last} '</s>'", printed))
    assert advantage == pytest.approx(advantages[scores.offsets[at] + last], abs=1e-3)
    assert returned == traces[at]["reward"]
    assert printed.count("\nmodel: ") == 5
    assert printed.count("\ntool: ") == 4


def test_distillation(run):
    printed = run("distillation.py", "--steps", "5")
    for texts in ("seen", "other"):
        before, after = (numbers(line_with(f"{texts} texts {when}", printed))[0] for when in ("before", "after"))
        assert before > 3.0
        assert after < 0.6 * before


def test_ppo_agent(run):
    """The short form: both heads begin with the same policy and games, and only the fitted one knows of the reward."""
    run("ppo_agent.py", "--demonstrations", "64", "--updates", "2", "--seeds", "0")
    fresh, fitted = (json.loads(Path("ppo-agent.json").read_text())[at] for at in (0, 1))
    assert (fresh["head"], fitted["head"]) == ("fresh", "fitted")
    assert fresh["rewards"][0] == fitted["rewards"][0]
    assert fresh["explained_variance"][0] == pytest.approx(0.0, abs=1e-6)
    assert fitted["explained_variance"][0] > 0.2
