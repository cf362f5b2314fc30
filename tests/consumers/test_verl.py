"""What verl 0.9.1 (commit 1dda039) does to its critic, re-enacted demand by demand."""

from types import MethodType

import pytest
import torch
from torch import nn

from tests.consumers.critics import H, expected_values, language_model
from vhead import AutoModelForCausalLMWithValueHead


@torch.no_grad()
def test_the_critic_reads_item_two_of_packed_rows(model):
    """`workers/engine/fsdp/transformer_impl.py`: one row of all tokens, no mask, positions, values at index 2."""
    lengths = [5, 4]
    tokens = torch.randint(3, 97, (1, sum(lengths)))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    output = model(input_ids=tokens, attention_mask=None, position_ids=positions, use_cache=False)
    assert output[2].shape == (1, sum(lengths))
    states = model.pretrained_model.model(tokens, position_ids=positions, use_cache=False).last_hidden_state
    torch.testing.assert_close(output[2].double(), expected_values(model, states), rtol=1e-5, atol=1e-5)


def test_the_critic_is_known_by_its_head(model):
    """`workers/engine/fsdp/transformer_impl.py`: `hasattr(module, "v_head")`, read through a wrapping module."""
    assert hasattr(model, "v_head")
    assert not hasattr(model.pretrained_model, "v_head")


def test_settings_in_the_bodys_configuration_reach_the_head():
    """`workers/engine/fsdp/transformer_impl.py`, `_build_module`: `summary_dropout_prob` is set there."""
    body = language_model()
    body.config.summary_dropout_prob = 0.0
    model = AutoModelForCausalLMWithValueHead.from_pretrained(body)
    assert not isinstance(model.v_head.dropout, nn.Dropout)
    assert model.v_head.summary.weight.shape == (1, H)


def test_its_patches(model):
    """`utils/model.py`, `patch_valuehead_model`."""
    assert model._no_split_modules == model.pretrained_model._no_split_modules
    model._no_split_modules = getattr(model.pretrained_model, "_no_split_modules", [])
    model._keys_to_ignore_on_save = [name for name, _ in model.named_parameters() if "pretrained_model" in name]
    model.can_generate = MethodType(lambda self: False, model)
    for name in ("tie_weights", "get_input_embeddings", "get_output_embeddings"):
        native = getattr(model, name)()
        setattr(model, name, MethodType(lambda self, name=name: getattr(self.pretrained_model, name)(), model))
        assert getattr(model, name)() is native
    assert model.can_generate() is False
    assert model.pretrained_model.can_generate() is True


def torchs(self, *args, **kwargs):
    return nn.Module.state_dict(self, *args, **kwargs)


@pytest.mark.parametrize("replacement", [nn.Module.state_dict, torchs], ids=["torch's own", "a function around it"])
def test_the_class_s_state_dict_is_torchs(monkeypatch, model, replacement):
    """`models/transformers/monkey_patch.py`, `apply_monkey_patch`: for FSDP's names to be the module's own."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

    monkeypatch.setattr(AutoModelForCausalLMWithValueHead, "state_dict", replacement)
    state = model.state_dict()
    assert set(dict(model.named_parameters())) <= set(state)
    assert set(get_model_state_dict(model)) == set(state)
    other = AutoModelForCausalLMWithValueHead(language_model(tie_word_embeddings=False))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    copied = {name: value.clone() for name, value in state.items()}
    result = set_model_state_dict(other, copied, options=StateDictOptions(full_state_dict=True))
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_sharding_asks_for_embeddings_and_layers(model):
    """`utils/fsdp_utils.py`: `_no_split_modules` names the layers' class, `named_modules` finds them, config ties."""
    (name,) = {*model._no_split_modules}
    assert sum(type(module).__name__ == name for module in model.modules()) == model.config.num_hidden_layers
    assert model.get_input_embeddings() in set(model.modules())
    assert model.config.tie_word_embeddings is False


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_is_switched_on_the_wrapper(model):
    """`workers/engine/fsdp/transformer_impl.py`: `gradient_checkpointing_enable(gradient_checkpointing_kwargs=…)`."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.is_gradient_checkpointing is True
    model.train()(torch.randint(3, 97, (1, 4)), use_cache=False)[2].sum().backward()
    assert model.pretrained_model.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0


def test_the_critics_weights_export_under_plain_names(model, tmp_path):
    """`utils/checkpoint/fsdp_checkpoint_manager.py`: `save_pretrained(path, state_dict=…)` of gathered raw names."""
    raw = nn.Module.state_dict(model)
    model.save_pretrained(tmp_path, state_dict=raw)
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert loaded.head_source is not None
