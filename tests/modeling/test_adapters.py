"""Models with LoRA adapters: put on, loaded, saved with the head, resumed; and the adapters that are refused."""

import copy
import json
import logging
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.modeling.tiny_models import batch, build

pytest.importorskip("peft")

import peft

import vhead.checkpoints.checkpoint
import vhead.modeling.adapters
from tests.modeling.adapters_on_disk import ADAPTED, lora, peft_is_quiet, save_base
from vhead import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead, create_reference_model
from vhead.errors import AdapterError, HeadError, HeadFileError, MissingPackageError
from vhead.upstream import cache_of

HEAD_KEYS = ["v_head.summary.weight", "v_head.summary.bias"]


@pytest.fixture(autouse=True)
def quiet():
    with peft_is_quiet():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


def wrapped(base, **arguments):
    model = AutoModelForCausalLMWithValueHead.from_pretrained(base, peft_config=lora(), **arguments)
    torch.nn.init.normal_(model.v_head.summary.bias)
    return model


@pytest.fixture
def saved(base, tmp_path):
    model = wrapped(base)
    model.save_pretrained(save_directory=tmp_path / "new" / "adapter")
    return model, tmp_path / "new" / "adapter"


def trained_names(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def same_parameters(a, b):
    """Equal parameters, in the same order."""
    pairs = list(zip(a.named_parameters(), b.named_parameters(), strict=True))
    return all(name == other_name and torch.equal(p, q) for (name, p), (other_name, q) in pairs)


def inputs_of(model):
    return batch(model.pretrained_model.get_base_model())


@pytest.mark.parametrize("given", ["path", "object"])
def test_a_new_adapter_trains_beside_the_head_and_nothing_else_does(base, given):
    model = wrapped(base if given == "path" else build("llama"))
    assert model.is_peft_model
    names = trained_names(model)
    assert names[-2:] == HEAD_KEYS
    assert len(names) == 3 * len(ADAPTED) * 2 + 2
    assert all("lora_" in name for name in names[:-2])
    output = model(**inputs_of(model))
    (output.value.sum() + output.logits.sum()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == names


@pytest.mark.parametrize("training", [True, False])
def test_a_new_adapter_takes_over_the_mode(base, training):
    model = wrapped(build("llama").train(training))
    assert {module.training for module in model.modules()} == {training}
    assert {module.training for module in wrapped(base).modules()} == {False}


def test_the_folder_holds_adapter_and_head_for_us_and_for_trl(saved):
    model, folder = saved
    files = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "pytorch_model.bin", "value_head.safetensors"} <= files
    assert not any(name.startswith(".") for name in files)
    for head in (
        load_file(folder / "value_head.safetensors"),
        torch.load(folder / "pytorch_model.bin", weights_only=True),
    ):
        assert sorted(head) == sorted(HEAD_KEYS)
        assert all(torch.equal(head[name], model.state_dict()[name]) for name in HEAD_KEYS)


@torch.no_grad()
def test_save_and_load_bit_for_bit(saved):
    model, folder = saved
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(folder)
    assert same_parameters(loaded, model)
    assert str(folder) in loaded.head_source
    assert torch.equal(loaded(**inputs_of(model)).value, model(**inputs_of(model)).value)
    assert torch.equal(loaded.values(**inputs_of(model)), model.values(**inputs_of(model)))
    assert {module.training for module in loaded.modules()} == {False}


def test_a_loaded_adapter_is_frozen_unless_it_is_to_train(saved):
    model, folder = saved
    assert trained_names(AutoModelForCausalLMWithValueHead.from_pretrained(folder)) == HEAD_KEYS
    resumed = AutoModelForCausalLMWithValueHead.from_pretrained(folder, is_trainable=True)
    assert trained_names(resumed) == trained_names(model)
    assert {module.training for module in resumed.modules()} == {False}


def train_a_step(model):
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    output = model(**inputs_of(model))
    (output.value.square().mean() + output.logits.square().mean()).backward()
    torch.optim.SGD(trained, lr=0.1).step()
    return model.eval()


def test_training_resumes_where_it_was(saved, tmp_path):
    _, folder = saved
    resumed = train_a_step(AutoModelForCausalLMWithValueHead.from_pretrained(folder, is_trainable=True))
    resumed.save_pretrained(folder)
    again = AutoModelForCausalLMWithValueHead.from_pretrained(folder, is_trainable=True)
    assert same_parameters(again, resumed)
    assert not same_parameters(again, saved[0])


def test_what_trl_wrote_is_read(base, tmp_path):
    trl = pytest.importorskip("trl.experimental.ppo", exc_type=ImportError)
    theirs = trl.AutoModelForCausalLMWithValueHead.from_pretrained(base, peft_config=lora())
    (tmp_path / "adapter").mkdir()
    theirs.save_pretrained(str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter" / "value_head.safetensors").exists()
    ours = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "adapter")
    assert same_parameters(ours, theirs)


def test_trl_reads_what_we_wrote(saved):
    trl = pytest.importorskip("trl.experimental.ppo", exc_type=ImportError)
    model, folder = saved
    assert same_parameters(trl.AutoModelForCausalLMWithValueHead.from_pretrained(str(folder)), model)


def test_a_plain_adapter_gets_a_fresh_head(base, saved, caplog):
    model, folder = saved
    for name in ("value_head.safetensors", "pytorch_model.bin"):
        (folder / name).unlink()
    with caplog.at_level(logging.WARNING, logger="vhead"):
        loaded = AutoModelForCausalLMWithValueHead.from_pretrained(folder)
    assert loaded.head_source is None
    assert "fresh" in caplog.text
    assert same_parameters(loaded.pretrained_model, model.pretrained_model)


def test_a_configuration_is_not_used_where_there_is_an_adapter(saved, caplog):
    model, folder = saved
    for given in (folder, model.pretrained_model):
        caplog.clear()
        loaded = AutoModelForCausalLMWithValueHead.from_pretrained(given, peft_config=lora(r=7))
        assert "peft_config: not used" in caplog.text
        assert loaded.pretrained_model.peft_config["default"].r == 2


def test_arguments_for_a_loaded_model_are_named(caplog):
    AutoModelForCausalLMWithValueHead.from_pretrained(build("llama"), device_map="cpu", torch_dtype="auto")
    assert "device_map, torch_dtype: not used" in caplog.text


def test_a_model_with_an_adapter_is_taken_as_it_is(base):
    body = peft.get_peft_model(build("llama"), lora())
    model = AutoModelForCausalLMWithValueHead.from_pretrained(body)
    assert model.pretrained_model is body
    assert model.is_peft_model


def test_an_adapter_without_a_task_is_a_language_models(base, tmp_path):
    model = AutoModelForCausalLMWithValueHead.from_pretrained(base, peft_config=lora(task_type=None))
    assert type(model.pretrained_model) is peft.PeftModel
    assert AutoModelForCausalLMWithValueHead.from_pretrained(model.pretrained_model).is_peft_model
    model.save_pretrained(tmp_path)
    assert same_parameters(AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path), model)


