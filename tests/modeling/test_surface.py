"""What the consumers of TRL's class reach for, read or patch on the object."""

import copy
import inspect

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    EncoderDecoderConfig,
)

from tests.library_versions import DTYPE
from tests.modeling.tiny_models import batch, build
from vhead import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead, PreTrainedModelWrapper
from vhead.errors import AdapterError, HeadError
from vhead.modeling.wrapper import ValueHeadOutput


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
    # Newer versions of transformers warn of the old names, and name these in their place.
    for name in ("activation_checkpointing_enable", "activation_checkpointing_disable", "is_activation_checkpointing"):
        assert hasattr(model, name) == hasattr(body, name)
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


def bert(**settings):
    return BertConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, **settings
    )


HEADLESS = {
    "gpt2's trunk": (AutoModelForCausalLMWithValueHead, lambda: build("gpt2").transformer),
    "llama's classifier": (
        AutoModelForCausalLMWithValueHead,
        lambda: AutoModelForSequenceClassification.from_config(build("llama").config),
    ),
    "bart's trunk": (AutoModelForSeq2SeqLMWithValueHead, lambda: build("bart").model),
    "t5's trunk": (AutoModelForSeq2SeqLMWithValueHead, lambda: AutoModel.from_config(build("t5").config)),
}


@pytest.mark.parametrize("name", HEADLESS)
@pytest.mark.parametrize("way", ["constructor", "from_pretrained"])
def test_a_model_without_a_language_model_head_is_refused(name, way):
    wrapper, make = HEADLESS[name]
    body = make()
    with pytest.raises(
        HeadError, match=rf"expected a model with .*\(lm_head, .* found none in a {type(body).__name__}"
    ):
        (wrapper if way == "constructor" else wrapper.from_pretrained)(body)
    assert issubclass(HeadError, ValueError)
    assert PreTrainedModelWrapper(body).v_head.num_outputs == 1


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft reads it by its old name
def test_an_adapter_does_not_hide_that_there_is_no_language_model_head():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    body = peft.get_peft_model(build("gpt2").transformer, lora)
    with pytest.raises(HeadError, match="found none in a GPT2Model"):
        AutoModelForCausalLMWithValueHead(body)


@pytest.mark.parametrize(
    ("wrapper", "parent", "config"),
    [
        (AutoModelForCausalLMWithValueHead, AutoModelForCausalLM, bert(is_decoder=True)),
        (
            AutoModelForSeq2SeqLMWithValueHead,
            AutoModelForSeq2SeqLM,
            EncoderDecoderConfig.from_encoder_decoder_configs(bert(), bert(is_decoder=True, add_cross_attention=True)),
        ),
    ],
    ids=["bert", "two berts"],
)
def test_a_language_model_head_of_another_name_is_one(wrapper, parent, config):
    body = parent.from_config(config)
    assert not any(name.rpartition(".")[2] in wrapper.lm_head_namings for name, _ in body.named_modules())
    assert wrapper(body).v_head.hidden_size == 32


class Unnamed(torch.nn.Module):
    """A body with a language-model head that it names in a usual way, and otherwise keeps to itself."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.config = build("llama").config
        self.add_module(name, torch.nn.Linear(32, 97))

    def get_output_embeddings(self):
        return None

    def can_generate(self):
        return False


@pytest.mark.parametrize("name", ["lm_head", "embed_out", "output_projection", "embed_tokens"])
@pytest.mark.parametrize("wrapper", [AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead])
def test_the_names_of_language_model_heads_are_what_a_subclass_says(monkeypatch, wrapper, name):
    usual = name in wrapper.lm_head_namings
    # How the last hidden state of such a body would be reached is another matter.
    monkeypatch.setattr("vhead.modeling.wrapper.plan_for", lambda _body: None)
    for namings, accepted in ((wrapper.lm_head_namings, usual), ((name,), True), ((), True)):
        kind = type("Kind", (wrapper,), {"lm_head_namings": namings})
        if accepted:
            assert kind(Unnamed(name)).lm_head_namings == namings
        else:
            with pytest.raises(HeadError, match="found none in a Unnamed"):
                kind(Unnamed(name))


@pytest.mark.parametrize(
    ("method", "answer"), [("can_generate", True), ("get_output_embeddings", torch.nn.Linear(32, 97))]
)
def test_a_body_that_says_so_has_a_language_model_head_whatever_it_is_called(monkeypatch, method, answer):
    monkeypatch.setattr("vhead.modeling.wrapper.plan_for", lambda _body: None)
    monkeypatch.setattr(Unnamed, method, lambda _self: answer)
    assert AutoModelForCausalLMWithValueHead(Unnamed("embed_tokens")).v_head.hidden_size == 32


@pytest.mark.parametrize(
    ("wrapper", "architecture"),
    [
        (AutoModelForCausalLMWithValueHead, "llama"),
        (AutoModelForCausalLMWithValueHead, "opt"),
        (AutoModelForSeq2SeqLMWithValueHead, "t5"),
    ],
)
@torch.no_grad()
def test_a_dtype_reaches_the_language_model_head_that_the_names_find(tmp_path, wrapper, architecture):
    build(architecture).save_pretrained(tmp_path)
    model = wrapper.from_pretrained(tmp_path, **{DTYPE: torch.bfloat16})
    heads = [getattr(model.pretrained_model, name, None) for name in wrapper.lm_head_namings]
    assert [head.weight.dtype for head in heads if head is not None] == [torch.bfloat16]
    assert torch.isfinite(model(**batch(model.pretrained_model)).value).all()


def test_every_parameter_of_a_plain_model_trains(model):
    assert all(parameter.requires_grad for parameter in model.parameters())
    body_size = sum(parameter.numel() for parameter in model.pretrained_model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == body_size + 32 + 1


class Critic(AutoModelForCausalLMWithValueHead):
    """A subclass in the way of TRL's own: it divides its arguments, makes its head anew and draws its weights."""

    supported_args = (*AutoModelForCausalLMWithValueHead.supported_args, "scale")

    def __init__(self, pretrained_model, scale=1.0, **kwargs):
        super().__init__(pretrained_model, **kwargs)
        self.scale = scale
        head_arguments, others, _ = self._split_kwargs(kwargs)
        assert not others
        self._init_weights(**head_arguments)


