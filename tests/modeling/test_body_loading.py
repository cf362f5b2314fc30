"""Which class loads a body, what its checkpoint lacked, and prefixed names: right or refused, never a random body."""

import json
import re
from functools import reduce

import pytest
import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

import vhead.checkpoints.checkpoint
from tests.library_versions import TRANSFORMERS
from tests.modeling.test_checkpoints import same_state
from tests.modeling.tiny_models import COMMON, batch, build
from vhead import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead, Scorer, ValueHead, formats
from vhead.errors import BodyMismatchError, HeadError, HeadMismatchError, HeadNotFoundError, LoadError
from vhead.formats import HeadWeights, LinearWeights
from vhead.modeling.loading import LoadArguments

RENAMES = Version("5") <= TRANSFORMERS


def wrapped(body=None, **arguments):
    model = AutoModelForCausalLMWithValueHead(build("llama") if body is None else body, **arguments)
    for parameter in model.v_head.parameters():
        torch.nn.init.normal_(parameter)
    return model


# Multimodal models

VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def llava():
    """Of a type that AutoModelForCausalLM does not know."""
    return AutoConfig.for_model(
        "llava",
        text_config={"model_type": "llama", **COMMON},
        vision_config={"model_type": "clip_vision_model", "projection_dim": 16, **VISION},
    )


def mllama():
    """Of a type of which AutoModelForCausalLM loads the text model alone."""
    vision = {
        **VISION,
        "num_global_layers": 1,
        "attention_heads": 2,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 32,
        "max_num_tiles": 2,
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    }
    # Before version 5, transformers has no default of its own.
    rope = {} if RENAMES else {"rope_scaling": {"rope_type": "default"}}
    return AutoConfig.for_model(
        "mllama", text_config={**COMMON, "cross_attention_layers": [1], **rope}, vision_config=vision
    )


def image_text_class():
    name = "AutoModelForImageTextToText"
    return getattr(transformers, name, None) or pytest.skip(f"this transformers has no {name}")


@pytest.mark.parametrize("config", [llava, mllama])
def test_a_multimodal_checkpoint_is_loaded_whole(tmp_path, config):
    body = image_text_class().from_config(config()).eval()
    model = wrapped(body)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert type(loaded.pretrained_model) is type(body)
    assert loaded.untrained == frozenset()
    assert same_state(loaded, model)
    tokens = torch.randint(3, 90, (2, 5))
    assert torch.equal(loaded(tokens).value, model(tokens).value)


def test_the_text_model_of_a_multimodal_one_stays_one(tmp_path):
    from transformers import MllamaForCausalLM

    model = wrapped(MllamaForCausalLM(mllama().text_config).eval())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert type(loaded.pretrained_model) is MllamaForCausalLM
    assert same_state(loaded, model)


@pytest.mark.parametrize("given", ["path", "object"])
def test_a_given_configuration_decides(tmp_path, given):
    model = wrapped()
    model.save_pretrained(tmp_path / "model")
    model.config.save_pretrained(tmp_path / "config")
    config = str(tmp_path / "config") if given == "path" else model.config
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "model", config=config)
    assert same_state(loaded, model)


def test_a_folder_without_a_configuration_is_transformers_error(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises((OSError, ValueError), match=re.escape(str(tmp_path))):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)


# Prefixes

PREFIXES = {
    "pretrained_model.": "",
    "module.pretrained_model.": "module.",
    "base_model.": "",
}


def prefixed(folder, body_prefix, head_prefix=""):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    renamed = {(head_prefix if name.startswith("v_head.") else body_prefix) + name: t for name, t in tensors.items()}
    save_file(renamed, file, metadata={"format": "pt"})


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom"])
def test_a_known_prefix_is_taken_off_or_refused(tmp_path, architecture, prefix):
    model = wrapped(build(architecture))
    model.save_pretrained(tmp_path)
    prefixed(tmp_path, prefix, PREFIXES[prefix])
    if not RENAMES:
        with pytest.raises(BodyMismatchError, match="vhead convert"):
            AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
        return
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert same_state(loaded, model)
    assert loaded.untrained == frozenset()


def test_a_known_prefix_is_refused_where_transformers_cannot_take_it_off(tmp_path, monkeypatch):
    monkeypatch.setattr("vhead.modeling.loading._MAPS_NAMES", False)
    wrapped().save_pretrained(tmp_path)
    prefixed(tmp_path, "pretrained_model.")
    with pytest.raises(BodyMismatchError, match=r"found pretrained_model\.model\.embed.*vhead convert"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)