def test_seq2seq(tmp_path):
    build("t5").save_pretrained(tmp_path / "base")
    config = lora(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"])
    model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(tmp_path / "base", peft_config=config)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(tmp_path / "adapter")
    assert same_parameters(loaded, model)
    assert torch.equal(loaded(**inputs_of(model)).value, model(**inputs_of(model)).value)


def test_the_state_dict_is_the_head_and_goes_back_in_strictly(base):
    model, other = wrapped(base), wrapped(base)
    assert list(model.state_dict()) == HEAD_KEYS
    result = other.load_state_dict(model.state_dict(), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(other.v_head.summary.weight, model.v_head.summary.weight)
    parent = torch.nn.ModuleDict({"before": torch.nn.Linear(2, 2), "policy": other})
    parent.load_state_dict(parent.state_dict())


def test_a_state_dict_with_a_part_of_the_body_must_have_all_of_it(base):
    model = wrapped(base)
    whole = torch.nn.Module.state_dict(model)
    model.load_state_dict(whole)
    name = next(name for name in whole if "lora_A" in name)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({key: value for key, value in whole.items() if key != name})
    with pytest.raises(RuntimeError, match=r"v_head\.summary\.bias"):
        model.load_state_dict({HEAD_KEYS[0]: model.state_dict()[HEAD_KEYS[0]]})
    with pytest.raises(RuntimeError, match=r"v_head\.summary\.weight"):
        model.load_state_dict({})


def test_a_given_state_dict_is_what_is_saved(base, tmp_path):
    """As sharded training hands it over: the model's own parameters are pieces then."""
    model = wrapped(base)
    gathered = {name: value + 1 for name, value in torch.nn.Module.state_dict(model).items()}
    model.save_pretrained(tmp_path, state_dict=gathered)
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    for name, parameter in loaded.named_parameters():
        expected = model.get_parameter(name) + (1 if "lora_" in name or "v_head" in name else 0)
        assert torch.equal(parameter, expected), name


def test_a_reference_model_is_a_copy_with_its_adapter(base):
    model = wrapped(base)
    reference = create_reference_model(model)
    assert same_parameters(reference, model)
    assert trained_names(reference) == []
    assert copy.deepcopy(model).is_peft_model


def test_gradient_checkpointing_gives_the_same_gradients_to_the_same_parameters(base):
    from tests.modeling.test_modes import enable_checkpointing

    model = wrapped(base, summary_dropout_prob=0.0).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            enable_checkpointing(model)
            model.enable_input_require_grads()
            model.zero_grad()
        model(**inputs_of(model), use_cache=False).value.square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert list(gradients[0]) == trained_names(model)
    assert list(gradients[1]) == trained_names(model)
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


# Where the files are


class Hub:
    """Files of repositories in a folder, and who asked for them how."""

    def __init__(self, root):
        self.root, self.asked = root, []

    def __call__(self, repository, name, *, subfolder=None, **arguments):
        from huggingface_hub.errors import EntryNotFoundError

        self.asked.append((repository, name, subfolder, arguments))
        path = self.root / repository / (subfolder or "") / name
        if not path.exists():
            raise EntryNotFoundError(name)
        return str(path)


def test_an_adapter_on_the_hub_is_looked_up_as_asked(base, tmp_path, monkeypatch):
    model = wrapped(base)
    model.save_pretrained(tmp_path / "some" / "adapter" / "step-5")
    hub = Hub(tmp_path)
    monkeypatch.setattr(vhead.checkpoints.checkpoint, "hf_hub_download", hub)
    where = {"revision": "abc", "cache_dir": str(tmp_path / "cache"), "token": "t", "local_files_only": True}
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained("some/adapter", subfolder="step-5", **where)
    assert same_parameters(loaded, model)
    assert all(ask[0] == "some/adapter" and ask[2:] == ("step-5", where) for ask in hub.asked)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {ask[1] for ask in hub.asked}


def test_the_language_model_has_a_place_of_its_own(base, saved, monkeypatch):
    _, folder = saved
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "revision": "of-the-base"}))
    seen = {}

    def from_pretrained(location, **arguments):
        seen.update(arguments, location=location)
        raise KeyboardInterrupt

    monkeypatch.setattr(AutoModelForCausalLMWithValueHead.transformers_parent_class, "from_pretrained", from_pretrained)
    where = {"cache_dir": "/cache", "local_files_only": True, "token": "t"}
    with pytest.raises(KeyboardInterrupt):
        AutoModelForCausalLMWithValueHead.from_pretrained(
            folder.parent, subfolder="adapter", revision="of-the-adapter", variant="fp16", **where
        )
    del seen["output_loading_info"]
    expected = {"location": base, "revision": "of-the-base", "variant": "fp16", "trust_remote_code": False}
    assert seen == {**where, **expected}


