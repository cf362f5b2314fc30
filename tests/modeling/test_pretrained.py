"""`vhead.pretrained`: one folder that `AutoModel` loads, the same modules as the wrapper's, a `PreTrainedModel`."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from tests.library_versions import CHECKPOINT_DTYPE, DTYPE
from tests.modeling.tiny_models import SEQ2SEQ, batch, build
from vhead import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead, Rollout, Scorer
from vhead.errors import BodyMismatchError, HeadError, HeadNotFoundError
from vhead.heads import ValueHead
from vhead.pretrained import ValueHeadConfig, ValueHeadModel
from vhead.upstream import CACHE

TIED = {"tie_word_embeddings": True}


def wrapped(architecture="llama", dtype=torch.float32, **settings):
    wrapper_class = AutoModelForSeq2SeqLMWithValueHead if architecture in SEQ2SEQ else AutoModelForCausalLMWithValueHead
    model = wrapper_class(build(architecture, dtype, **settings))
    with torch.no_grad():
        # Numbers that bfloat16 would round.
        model.v_head.summary.weight.normal_()
        model.v_head.summary.bias.normal_()
    return model


def pretrained(architecture="llama", dtype=torch.float32, **settings):
    return ValueHeadModel.from_wrapper(wrapped(architecture, dtype, **settings))


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def is_tied(model):
    return model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained") / "model"
    torch.manual_seed(3)
    model = pretrained()
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize(
    ("architecture", "dtype", "settings"),
    [
        ("llama", torch.float32, {}),
        ("llama", torch.bfloat16, TIED),
        ("gpt2", torch.bfloat16, {}),
        ("opt", torch.float32, {}),
        ("gemma2", torch.float32, {}),
        ("t5", torch.float32, {}),
        ("bart", torch.bfloat16, {}),
    ],
)
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "8KB"}], ids=["single", "sharded"])
@torch.no_grad()
def test_round_trip_bit_for_bit(tmp_path, architecture, dtype, settings, options):
    model = pretrained(architecture, dtype, **settings)
    model.save_pretrained(tmp_path, **options)
    assert (tmp_path / "model.safetensors.index.json").exists() == bool(options)
    # The attention is not saved, and transformers 4.57 chooses another for Gemma 2 on loading.
    attention = model.pretrained_model.config._attn_implementation
    loaded = AutoModel.from_pretrained(tmp_path, attn_implementation=attention, **CHECKPOINT_DTYPE)
    assert type(loaded) is ValueHeadModel
    assert same_state(model, loaded)
    assert (loaded.dtype, loaded.v_head.summary.weight.dtype) == (dtype, torch.float32)
    assert is_tied(loaded) == is_tied(model)
    assert not loaded.training
    inputs = batch(model.pretrained_model)
    assert torch.equal(loaded(**inputs).value, model(**inputs).value)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path):
    pretrained(**TIED).save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert sum("embed_tokens" in name or "lm_head" in name for name in names) == 1
    loaded = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        loaded.get_input_embeddings().weight.add_(1.0)
    assert is_tied(loaded)
    assert not is_tied(pretrained(tie_word_embeddings=False))


def test_the_head_stays_float32_in_every_dtype(saved):
    model, folder = saved
    for dtype in (torch.bfloat16, torch.float16):
        loaded = AutoModel.from_pretrained(folder, **{DTYPE: dtype})
        assert loaded.dtype == dtype
        assert torch.equal(loaded.v_head.summary.weight, model.v_head.summary.weight)


def test_a_device_map(saved):
    pytest.importorskip("accelerate")
    model, folder = saved
    assert same_state(AutoModel.from_pretrained(folder, device_map={"": "cpu"}), model)


def test_the_body_s_configuration_is_inside(saved):
    model, folder = saved
    stated = json.loads((folder / "config.json").read_text())
    assert (stated["model_type"], stated["text_config"]["model_type"]) == ("vhead", "llama")
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is ValueHeadConfig
    assert config.hidden_size == config.get_text_config().hidden_size == model.config.text_config.hidden_size
    assert config.pad_token_id == 0
    with pytest.raises(AttributeError, match="no attribute 'colour'"):
        config.colour
    assert copy.deepcopy(config).to_dict() == config.to_dict() == pickle.loads(pickle.dumps(config)).to_dict()


def test_from_and_to_the_wrapper_without_copies():
    wrapper = wrapped()
    state = torch.random.get_rng_state()
    model = ValueHeadModel.from_wrapper(wrapper)
    back = model.to_wrapper()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert type(back) is type(wrapper)
    assert back.pretrained_model is model.pretrained_model is wrapper.pretrained_model
    assert back.v_head is model.v_head is wrapper.v_head
    assert not model.training
    assert type(ValueHeadModel.from_wrapper(wrapped("t5")).to_wrapper()) is AutoModelForSeq2SeqLMWithValueHead


@pytest.mark.parametrize("architecture", ["llama", "t5"])
@torch.no_grad()
def test_it_computes_what_the_wrapper_computes(architecture):
    wrapper = wrapped(architecture)
    model, inputs = ValueHeadModel.from_wrapper(wrapper), batch(wrapper.pretrained_model)
    output, expected = model(**inputs), wrapper(**inputs)
    assert torch.equal(output.value, expected.value)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(model.values(**inputs), wrapper.values(**inputs))
    wrapper.v_head.summary.bias.add_(1.0)
    assert not torch.equal(model(**inputs).value, expected.value)


@torch.no_grad()
def test_the_output_has_what_was_asked_for():
    model = pretrained()
    inputs = batch(model.pretrained_model)
    output = model(**inputs, labels=inputs["input_ids"], use_cache=True)
    assert list(output.keys()) == ["loss", "logits", "value", CACHE]
    states = model(**inputs, output_hidden_states=True)
    assert len(states.hidden_states) == model.config.num_hidden_layers + 1
    assert torch.equal(states.value, output.value)
    assert torch.equal(model.v_head(states.hidden_states[-1]).squeeze(-1), output.value)
    assert torch.equal(model(**inputs, use_cache=False, return_dict=False)[1], output.value)


@pytest.mark.parametrize(
    "sizes", [{"num_outputs": 3}, {"intermediate_size": 5}, {"num_outputs": 2, "intermediate_size": 5}]
)
@torch.no_grad()
def test_heads_of_every_size(tmp_path, sizes):
    wrapper = wrapped("opt")
    wrapper.v_head = ValueHead(wrapper.config, summary_dropout_prob=0.25, **sizes)
    model = ValueHeadModel.from_wrapper(wrapper)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert same_state(model, loaded)
    assert loaded.v_head.dropout.p == 0.25
    inputs = batch(wrapper.pretrained_model)
    assert torch.equal(loaded(**inputs).value, model(**inputs).value)
    assert model(**inputs).value.shape[2:] == ((sizes["num_outputs"],) if "num_outputs" in sizes else ())


def test_a_fresh_model_of_a_configuration():
    config = ValueHeadConfig(text_config=build("llama").config, v_head_num_outputs=2)
    model = AutoModel.from_config(config)
    assert type(model) is ValueHeadModel
    assert model.v_head.num_outputs == 2
    assert model.v_head.summary.weight.std() > 0
    again = ValueHeadModel(ValueHeadConfig(text_config=config.text_config.to_dict()))
    assert again.pretrained_model.config.hidden_size == config.hidden_size


@pytest.mark.parametrize("given", [None, {}, {"hidden_size": 8}, "llama"])
def test_a_configuration_without_a_language_model(given):
    with pytest.raises(HeadError, match="text_config: expected"):
        ValueHeadModel(ValueHeadConfig(text_config=given))


def test_generate_and_its_configuration(tmp_path):
    model = pretrained()
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert loaded.generation_config is loaded.pretrained_model.generation_config
    assert loaded.generation_config.max_new_tokens == 3
    prompt = torch.tensor([[5, 7, 9]])
    tokens = loaded.generate(prompt, do_sample=False)
    assert torch.equal(tokens, model.pretrained_model.generate(prompt, do_sample=False))
    scored = loaded.generate(prompt, do_sample=False, output_values=True, return_dict_in_generate=True)
    assert scored.values.shape == (1, tokens.shape[1] - 3)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients():
    plain, checkpointed = pretrained().train(), pretrained().train()
    checkpointed.load_state_dict(plain.state_dict())
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    assert any(getattr(module, "gradient_checkpointing", False) for module in checkpointed.modules())
    for model in (plain, checkpointed):
        model.v_head.dropout.p = 0.0
        model(**batch(model.pretrained_model), use_cache=False).value.sum().backward()
    grads = [[p.grad for p in model.parameters()] for model in (plain, checkpointed)]
    assert all((a is None) == (b is None) for a, b in zip(*grads, strict=True))
    pairs = [(a, b) for a, b in zip(*grads, strict=True) if a is not None]
    assert len(pairs) > 20
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@torch.no_grad()
def test_copies_are_whole(copied):
    model = pretrained(**TIED)
    inputs = batch(model.pretrained_model)
    expected = model(**inputs).value
    copied_model = copied(model)
    assert same_state(copied_model, model)
    assert is_tied(copied_model)
    model.v_head.summary.bias.add_(1.0)
    assert torch.equal(copied_model(**inputs).value, expected)


def test_the_vocabulary_can_grow(tmp_path):
    model = pretrained(**TIED)
    model.resize_token_embeddings(101)
    assert model.config.vocab_size == model.config.text_config.vocab_size == 101
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert same_state(loaded, model)
    assert loaded(torch.tensor([[100]])).logits.shape == (1, 1, 101)


def test_attention_is_the_body_s_choice(saved):
    _, folder = saved
    for load in (AutoModel.from_pretrained, ValueHeadModel.from_pretrained):
        implementations = [load(folder, attn_implementation=name) for name in ("eager", "sdpa")]
        chosen = [model.pretrained_model.config._attn_implementation for model in implementations]
        assert chosen == ["eager", "sdpa"]


def test_an_adapter():
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        # peft reads an attribute that transformers 5 renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["v_head"])
        model = peft.get_peft_model(pretrained(), config)
    inputs = batch(model.get_base_model().pretrained_model)
    model(**inputs).value.sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert any("v_head" in name for name in trained)
    assert any("lora_B" in name for name in trained)
    assert all("lora" in name or "v_head" in name for name in trained)
    wrapper = wrapped()
    wrapper.pretrained_model, wrapper.is_peft_model = model, True
    with pytest.raises(HeadError, match="merge"):
        ValueHeadModel.from_wrapper(wrapper)


def test_the_trainer_trains_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = pretrained()
    rows = [{"input_ids": torch.arange(3, 9) + i, "labels": torch.arange(3, 9) + i} for i in range(4)]
    before = model.pretrained_model.lm_head.weight.clone()
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, report_to=[], save_strategy="no", use_cpu=True
    )
    with warnings.catch_warnings():
        # Old and new releases of torch and accelerate warn about each other.
        warnings.simplefilter("ignore")
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        assert trainer.predict(rows).predictions[1].shape == (4, 6)
    assert not torch.equal(model.pretrained_model.lm_head.weight, before)
    trainer.save_model(tmp_path / "saved")
    assert same_state(AutoModel.from_pretrained(tmp_path / "saved"), model)


@torch.no_grad()
def test_the_wrapper_and_the_scorer_read_the_folder(saved):
    model, folder = saved
    inputs = batch(model.pretrained_model)
    wrapper = AutoModelForCausalLMWithValueHead.from_pretrained(folder)
    assert type(wrapper.pretrained_model) is type(model.pretrained_model)
    assert torch.equal(wrapper(**inputs).value, model(**inputs).value)
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is ValueHeadModel
    scores = Scorer.from_pretrained(folder).score([Rollout([3, 4], [5, 6])], returns=("reward",))
    assert scores.reward[0] == pytest.approx(model.values(torch.tensor([[3, 4, 5, 6]]))[0, -1].item(), rel=1e-5)


def without(folder, target, *names):
    """A copy of a saved model that lacks some tensors."""
    tensors = load_file(folder / "model.safetensors")
    target.mkdir()
    (target / "config.json").write_text((folder / "config.json").read_text())
    kept = {name: tensor for name, tensor in tensors.items() if name not in names}
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_a_folder_that_lacks_something_is_an_error(saved, tmp_path):
    _, folder = saved
    for names in (["v_head.summary.bias"], ["v_head.summary.bias", "v_head.summary.weight"]):
        with pytest.raises(HeadNotFoundError, match=r"found no v_head\.summary\.bias"):
            AutoModel.from_pretrained(without(folder, tmp_path / str(len(names)), *names))
    name = "pretrained_model.model.layers.0.mlp.up_proj.weight"
    with pytest.raises(BodyMismatchError, match=name):
        AutoModel.from_pretrained(without(folder, tmp_path / "body", name))


def test_a_folder_of_another_form_is_an_error(tmp_path):
    wrapped().save_pretrained(tmp_path)
    with pytest.raises(HeadError, match=r"turn it into this form with ValueHeadModel\.from_wrapper"):
        ValueHeadModel.from_pretrained(tmp_path)


def test_importing_vhead_after_transformers_registers_the_form(saved, fresh_python):
    load = f"print(type(AutoConfig.from_pretrained({str(saved[1])!r})).__name__)"
    assert fresh_python(f"import transformers, vhead; from transformers import AutoConfig; {load}") == "ValueHeadConfig"


def test_using_vhead_registers_the_form_where_transformers_came_later(saved, fresh_python):
    load = f"AutoConfig.from_pretrained({str(saved[1])!r})"
    code = f"""
import vhead
from transformers import AutoConfig
try:
    {load}
except ValueError as error:
    print("`vhead`" in str(error))
vhead.ValueHead
print(type({load}).__name__)
"""
    assert fresh_python(code).split() == ["True", "ValueHeadConfig"]