@pytest.mark.parametrize("with_head", [True, False])
def test_an_unknown_prefix_is_refused(tmp_path, with_head):
    model = wrapped()
    (model if with_head else model.pretrained_model).save_pretrained(tmp_path)
    prefixed(tmp_path, "colour.of.paper.")
    with pytest.raises(BodyMismatchError, match=r"expected model\.embed_tokens\.weight.*found colour\.of\.paper"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)


def test_a_prefix_on_a_part_of_the_names_is_refused(tmp_path):
    wrapped().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["layers.inner.model.norm.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(BodyMismatchError, match=r"model\.norm\.weight"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)


def test_a_head_alone_is_no_model(tmp_path):
    model = wrapped()
    model.config.save_pretrained(tmp_path)
    head = {name: value for name, value in model.state_dict().items() if name.startswith("v_head.")}
    save_file(head, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BodyMismatchError, match=r"expected .*model\.embed_tokens\.weight"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)


# What a checkpoint lacks


def classifier(**settings):
    config = AutoConfig.for_model("llama", **COMMON, num_labels=1, **settings)
    model = AutoModelForTokenClassification.from_config(config).eval()
    torch.nn.init.normal_(model.score.weight)
    torch.nn.init.normal_(model.score.bias)
    return model


def test_a_classifier_has_values_but_no_language_model_head(tmp_path):
    model = classifier()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert loaded.untrained == {"lm_head.weight"}
    inputs = batch(build("llama"))
    with torch.no_grad():
        torch.testing.assert_close(loaded.values(**inputs), model(**inputs).logits.squeeze(-1))


def test_a_tied_one_lacks_nothing(tmp_path, transformers_log):
    classifier(tie_word_embeddings=True).save_pretrained(tmp_path)
    assert AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path).untrained == frozenset()
    assert "score" not in transformers_log.text


def test_a_lacking_language_model_head_is_reported(tmp_path, transformers_log):
    classifier().save_pretrained(tmp_path)
    AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert "lm_head.weight" in transformers_log.text


def test_a_part_of_the_trunk_is_named_as_well(tmp_path):
    wrapped().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert loaded.untrained == {"model.layers.1.mlp.up_proj.weight"}


def test_a_whole_checkpoint_and_an_object_lack_nothing(tmp_path):
    build("gpt2").save_pretrained(tmp_path)
    assert AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path).untrained == frozenset()
    assert AutoModelForCausalLMWithValueHead(build("gpt2")).untrained == frozenset()


# Heads of every kind


@pytest.mark.parametrize(
    "kind", [{"num_outputs": 3}, {"intermediate_size": 8}, {"num_outputs": 3, "intermediate_size": 8}]
)
@torch.no_grad()
def test_the_wrapper_has_the_kind_of_head_that_it_is_asked_for(tmp_path, kind):
    model = wrapped(**kind)
    inputs = batch(model.pretrained_model)
    shape = (2, 7, 3) if "num_outputs" in kind else (2, 7)
    assert model(**inputs).value.shape == shape
    assert torch.equal(model.values(**inputs), model(**inputs).value)
    model.save_pretrained(tmp_path)
    for arguments in ({}, kind):
        loaded = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, **arguments)
        assert same_state(loaded, model)
        assert torch.equal(loaded(**inputs).value, model(**inputs).value)
    fresh = AutoModelForCausalLMWithValueHead(build("llama"), **kind)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(**inputs).value, model(**inputs).value)


@pytest.mark.parametrize(
    ("saved", "asked"), [({}, {"num_outputs": 2}), ({"intermediate_size": 8}, {"intermediate_size": 9})]
)
def test_another_kind_than_asked_for_is_an_error(tmp_path, saved, asked):
    wrapped(**saved).save_pretrained(tmp_path)
    ((name, size),) = asked.items()
    with pytest.raises(HeadMismatchError, match=f"{name}: expected {size}, found"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, **asked)


@pytest.mark.parametrize("size", [0, -1])
def test_sizes_are_positive(size):
    with pytest.raises(HeadError, match="num_outputs"):
        AutoModelForCausalLMWithValueHead(build("llama"), num_outputs=size)


def test_a_loaded_head_of_another_kind_keeps_dropout_and_mode(tmp_path):
    wrapped(num_outputs=3).save_pretrained(tmp_path)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, summary_dropout_prob=0.3)
    assert isinstance(model.v_head, ValueHead)
    assert model.v_head.dropout.p == 0.3
    assert model.v_head.training is False