def test_a_local_adapter_never_asks_the_hub(saved, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("asked the hub")

    monkeypatch.setattr(vhead.checkpoints.checkpoint, "hf_hub_download", refuse)
    model, folder = saved
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(folder.parent, subfolder="adapter")
    assert same_parameters(loaded, model)


# What callers of peft reach for


def test_trained_parameters_are_counted_with_the_head_s(base, capsys):
    model = wrapped(base)
    trained = sum(model.get_parameter(name).numel() for name in trained_names(model))
    every = sum(parameter.numel() for parameter in model.parameters())
    assert model.get_nb_trainable_parameters() == (trained, every)
    model.print_trainable_parameters()
    assert f"trainable params: {trained:,d} || all params: {every:,d}" in capsys.readouterr().out
    assert trained > model.pretrained_model.get_nb_trainable_parameters()[0]


@torch.no_grad()
def test_the_adapter_can_be_switched_off(base):
    model = wrapped(base)
    plain = AutoModelForCausalLMWithValueHead.from_pretrained(base)
    plain.v_head = model.v_head
    assert model.active_adapters == ["default"]
    with model.disable_adapter():
        assert torch.equal(model(**inputs_of(model)).value, plain(**inputs_of(model)).value)
    assert not torch.allclose(model(**inputs_of(model)).value, plain(**inputs_of(model)).value, atol=1e-3)


@torch.no_grad()
def test_a_merged_model_is_one_without_adapters(base, tmp_path):
    model = wrapped(base)
    inputs = inputs_of(model)
    expected = model(**inputs)
    merged = model.merge_and_unload()
    assert merged is model
    assert not model.is_peft_model
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    for result in (model(**inputs), loaded(**inputs)):
        torch.testing.assert_close(result.value, expected.value, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(result.logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert not (tmp_path / "adapter_config.json").exists()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("change", [5, -7], ids=["more", "fewer"])
@torch.no_grad()
def test_an_adapter_of_a_model_whose_vocabulary_was_resized_loads(tmp_path, tied, change):
    build("llama", tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    model = wrapped(str(tmp_path / "base"))
    model.resize_token_embeddings(97 + change)
    with warnings.catch_warnings(action="ignore"):
        model.save_pretrained(tmp_path / "adapter")
        loaded = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "adapter")
    assert loaded.config.vocab_size == 97 + change
    tokens = torch.tensor([[96 + change, 3, 4]])
    assert torch.equal(loaded(tokens).value, model(tokens).value)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_a_language_model_that_was_moved_is_named(base, saved):
    _, folder = saved
    config = json.loads((folder / "adapter_config.json").read_text())
    for moved in ("/models/gone", "./gone", "some/folder/gone"):
        (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": moved}))
        with pytest.raises(AdapterError, match=f"the adapter's language model: {moved}: .*; if it was moved, name its"):
            AutoModelForCausalLMWithValueHead.from_pretrained(folder)


# What is refused


@pytest.mark.parametrize("peft_config", ["lora", {"r": 2}, 3])
@pytest.mark.parametrize("given", ["path", "object"])
def test_a_configuration_must_be_one(base, given, peft_config):
    with pytest.raises(ValueError, match=r"peft_config: expected a peft\.PeftConfig, got a"):
        AutoModelForCausalLMWithValueHead.from_pretrained(
            base if given == "path" else build("llama"), peft_config=peft_config
        )


def prompt(kind):
    if kind == "prefix":
        return peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)


# What peft's learnt prefixes say of themselves: they hand a cache to the model by its old name.
gives_the_cache_its_old_name = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")


@gives_the_cache_its_old_name
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_prompt_learning_is_refused_but_can_be_constructed(base, tmp_path, kind):
    body = peft.get_peft_model(build("llama"), prompt(kind)).eval()
    body.peft_config["default"].base_model_name_or_path = base
    body.save_pretrained(tmp_path)
    for given, arguments in ((body, {}), (tmp_path, {}), (base, {"peft_config": prompt(kind)})):
        with pytest.raises(ValueError, match="prompt learning"):
            AutoModelForCausalLMWithValueHead.from_pretrained(given, **arguments)
    model = AutoModelForCausalLMWithValueHead(body)
    with torch.no_grad():
        output = model(**inputs_of(model))
        expected = body(**inputs_of(model), output_hidden_states=True)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.value, model.v_head(expected.hidden_states[-1]).squeeze(-1))


@gives_the_cache_its_old_name
@torch.no_grad()
def test_a_learnt_prefix_takes_the_place_of_a_cache():
    model = AutoModelForCausalLMWithValueHead(peft.get_peft_model(build("llama"), prompt("prefix")).eval())
    cache = cache_of(build("llama")(**inputs_of(model)))
    expected = model(**inputs_of(model))
    assert torch.equal(model(**inputs_of(model), past_key_values=cache).value, expected.value)


def test_an_adapter_of_another_task_is_refused():
    from transformers import AutoConfig, AutoModelForSequenceClassification

    classifier = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("llama", **build_settings()))
    body = peft.get_peft_model(classifier, lora(task_type="SEQ_CLS"))
    with pytest.raises(
        AdapterError, match=r"expected a language model, got a PeftModelForSequenceClassification.*SEQ_CLS"
    ):
        AutoModelForCausalLMWithValueHead.from_pretrained(body)


def build_settings():
    from tests.modeling.tiny_models import COMMON

    return COMMON


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda f: (f / "adapter_model.safetensors").unlink(), AdapterError, r"expected adapter_model\.safetensors"),
        (lambda f: (f / "adapter_config.json").write_text("{"), AdapterError, r"adapter_config\.json: expected"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), AdapterError, "expected a JSON object, got a list"),
        (
            lambda f: (f / "adapter_config.json").write_text('{"base_model_name_or_path": 3}'),
            AdapterError,
            "base_model_name_or_path: expected a string, got 3",
        ),
        (
            lambda f: (f / "adapter_config.json").write_text('{"peft_type": "LORA"}'),
            AdapterError,
            "base_model_name_or_path: expected the adapter's language model",
        ),
        (
            lambda f: (f / "adapter_model.safetensors").write_bytes(
                (f / "adapter_model.safetensors").read_bytes()[:-9]
            ),
            HeadFileError,
            r"adapter_model\.safetensors",
        ),
        (
            lambda f: save_file({HEAD_KEYS[0]: torch.randn(1, 32)}, f / "value_head.safetensors"),
            HeadError,
            r"v_head\.summary",
        ),
    ],
    ids=["no weights", "no JSON", "a list", "a number", "no base", "truncated", "half a head"],
)
def test_broken_folders(saved, change, error, message):
    _, folder = saved
    (folder / "pytorch_model.bin").unlink()
    change(folder)
    with pytest.raises(error, match=message):
        AutoModelForCausalLMWithValueHead.from_pretrained(folder)


