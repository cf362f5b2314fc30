"""What the consumers of TRL's class reach for, read or patch on the object."""

import copy
import inspect

import pytest
import torch
from tiny_models import batch, build

from vhead import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead, PreTrainedModelWrapper
from vhead.modeling import ValueHeadOutput


@pytest.fixture
def model():
    return AutoModelForCausalLMWithValueHead(build("llama"))


def test_attributes_are_the_bodys(model):
    body = model.pretrained_model
    assert model.config is body.config
    assert model.generation_config is body.generation_config
    assert model.device == torch.device("cpu")
    assert model.dtype == torch.float32
    assert model.get_input_embeddings() is body.get_input_embeddings()
    assert model.get_output_embeddings() is body.lm_head
    assert model.can_generate() is True
    assert model._no_split_modules == body._no_split_modules
    assert model._keys_to_ignore_on_save == body._keys_to_ignore_on_save
    assert model.main_input_name == "input_ids"
    assert model.name_or_path == body.name_or_path
    model.warnings_issued["estimate_tokens"] = True
    assert model.is_gradient_checkpointing is False
    model.tie_weights()
    model.enable_input_require_grads()
    model.add_model_tags("value-head")
    assert "value-head" in body.model_tags
    assert model.prepare_inputs_for_generation.__self__ is body
    assert not hasattr(model, "hf_device_map")
    assert not hasattr(model, "is_encoder_decoder")


def test_attributes_can_be_patched_as_llama_factory_and_verl_do(model):
    model.tie_weights = lambda: "patched"
    model.get_input_embeddings = lambda: "patched"
    model.can_generate = lambda: False
    model._keys_to_ignore_on_save = ["pretrained_model.x"]
    model._no_split_modules = ["Layer"]
    assert model.tie_weights() == model.get_input_embeddings() == "patched"
    assert model.can_generate() is False
    assert model._keys_to_ignore_on_save == ["pretrained_model.x"]
    assert model.pretrained_model._no_split_modules != ["Layer"]


def test_a_new_generation_config_is_the_one_generate_uses(model):
    changed = copy.deepcopy(model.generation_config)
    changed.max_new_tokens = 3
    model.generation_config = changed
    assert model.pretrained_model.generation_config is changed
    assert model.generate(torch.full((1, 2), 5), attention_mask=torch.ones(1, 2), do_sample=False).shape[1] <= 5


def test_deepcopies_are_bound_to_their_own_body(model):
    other = copy.deepcopy(model)
    assert other.get_output_embeddings() is other.pretrained_model.lm_head
    assert other.prepare_inputs_for_generation.__self__ is other.pretrained_model


@torch.no_grad()
def test_trls_new_trainer_finds_trunk_and_head(model):
    inputs = batch(model.pretrained_model)
    trunk = getattr(model, model.base_model_prefix)
    states = trunk(**inputs, output_hidden_states=True, return_dict=True, use_cache=False).hidden_states[-1]
    assert torch.equal(model.score(states).squeeze(-1), model(**inputs).value)
    assert model.score is model.v_head


@torch.no_grad()
def test_callers_arguments_are_tolerated(model):
    inputs = batch(model.pretrained_model)
    expected = model(**inputs)
    output = model(**inputs, output_hidden_states=True, return_dict=True, use_cache=False)
    assert len(output) == 3
    assert torch.equal(output[-1], expected.value)
    seq2seq = AutoModelForSeq2SeqLMWithValueHead(build("t5"))
    inputs = batch(seq2seq.pretrained_model)
    assert len(seq2seq(**inputs, output_hidden_states=True, return_dict=False)) == 3


@torch.no_grad()
def test_packed_input_without_a_mask_as_verl_sends_it(model):
    tokens = torch.randint(3, 97, (1, 9))
    positions = torch.cat([torch.arange(5), torch.arange(4)])[None]
    output = model(input_ids=tokens, attention_mask=None, position_ids=positions, use_cache=False)
    assert output[2].shape == (1, 9)


@torch.no_grad()
def test_weights_can_be_swapped_as_llama_factory_does(model):
    inputs = batch(model.pretrained_model)
    weight, bias = torch.randn(1, 32), torch.randn(1)
    model.v_head.summary.weight.data, model.v_head.summary.bias.data = weight, bias
    states = model.backbone(**inputs).last_hidden_state
    torch.testing.assert_close(model(**inputs).value, torch.nn.functional.linear(states, weight, bias).squeeze(-1))


@torch.no_grad()
def test_the_output_is_a_tuple_with_names(model):
    output = model(**batch(model.pretrained_model))
    lm_logits, loss, value = output
    assert output.logits is output.lm_logits is lm_logits
    assert output.loss is loss is None
    assert output.value is value
    rebuilt = ValueHeadOutput(*(None if item is None else item.clone() for item in output))
    assert torch.equal(rebuilt.value, value)


def test_the_output_survives_accelerate(model):
    operations = pytest.importorskip("accelerate.utils.operations")
    output = operations.convert_to_fp32(model.bfloat16()(**batch(model.pretrained_model)))
    assert isinstance(output, ValueHeadOutput)
    assert output.logits.dtype == torch.float32


def test_forward_names_the_columns_a_dataset_keeps(model):
    names = list(inspect.signature(model.forward).parameters)
    assert names == ["input_ids", "past_key_values", "attention_mask", "return_past_key_values", "kwargs"]


@torch.no_grad()
def test_the_wrapper_class_itself_wraps():
    model = PreTrainedModelWrapper(build("gpt2"))
    assert model(**batch(model.pretrained_model)).value.shape == (2, 7)


def test_a_peft_model_as_object_trains_head_and_adapter():
    peft = pytest.importorskip("peft")
    from test_backbone import with_adapter

    body = with_adapter(peft, peft.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False))
    model = AutoModelForCausalLMWithValueHead.from_pretrained(body)
    assert model.is_peft_model is True
    assert list(model.state_dict()) == ["v_head.summary.weight", "v_head.summary.bias"]
    output = model(**batch(body.get_base_model()))
    (output.value.sum() + output.logits.sum()).backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert all("lora" in name or "v_head" in name for name in trained)
    assert any("lora" in name for name in trained)
    assert any("v_head" in name for name in trained)