def test_an_adapters_head_of_two_layers_is_not_taken_for_trls(tmp_path):
    pytest.importorskip("peft")
    from tests.modeling.adapters_on_disk import lora, peft_is_quiet, save_base

    with peft_is_quiet():
        base = save_base(tmp_path / "base")
        first = AutoModelForCausalLMWithValueHead.from_pretrained(base, peft_config=lora())
        first.save_pretrained(tmp_path / "adapter")
        model = AutoModelForCausalLMWithValueHead.from_pretrained(base, peft_config=lora(), intermediate_size=8)
        model.save_pretrained(tmp_path / "adapter")
        assert not (tmp_path / "adapter" / "pytorch_model.bin").exists()
        assert same_state(AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "adapter"), model)


# Arguments


def test_every_argument_is_for_exactly_one():
    given = {
        "summary_dropout_prob": 0.1,
        "reward_adapter": "judge",
        "reward_adapter_name": "j",
        "is_trainable": True,
        "revision": "r",
        "variant": "v",
        "token": None,
        "something": 1,
    }
    arguments = LoadArguments.divide(given, ("summary_dropout_prob",))
    assert arguments.head == {"summary_dropout_prob": 0.1}
    assert arguments.model == {"revision": "r", "variant": "v", "token": None, "something": 1}
    assert arguments.location == {"revision": "r", "variant": "v", "token": None}
    assert arguments.adapter_location == {"revision": "r", "token": None}
    assert arguments.reward_location == {"token": None}
    assert (arguments.reward_adapter, arguments.reward_adapter_name, arguments.is_trainable) == ("judge", "j", True)


@pytest.mark.parametrize("architecture", ["t5", "bart"])
def test_an_encoder_decoder_is_loaded_by_its_own_class(tmp_path, architecture):
    model = AutoModelForSeq2SeqLMWithValueHead(build(architecture))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(tmp_path)
    assert same_state(loaded, model)
    assert loaded.untrained == frozenset()


def test_plain_transformers_reads_a_head_of_another_kind_past(tmp_path):
    model = wrapped(num_outputs=3, intermediate_size=8)
    model.save_pretrained(tmp_path)
    assert same_state(AutoModelForCausalLM.from_pretrained(tmp_path), model.pretrained_model)
    assert formats.load(tmp_path).num_outputs == 3


def test_the_head_of_another_place_takes_the_checkpoints_own_ones(tmp_path):
    model, other = wrapped(), wrapped()
    model.save_pretrained(tmp_path / "model")
    formats.save(head_of(other), tmp_path / "other.safetensors", format="trl")
    for body in (tmp_path / "model", build("llama")):
        loaded = AutoModelForCausalLMWithValueHead.from_pretrained(body, head=tmp_path / "other.safetensors")
        assert torch.equal(loaded.v_head.summary.weight, other.v_head.summary.weight)
        assert str(tmp_path / "other.safetensors") in loaded.head_source
    with pytest.raises(HeadNotFoundError, match="nothing: expected a trained value head, found none"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "model", head=tmp_path / "nothing")


def head_of(model):
    linear = model.v_head.summary
    return HeadWeights((LinearWeights(linear.weight.detach(), linear.bias.detach()),), "trl", "a test")


# What trainers and compilers wrap around a model


WRAPPED = ["module.", "_orig_mod.", "_fsdp_wrapped_module.", "policy.", "value_model.", "actor.", "_orig_mod.module."]


def renamed(folder, rename):
    file = folder / "model.safetensors"
    save_file({rename(name): value for name, value in load_file(file).items()}, file, metadata={"format": "pt"})


@pytest.mark.skipif(not RENAMES, reason="this transformers does not rename a checkpoint's weights")
@pytest.mark.parametrize("prefix", WRAPPED)
def test_a_folder_of_a_wrapped_model_loads(tmp_path, prefix):
    model = wrapped()
    model.save_pretrained(tmp_path)
    renamed(tmp_path, lambda name: prefix + name)
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert same_state(loaded, model)
    assert loaded.untrained == frozenset()


@pytest.mark.skipif(not RENAMES, reason="this transformers does not rename a checkpoint's weights")
@pytest.mark.parametrize("prefix", WRAPPED)
def test_a_folder_of_a_wrapped_model_without_a_head_loads(tmp_path, prefix):
    body = build("llama")
    body.save_pretrained(tmp_path)
    renamed(tmp_path, lambda name: prefix + name)
    assert same_state(AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path).pretrained_model, body)


