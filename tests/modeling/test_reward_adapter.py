"""A second adapter with a reward head: its scores are the reward model's, and nothing else notices that it was used."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.modeling.tiny_models import batch, build

pytest.importorskip("peft")

import peft

import vhead.checkpoints.checkpoint
from tests.modeling.adapters_on_disk import lora, peft_is_quiet, save_base, save_reward_adapter
from vhead import AutoModelForCausalLMWithValueHead
from vhead.errors import AdapterError, HeadFileError, HeadMismatchError


@pytest.fixture(autouse=True)
def quiet():
    with peft_is_quiet():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def reward(base, tmp_path_factory):
    """The trained reward model, and the folder of its adapter."""
    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(5)
    return save_reward_adapter(folder, base), folder


def wrapped(base, reward, **arguments):
    return AutoModelForCausalLMWithValueHead.from_pretrained(
        base, peft_config=lora(), reward_adapter=str(reward[1]), **arguments
    )


@pytest.fixture
def model(base, reward):
    return wrapped(base, reward)


INPUTS = batch(build("llama"))


def test_scores_are_the_reward_models(model, reward):
    scores = model.compute_reward_score(**INPUTS)
    assert scores.shape == (2, 7, 2)
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    with torch.no_grad():
        last_of_first_row = reward[0](**{name: value[:1] for name, value in INPUTS.items()}).logits
        last_of_second_row = reward[0](INPUTS["input_ids"][1:, :5]).logits
    torch.testing.assert_close(scores[:1, -1], last_of_first_row)
    torch.testing.assert_close(scores[1:, 4], last_of_second_row)


def test_scores_are_trls(model, base, reward):
    trl = pytest.importorskip("trl.experimental.ppo", exc_type=ImportError)
    theirs = trl.AutoModelForCausalLMWithValueHead.from_pretrained(
        base, peft_config=lora(), reward_adapter=str(reward[1])
    )
    torch.testing.assert_close(model.compute_reward_score(**INPUTS), theirs.compute_reward_score(**INPUTS))


@torch.no_grad()
def test_the_policy_s_adapter_would_give_other_scores(model):
    states = model.pretrained_model.base_model.model.model(**INPUTS).last_hidden_state
    assert not torch.allclose(model.score(states), model.compute_reward_score(**INPUTS), atol=1e-3)


def state_of(model):
    modes = [module.training for module in model.modules()]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    return model.pretrained_model.active_adapter, modes, trained


@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
def test_mode_and_adapters_stay_as_they_are(model, mode):
    model.train(mode != "eval")
    if mode == "mixed":
        model.pretrained_model.base_model.model.model.layers[1].eval()
    before, output = state_of(model), model.eval()(**INPUTS) if mode == "eval" else None
    model.compute_reward_score(**INPUTS)
    assert state_of(model) == before
    if output is not None:
        assert torch.equal(model(**INPUTS).value, output.value)


def test_also_after_an_exception(model):
    model.train()
    before = state_of(model)
    with pytest.raises((ValueError, TypeError, RuntimeError, IndexError)):
        model.compute_reward_score(torch.full((1, 3), 10**6))
    assert state_of(model) == before


def test_a_frozen_policy_stays_frozen(base, reward, tmp_path):
    AutoModelForCausalLMWithValueHead.from_pretrained(base, peft_config=lora()).save_pretrained(tmp_path)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, reward_adapter=str(reward[1]))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "v_head.summary.weight",
        "v_head.summary.bias",
    ]
    before = state_of(model)
    model.compute_reward_score(**INPUTS)
    assert state_of(model) == before


def test_an_adapter_that_was_active_is_so_again(model):
    model.pretrained_model.add_adapter("other", lora())
    model.pretrained_model.set_adapter("other")
    model.compute_reward_score(**INPUTS)
    assert model.pretrained_model.active_adapter == "other"


def test_only_the_policy_trains(model):
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert not any("reward_adapter" in name or name.startswith("score") for name in names)
    assert any(".default." in name for name in names)
    model.train()
    score = model.compute_reward_score(**INPUTS).mean()
    (model(**INPUTS).value.mean() + score).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == [
        name for name in names if "lora" in name or "v_head" in name
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_body_still_scores_in_float32(base, reward, dtype):
    model = wrapped(base, reward)
    model.pretrained_model.to(dtype)
    scores = model.compute_reward_score(**INPUTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, wrapped_scores(base, reward), rtol=0.1, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.compute_reward_score(**INPUTS).dtype == torch.float32


def wrapped_scores(base, reward):
    return wrapped(base, reward).compute_reward_score(**INPUTS)


def test_attributes_are_trls(model):
    assert model.supports_rm_adapter is True
    assert model.rm_adapter_name == "reward_adapter"
    assert model.policy_adapter_name == "default"
    assert isinstance(model.score, torch.nn.Linear)
    assert model.score is not model.v_head


def test_another_name(base, reward):
    model = wrapped(base, reward, reward_adapter_name="judge")
    assert set(model.pretrained_model.peft_config) == {"default", "judge"}
    assert torch.equal(model.compute_reward_score(**INPUTS), wrapped_scores(base, reward))


def test_an_object_takes_one_as_well(base, reward):
    body = peft.get_peft_model(build("llama"), lora()).train()
    model = AutoModelForCausalLMWithValueHead.from_pretrained(body, reward_adapter=reward[1])
    assert model.training
    assert torch.equal(model.compute_reward_score(**INPUTS), wrapped_scores(base, reward))


def test_by_hand(base, reward):
    body = peft.get_peft_model(build("llama"), lora()).eval()
    score = AutoModelForCausalLMWithValueHead.add_and_load_reward_modeling_adapter(body, str(reward[1]))
    model = AutoModelForCausalLMWithValueHead(
        body, score_module=score, supports_rm_adapter=True, rm_adapter_name="reward_model_adapter"
    )
    assert {module.training for module in body.modules()} == {False}
    assert torch.equal(model.compute_reward_score(**INPUTS), wrapped_scores(base, reward))


def test_a_saved_model_has_a_reward_adapter_that_can_be_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(
        tmp_path, reward_adapter=str(tmp_path / "reward_adapter")
    )
    assert torch.equal(loaded.compute_reward_score(**INPUTS), model.compute_reward_score(**INPUTS))
    assert torch.equal(loaded(**INPUTS).value, model(**INPUTS).value)
    assert sorted(load_file(tmp_path / "value_head.safetensors")) == ["v_head.summary.bias", "v_head.summary.weight"]


def test_state_dicts_have_the_score_but_do_without(model, base, reward):
    state = model.state_dict()
    assert list(state) == ["v_head.summary.weight", "v_head.summary.bias", "score.weight"]
    other = wrapped(base, reward)
    torch.nn.init.zeros_(other.score.weight)
    other.load_state_dict(state)
    assert torch.equal(other.score.weight, model.score.weight)
    del state["score.weight"]
    other.load_state_dict(state)


@pytest.fixture
def copied(reward, tmp_path):
    """A copy of the reward adapter's folder, to be spoilt."""
    for file in reward[1].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def rewritten(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_a_bias_and_a_pickled_adapter(base, copied, reward):
    rewritten(copied, lambda tensors: tensors.update({"base_model.model.score.bias": torch.tensor([3.0, -1.0])}))
    torch.save(load_file(copied / "adapter_model.safetensors"), copied / "adapter_model.bin")
    (copied / "adapter_model.safetensors").unlink()
    scores = wrapped(base, (None, copied)).compute_reward_score(**INPUTS)
    torch.testing.assert_close(scores, wrapped_scores(base, reward) + torch.tensor([3.0, -1.0]))


KEY = "base_model.model.score.weight"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda t: t.pop(KEY), "found none"),
        (lambda t: t.update({KEY: torch.randn(32)}), r"score\.weight \[32\]"),
        (lambda t: t.update({KEY.replace("weight", "bias"): torch.randn(3)}), r"score\.bias \[3\]"),
        (lambda t: t.update({"base_model.model.score.lora_A.weight": torch.randn(2, 32)}), r"score\.lora_A"),
        (lambda t: t.update({"other.score.weight": torch.randn(2, 32)}), r"other\.score\.weight"),
        (lambda t: t.update({KEY: torch.randn(2, 31)}), r"score\.weight \[2, 31\]"),
    ],
    ids=["none", "flat", "bias", "lora", "two", "width"],
)
def test_a_reward_head_that_does_not_fit(base, copied, change, found):
    rewritten(copied, change)
    with pytest.raises(HeadMismatchError, match=found):
        wrapped(base, (None, copied))