class Payload:
    def __reduce__(self):
        return (exec, ("raise SystemExit",))


def test_code_in_an_adapters_pickle_is_never_run(saved):
    _, folder = saved
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"x": Payload()}, folder / "adapter_model.bin")
    with pytest.raises(HeadFileError, match=r"adapter_model\.bin"):
        AutoModelForCausalLMWithValueHead.from_pretrained(folder)


def test_without_peft_an_adapter_says_what_to_install(saved, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(MissingPackageError, match="pip install peft"):
        AutoModelForCausalLMWithValueHead.from_pretrained(saved[1])
    with pytest.raises(MissingPackageError):
        AutoModelForCausalLMWithValueHead.from_pretrained(build("llama"), peft_config=object())


def test_without_peft_everything_else_works(fresh_python, tmp_path):
    code = f"""
import sys
sys.modules["peft"] = None
from tests.modeling.tiny_models import batch, build
from vhead import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead
for architecture, wrapper in (("llama", AutoModelForCausalLMWithValueHead), ("t5", AutoModelForSeq2SeqLMWithValueHead)):
    build(architecture).save_pretrained({str(tmp_path)!r} + architecture)
    model = wrapper.from_pretrained({str(tmp_path)!r} + architecture)
    output = model(**batch(model.pretrained_model))
    (output.logits.square().mean() + output.value.sum()).backward()
    print(all(parameter.grad is not None for parameter in model.parameters()), model.v_head.summary.bias.grad.item())
print(model._split_kwargs({{"device_map": "cpu"}}))
"""
    assert fresh_python(code).splitlines() == ["True 14.0", "True 10.0", "({}, {'device_map': 'cpu'}, {})"]


# Quantised models: what transformers and bitsandbytes would do is told by a stand-in.


class Quantised:
    """Stands in for the parent class: loads the model unquantised, marks it, and records the arguments."""

    def __init__(self, flag="is_loaded_in_4bit"):
        self.flag, self.arguments = flag, {}

    def from_pretrained(self, location, **arguments):
        self.arguments = {"location": location, **arguments}
        body = build("llama")
        setattr(body, self.flag, True)
        return body, {"missing_keys": set(), "unexpected_keys": set()}


@pytest.fixture
def quantised(monkeypatch):
    parent = Quantised()
    monkeypatch.setattr(AutoModelForCausalLMWithValueHead, "transformers_parent_class", parent)
    return parent


class BitsAndBytes:
    load_in_4bit = True


@pytest.mark.parametrize(
    "asked",
    [
        {"load_in_4bit": True},
        {"load_in_8bit": True},
        {"quantization_config": BitsAndBytes()},
        {"quantization_config": {"load_in_4bit": True}},
    ],
    ids=["4bit", "8bit", "config", "dict"],
)
def test_a_quantised_model_goes_to_the_current_device(base, quantised, asked, caplog):
    model = AutoModelForCausalLMWithValueHead.from_pretrained(base, **asked)
    assert quantised.arguments["device_map"] == {"": model.current_device}
    assert "device_map: none given, so the whole quantised model goes to device" in caplog.text
    assert quantised.arguments["quantization_config"] == asked.get("quantization_config", asked)
    assert model.is_loaded_in_4bit


@pytest.mark.parametrize("asked", [{}, {"load_in_4bit": False}, {"load_in_4bit": True, "device_map": "auto"}])
def test_other_models_go_where_they_were_sent(base, quantised, asked, caplog):
    AutoModelForCausalLMWithValueHead.from_pretrained(base, **asked)
    assert quantised.arguments.get("device_map") == asked.get("device_map")
    assert "device_map" not in caplog.text


def test_flags_of_quantisation_go_into_its_configuration_which_newer_transformers_asks_for(base, quantised):
    AutoModelForCausalLMWithValueHead.from_pretrained(base, load_in_4bit=True, bnb_4bit_quant_type="nf4")
    assert quantised.arguments["quantization_config"] == {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    assert "load_in_4bit" not in quantised.arguments


def test_load_in_4bit_false_asks_for_nothing(base):
    model = AutoModelForCausalLMWithValueHead.from_pretrained(base, load_in_4bit=False, load_in_8bit=False)
    assert not model.is_loaded_in_4bit


@pytest.fixture
def prepared(monkeypatch):
    """What was asked of peft's preparation of quantised models."""
    calls = []

    def prepare_model_for_kbit_training(model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs=None):
        name = "surely a local variable"
        calls.append((model, use_gradient_checkpointing, gradient_checkpointing_kwargs, name))
        return model

    monkeypatch.setattr(peft, "prepare_model_for_kbit_training", prepare_model_for_kbit_training)
    return calls


def test_a_quantised_model_is_prepared_for_its_new_adapter(base, quantised, prepared):
    wrapped(base, load_in_4bit=True, use_gradient_checkpointing=False, gradient_checkpointing_kwargs={"a": 1})
    assert [call[1:3] for call in prepared] == [(False, {"a": 1})]
    assert "use_gradient_checkpointing" not in quantised.arguments
    body = build("llama")
    body.is_loaded_in_8bit = True
    wrapped(body)
    assert [call[0] for call in prepared][1:] == [body]


class Linear8Bit(torch.nn.Linear):
    """Stands in for a quantised layer, of which peft knows no more than that it is a linear one."""


@pytest.mark.parametrize("given", ["path", "object"])
def test_the_layers_of_a_quantised_model_stay_what_they_are(base, monkeypatch, prepared, given):
    class Quantising(Quantised):
        def from_pretrained(self, location, **arguments):
            body, info = super().from_pretrained(location, **arguments)
            for layer in body.model.layers:
                layer.mlp.up_proj = Linear8Bit(32, 48, bias=False)
            return body.requires_grad_(requires_grad=False), info

    parent = Quantising("is_loaded_in_8bit")
    monkeypatch.setattr(AutoModelForCausalLMWithValueHead, "transformers_parent_class", parent)
    model = wrapped(base, load_in_8bit=True) if given == "path" else wrapped(parent.from_pretrained(base)[0])
    assert len(prepared) == 1
    assert model.is_loaded_in_8bit
    layers = model.pretrained_model.get_base_model().model.layers
    assert {type(layer.mlp.up_proj) for layer in layers} == {Linear8Bit}
    assert all("lora_" in name or "v_head" in name for name in trained_names(model))


def test_another_model_is_not_prepared(base, prepared):
    wrapped(base, use_gradient_checkpointing=False)
    assert prepared == []


def test_arguments_named_like_local_variables_of_peft_do_not_vanish(base, quantised, prepared):
    wrapped(base, load_in_4bit=True, name="kept", loaded_in_kbit="kept")
    assert quantised.arguments["name"] == quantised.arguments["loaded_in_kbit"] == "kept"


def test_k_bit_arguments_without_an_adapter_do_not_vanish(base, quantised):
    AutoModelForCausalLMWithValueHead.from_pretrained(base, use_gradient_checkpointing=False)
    assert quantised.arguments["use_gradient_checkpointing"] is False