@pytest.mark.skipif(not RENAMES, reason="this transformers does not rename a checkpoint's weights")
def test_a_folder_of_wrapped_layers_loads(tmp_path):
    model = wrapped()
    model.save_pretrained(tmp_path)
    parts = {"layers.1.": "layers.1._checkpoint_wrapped_module._orig_mod.", "mlp.": "mlp._fsdp_wrapped_module."}
    renamed(tmp_path, lambda name: "_orig_mod." + reduce(lambda path, part: path.replace(*part), parts.items(), name))
    assert same_state(AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("prefix", WRAPPED)
def test_a_state_dict_of_a_wrapped_model_loads(prefix):
    model, other = wrapped(), wrapped()
    state = {prefix + name: value for name, value in model.state_dict().items()}
    other.load_state_dict(state)
    assert same_state(other, model)
    assert other.head_source == "load_state_dict"


def test_a_state_dict_of_wrapped_layers_loads_into_wrapped_layers_and_back():
    model, other = wrapped(), wrapped()
    layers = other.pretrained_model.model.layers
    layers[1] = torch.nn.ModuleDict({"_orig_mod": layers[1]})
    other.load_state_dict(model.state_dict())
    state = other.state_dict()
    assert any("._orig_mod." in name for name in state)
    fresh = wrapped()
    fresh.load_state_dict(state)
    assert same_state(fresh, model)


def test_two_models_in_one_state_dict_are_not_mixed():
    state = wrapped().state_dict()
    both = {f"{name}.{key}": value for name in ("policy", "value_model") for key, value in state.items()}
    with pytest.raises(RuntimeError, match="Unexpected key"):
        wrapped().load_state_dict(both)


@pytest.mark.skipif(not RENAMES, reason="this transformers does not rename a checkpoint's weights")
def test_a_folder_of_trl_s_ppo_trainer_gives_the_value_model(tmp_path):
    """It holds a policy and, beside it, the classifier whose score is the value."""
    policy, value_model = build("llama"), classifier()
    policy.save_pretrained(tmp_path)
    parts = {"policy": policy, "value_model": value_model}
    state = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert same_state(loaded.pretrained_model.model, value_model.model)
    assert torch.equal(loaded.v_head.summary.weight, value_model.score.weight)
    assert loaded.untrained == {"lm_head.weight"}


# What is left over


def test_layers_that_the_configuration_does_not_have_are_not_left_out(tmp_path):
    wrapped().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2, "layer_types": None}))
    with pytest.raises(
        BodyMismatchError, match=r"holds layers that its configuration does not have: model\.layers\.2\."
    ):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)


def test_a_caller_may_ask_for_fewer_layers(tmp_path):
    wrapped().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, num_hidden_layers=2)
    assert len(loaded.pretrained_model.model.layers) == 2


@pytest.mark.parametrize("name", ["something.weight", "model.something.weight"])
def test_a_row_of_an_unknown_name_is_a_head_that_does_not_fit(tmp_path, name):
    build("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), name: torch.randn(1, 32)}, file, metadata={"format": "pt"})
    with pytest.raises(HeadMismatchError, match=f"{name} \\[1, 32\\]"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)


# Where there is nothing


class DeadHub:
    """Counts how often the hub is asked, and never answers."""

    def __init__(self, error):
        self.asked, self._error = 0, error

    def __call__(self, *_arguments, **_options):
        self.asked += 1
        raise self._error("of the hub")


@pytest.mark.parametrize("load", [AutoModelForCausalLMWithValueHead.from_pretrained, Scorer.from_pretrained])
def test_a_repository_that_cannot_be_reached_is_asked_for_a_few_times_at_most(monkeypatch, load):
    hub = DeadHub(LocalEntryNotFoundError)
    monkeypatch.setattr(vhead.checkpoints.checkpoint, "hf_hub_download", hub)
    with pytest.raises(LoadError, match=r"^org/typo: expected the folder of a model or .* the hub cannot be reached"):
        load("org/typo")
    assert hub.asked <= 2


@pytest.mark.parametrize("name", ["./nothing", "/no/such/folder", "no/such/folder"])
def test_a_missing_folder_has_a_sentence_of_our_own(name):
    with pytest.raises(LoadError, match=f"^{re.escape(name)}: expected the folder of a model or .* no such folder"):
        AutoModelForCausalLMWithValueHead.from_pretrained(name)


@pytest.mark.parametrize("cls", [AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead])
def test_a_path_given_to_the_constructor_names_from_pretrained(cls):
    with pytest.raises(HeadError, match=r"got 'some/path'; .* from_pretrained"):
        cls("some/path")


def test_the_constructor_takes_what_trl_s_takes(caplog):
    AutoModelForCausalLMWithValueHead(build("llama"), torch_dtype=torch.float32, device_map="auto")
    assert "torch_dtype, device_map: not used, since the language model is loaded already" in caplog.text
