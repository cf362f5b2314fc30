"""What LLaMA-Factory 0.9.5 (commit ff6d4d1) does to the object, re-enacted demand by demand."""

import copy
from types import MethodType

import pytest
import torch

from tests.consumers.critics import H, expected_values, language_model
from vhead import AutoModelForCausalLMWithValueHead


@torch.no_grad()
def test_the_reward_trainer_unpacks_three_and_reads_the_last(model, tokens):
    """`train/rm/trainer.py`, `PairwiseTrainer.compute_loss`: exactly three items, these keywords."""
    _, _, values = model(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        output_hidden_states=True,
        return_dict=True,
        use_cache=False,
    )
    states = model.pretrained_model.model(tokens).last_hidden_state
    torch.testing.assert_close(values.double(), expected_values(model, states), rtol=1e-5, atol=1e-5)
    assert torch.equal(model(input_ids=tokens)[-1], values)


@pytest.mark.parametrize("name", ["tie_weights", "get_input_embeddings", "get_output_embeddings"])
def test_its_patched_methods_exist_and_can_be_patched(model, name):
    """`model/patcher.py`, `patch_valuehead_model`: methods bound onto the instance that ask the body."""
    native = getattr(model, name)()
    assert native is getattr(model.pretrained_model, name)()
    setattr(model, name, MethodType(lambda self: "patched", model))
    assert getattr(model, name)() == "patched"
    assert getattr(copy.deepcopy(model), name)() == "patched"


def test_its_other_patches_stay_on_the_wrapper(model):
    """`model/patcher.py`, `patch_valuehead_model`: names to leave out, a model card's writer, rope indices."""
    ignored = [name for name, _ in model.named_parameters() if "pretrained_model" in name]
    assert len(ignored) == len(list(model.pretrained_model.parameters()))
    model._keys_to_ignore_on_save = ignored
    model.create_or_update_model_card = MethodType(lambda self, output_dir: output_dir, model)
    model.get_rope_index = "the body's"
    assert model._keys_to_ignore_on_save == ignored
    assert model.pretrained_model._keys_to_ignore_on_save != ignored
    assert model.create_or_update_model_card("x") == "x"
    assert model.get_rope_index == "the body's"


def test_a_saved_head_loads_by_itself(model):
    """`model/loader.py`, `load_model`: `load_state_dict` of the head's two tensors, not strictly."""
    weight, bias = torch.randn(1, H), torch.randn(1)
    before = copy.deepcopy(model.pretrained_model.state_dict())
    model.load_state_dict({"v_head.summary.weight": weight, "v_head.summary.bias": bias}, strict=False)
    assert torch.equal(model.v_head.summary.weight, weight)
    assert torch.equal(model.v_head.summary.bias, bias)
    assert all(torch.equal(value, before[name]) for name, value in model.pretrained_model.state_dict().items())


@torch.no_grad()
def test_the_head_is_swapped_for_the_reward_models(model, tokens):
    """`train/ppo/ppo_utils.py`, `replace_model`, and `model/model_utils/valuehead.py`: buffers beside `.data`."""
    reward_head = torch.randn(1, H), torch.randn(1)
    model.register_buffer("reward_head_weight", reward_head[0], persistent=False)
    model.register_buffer("reward_head_bias", reward_head[1], persistent=False)
    model.register_buffer("default_head_weight", torch.zeros(1, H), persistent=False)
    model.register_buffer("default_head_bias", torch.zeros(1), persistent=False)
    before = model(tokens)[-1]

    model.default_head_weight = model.v_head.summary.weight.data.detach().clone()
    model.default_head_bias = model.v_head.summary.bias.data.detach().clone()
    for target in ("reward", "default"):
        model.v_head.summary.weight.data = model.get_buffer(f"{target}_head_weight").detach().clone()
        model.v_head.summary.bias.data = model.get_buffer(f"{target}_head_bias").detach().clone()
        values = model(tokens)[-1]
        states = model.pretrained_model.model(tokens).last_hidden_state
        torch.testing.assert_close(values.double(), expected_values(model, states), rtol=1e-5, atol=1e-5)
        assert torch.equal(values, before) == (target == "default")
    assert not any("_head_" in name for name in model.state_dict())


def test_its_checkpoint_callback_finds_the_three_layouts(model):
    """`train/callbacks.py`, `fix_valuehead_checkpoint`: plain names, the head alone with LoRA, ZeRO-3's prefix."""
    plain = model.state_dict()
    assert {name for name in plain if name.startswith("v_head.")} == {"v_head.summary.weight", "v_head.summary.bias"}
    assert {name for name in plain if not name.startswith("v_head.")} == set(model.pretrained_model.state_dict())
    raw = torch.nn.Module.state_dict(model)
    assert {name.removeprefix("pretrained_model.") for name in raw} == set(plain)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_with_lora_the_state_is_the_head_alone_and_adapters_switch():
    """`train/ppo/ppo_utils.py`, `replace_model`: `pretrained_model.set_adapter`; `fix_valuehead_checkpoint`, LoRA."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    body = peft.get_peft_model(language_model(), lora)
    body.add_adapter("reward", lora)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(body)
    assert list(model.state_dict()) == ["v_head.summary.weight", "v_head.summary.bias"]
    tokens = torch.randint(3, 97, (1, 5))
    with torch.no_grad():
        model.pretrained_model.set_adapter("default")
        default = model(tokens)[-1]
        model.pretrained_model.set_adapter("reward")
        assert not torch.equal(model(tokens)[-1], default)


def test_its_output_layers_names_are_absent_where_trl_had_none(model):
    """`model/model_utils/valuehead.py`, `prepare_valuehead_model`, sets `lm_head` on bodies; the wrapper has none."""
    assert not hasattr(model, "lm_head")
    assert not hasattr(model, "is_encoder_decoder")