def test_an_argument_that_a_subclass_supports_reaches_it(tmp_path):
    build("llama").save_pretrained(tmp_path)
    assert Critic.from_pretrained(tmp_path, scale=2.5, summary_dropout_prob=0.25).scale == 2.5
    assert Critic.from_pretrained(build("llama"), scale=0.5).scale == 0.5


def test_arguments_are_divided_as_trls_are(model):
    head = {"summary_dropout_prob": 0.25, "v_head_init_strategy": "normal", "num_outputs": 2}
    assert model._split_kwargs({**head, "device_map": "cpu"}) == (head, {"device_map": "cpu"}, {})
    assert model._split_kwargs({"scale": 2.0}) == ({}, {"scale": 2.0}, {})
    assert Critic._split_kwargs({"scale": 2.0}) == ({"scale": 2.0}, {}, {})


def test_arguments_for_a_k_bit_model_are_divided_off(model):
    pytest.importorskip("peft")
    k_bit = {"use_gradient_checkpointing": False, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    assert model._split_kwargs({**k_bit, "revision": "main"}) == ({}, {"revision": "main"}, k_bit)


def test_weights_are_drawn_again_where_a_strategy_is_named(model):
    before = model.v_head.summary.weight.clone()
    model._init_weights(summary_dropout_prob=0.25)
    assert torch.equal(model.v_head.summary.weight, before)
    model._init_weights(v_head_init_strategy="normal", v_head_initializer_range=3.0)
    assert model.v_head.summary.weight.std() > 1.0
    assert model.v_head.summary.bias.item() == 0.0
    with pytest.raises(HeadError, match="v_head_init_strategy"):
        model._init_weights(v_head_init_strategy="uniform")


def test_a_peft_model_as_object_trains_head_and_adapter():
    peft = pytest.importorskip("peft")
    from tests.backbone.test_hidden_states import with_adapter

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


def test_the_vocabulary_can_be_resized(model, tmp_path):
    model.resize_token_embeddings(101)
    assert model.config.vocab_size == 101
    assert model(torch.tensor([[100, 3]])).logits.shape == (1, 2, 101)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert torch.equal(loaded.values(torch.tensor([[100, 3]])), model.values(torch.tensor([[100, 3]])))


def test_parameters_are_counted_with_the_head_s(model):
    def count(parameters):
        return sum(parameter.numel() for parameter in parameters)

    assert model.num_parameters() == count(model.parameters())
    embeddings = count(model.get_input_embeddings().parameters())
    assert model.num_parameters(exclude_embeddings=True) == count(model.parameters()) - embeddings
    model.pretrained_model.requires_grad_(requires_grad=False)
    assert model.num_parameters(only_trainable=True) == count(model.v_head.parameters())


def test_a_model_without_adapters_has_none_of_their_methods(model):
    for name in ("disable_adapter", "get_nb_trainable_parameters", "print_trainable_parameters"):
        assert not hasattr(model, name)
    with pytest.raises(AdapterError, match="merge_and_unload: expected adapters of the language model, found none"):
        model.merge_and_unload()
