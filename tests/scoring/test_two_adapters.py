"""Policy and critic as two adapters on one body: each field is by the adapter that was named for it."""

import copy
import pickle

import numpy as np
import pytest
import torch

from tests.scoring.scoring_models import VOCABULARY, critic, rollouts
from vhead import AutoModelForCausalLMWithValueHead, Rollout, Scorer
from vhead.errors import AdapterError

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft reads it

OF_POLICY = ("logprobs", "entropy", "candidates")
OF_CRITIC = ("values", "reward", "prompt_value", "bootstrap")
NAMED = {"policy_adapter": "default", "value_adapter": "critic"}


def with_two_adapters(architecture="llama", **lora):
    torch.manual_seed(3)
    model = critic(architecture)
    targets = ["c_attn"] if architecture == "gpt2" else ["q_proj", "v_proj"]
    lora |= {"fan_in_fan_out": architecture == "gpt2"}
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=targets, init_lora_weights=False, **lora)
    body = peft.get_peft_model(model.pretrained_model, config)
    body.add_adapter("critic", config)
    adapted = AutoModelForCausalLMWithValueHead.from_pretrained(body)
    adapted.v_head.load_state_dict(model.v_head.state_dict())
    return adapted.eval()


def asked():
    rng = np.random.default_rng(4)
    return [
        Rollout(
            each.prompt,
            each.completion,
            mask=each.mask,
            candidates=rng.integers(0, VOCABULARY, (len(each.completion), 3)),
        )
        for each in rollouts()
    ]


def by_hand(model, **options):
    """The policy's fields with one adapter active, and then the critic's with the other."""
    found = {}
    for adapter, returns in (("default", OF_POLICY), ("critic", OF_CRITIC)):
        model.pretrained_model.set_adapter(adapter)
        computed = Scorer(model, **options).score(asked(), returns).computed
        # Candidates are answered wherever rollouts bring them.
        found |= {name: array for name, array in computed.items() if "candidate" not in name or returns == OF_POLICY}
    model.pretrained_model.set_adapter("default")
    return found


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("llama", {"attention": "mask"}),
        ("llama", {"batch_invariant": True}),
        ("llama", {"token_budget": 60}),
    ],
)
def test_two_adapters_score_as_each_of_them_does_alone(architecture, options):
    model = with_two_adapters(architecture)
    expected = by_hand(model, **options)
    scores = Scorer(model, **NAMED, **options).score(asked(), (*OF_POLICY, *OF_CRITIC))
    assert scores.computed.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(scores.computed[name], array, rtol=0, atol=2e-5, err_msg=name)
    model.pretrained_model.set_adapter("critic")
    other = Scorer(model, **options).score(asked(), OF_POLICY)
    assert np.abs(other.logprobs - expected["logprobs"]).max() > 0.01  # The comparison could have failed.


def test_an_adapter_with_a_language_model_head_of_its_own_computes_its_own_logits():
    model = with_two_adapters(modules_to_save=["lm_head"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save.default" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    expected = by_hand(model)
    model.pretrained_model.set_adapter("critic")
    scores = Scorer(model, **NAMED).score(asked(), ("logprobs", "values"))
    np.testing.assert_allclose(scores.logprobs, expected["logprobs"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(scores.values, expected["values"], rtol=0, atol=2e-5)


def test_a_model_that_makes_its_own_logits(monkeypatch):
    from vhead.scoring import engine

    monkeypatch.setattr(engine, "find_logits_rule", lambda *_: None)
    model = with_two_adapters()
    expected = by_hand(model)
    scores = Scorer(model, **NAMED).score(asked(), (*OF_POLICY, *OF_CRITIC))
    for name, array in expected.items():
        np.testing.assert_allclose(scores.computed[name], array, rtol=0, atol=2e-5, err_msg=name)


def test_the_active_adapter_and_what_trains_stay_as_they_were():
    model = with_two_adapters()
    model.pretrained_model.set_adapter("critic")
    before = [parameter.requires_grad for parameter in model.parameters()]
    scorer = Scorer(model, **NAMED)
    scorer.score(asked(), ("values", "logprobs"))
    assert model.pretrained_model.active_adapter == "critic"
    assert [parameter.requires_grad for parameter in model.parameters()] == before


@pytest.mark.parametrize(
    ("named", "returns", "runs"),
    [
        (NAMED, ("values", "reward"), 1),
        (NAMED, ("logprobs",), 1),
        (NAMED, ("values", "logprobs"), 2),
        ({"value_adapter": "default"}, ("values", "logprobs"), 1),  # It is the active one.
        ({"policy_adapter": "critic", "value_adapter": "critic"}, ("values", "logprobs"), 1),
    ],
)
def test_the_body_runs_once_for_each_adapter_that_is_needed(named, returns, runs, monkeypatch):
    scorer = Scorer(with_two_adapters(), token_budget=10_000, **named)
    usual, calls = scorer._engine._ways.usual, []
    states = usual.states_of
    monkeypatch.setattr(usual, "states_of", lambda *given: calls.append(given) or states(*given))
    scorer.score(rollouts()[:4], returns)
    assert len(calls) == runs


def test_the_plan_says_which_adapter_computes_what():
    model = with_two_adapters()
    assert "adapters: log-probabilities by default, values by critic" in str(Scorer(model, **NAMED).plan)
    assert "adapters" not in str(Scorer(model).plan)


def test_a_copy_in_another_process_keeps_the_adapters():
    scorer = Scorer(with_two_adapters(), **NAMED)
    copied = pickle.loads(pickle.dumps(scorer))
    assert np.array_equal(copied.score(asked(), ("values",)).values, scorer.score(asked(), ("values",)).values)


@pytest.mark.parametrize("argument", NAMED)
def test_an_unknown_adapter_is_named(argument):
    with pytest.raises(
        AdapterError,
        match=f"{argument}: expected one of the model's adapters, got 'other'; the model has the adapters default",
    ):
        Scorer(with_two_adapters(), **{argument: "other"})
    with pytest.raises(AdapterError, match=f"{argument}: .* got 'other'; the model has no adapters"):
        Scorer(critic(), **{argument: "other"})
    with pytest.raises(TypeError, match=f"{argument}: expected an adapter's name, got 3"):
        Scorer(critic(), **{argument: 3})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    model = with_two_adapters()
    base = copy.deepcopy(model.pretrained_model).unload()
    base.save_pretrained(folder / "base")
    for config in model.pretrained_model.peft_config.values():
        config.base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "both")
    scores = Scorer(model, **NAMED).score(asked(), (*OF_POLICY, *OF_CRITIC))
    return folder / "both", scores


def test_both_adapters_are_loaded_from_where_peft_saves_them(folder):
    path, expected = folder
    scores = Scorer.from_pretrained(path, device="cpu", **NAMED).score(asked(), (*OF_POLICY, *OF_CRITIC))
    for name, array in expected.computed.items():
        np.testing.assert_allclose(scores.computed[name], array, rtol=0, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("name", ["other", "../both/critic", ""])
def test_an_adapter_that_is_not_there(folder, name):
    with pytest.raises(
        AdapterError,
        match=f"value_adapter: expected one of the model's adapters, got {name!r}; the model has the adapters default",
    ):
        Scorer.from_pretrained(folder[0], device="cpu", value_adapter=name)