def test_broken_adapters(base, copied, tmp_path_factory):
    with pytest.raises(AdapterError, match=r"found no adapter_config\.json"):
        wrapped(base, (None, tmp_path_factory.mktemp("empty")))
    file = copied / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(HeadFileError, match=r"adapter_model\.safetensors"):
        wrapped(base, (None, copied))


@pytest.mark.parametrize("given", [3, ["a"], {"a": 1}])
def test_a_reward_adapter_is_a_path(base, given):
    with pytest.raises(ValueError, match="reward_adapter: expected a folder"):
        AutoModelForCausalLMWithValueHead.from_pretrained(base, peft_config=lora(), reward_adapter=given)


def test_a_model_without_adapters_takes_none(base, reward):
    with pytest.raises(ValueError, match="reward_adapter: expected a model with adapters"):
        AutoModelForCausalLMWithValueHead.from_pretrained(base, reward_adapter=str(reward[1]))


def test_a_model_without_one_has_no_scores(base):
    model = AutoModelForCausalLMWithValueHead.from_pretrained(base, peft_config=lora())
    with pytest.raises(ValueError, match="reward_adapter: this model was made without one"):
        model.compute_reward_score(**INPUTS)
    assert model.score is model.v_head
    assert model.supports_rm_adapter is False


def test_it_is_looked_up_on_the_hub_with_what_is_shared(base, reward, monkeypatch):
    asked = []

    def download(repository, name, *, subfolder=None, **arguments):
        from huggingface_hub.errors import EntryNotFoundError

        asked.append((repository, subfolder, arguments))
        if not (reward[1] / name).exists():
            raise EntryNotFoundError(name)
        return str(reward[1] / name)

    monkeypatch.setattr(vhead.checkpoints.checkpoint, "hf_hub_download", download)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        base, peft_config=lora(), reward_adapter="some/judge", revision="main", token=True, local_files_only=True
    )
    assert {ask[0] for ask in asked} == {"some/judge"}
    assert all(ask[1:] == (None, {"token": True, "local_files_only": True}) for ask in asked)
    assert torch.equal(model.compute_reward_score(**INPUTS), wrapped_scores(base, reward))


def test_loading_says_nothing_it_need_not(base, reward, caplog):
    with caplog.at_level(logging.INFO):
        wrapped(base, reward)
    assert [record.name for record in caplog.records] == ["vhead"]
