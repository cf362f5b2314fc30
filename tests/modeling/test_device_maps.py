"""Models that accelerate spreads or offloads: the head is beside the last hidden state, and only values are moved."""

import copy
import logging
import pickle
import warnings

import pytest
import torch

from tests.modeling.tiny_models import batch, build

pytest.importorskip("accelerate")

from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module

from tests.library_versions import IS_BEFORE_4_57
from vhead import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead
from vhead.backbone.placement import last_hidden_device, uses_several_accelerators

DISK = {"model": "disk", "lm_head": "cpu"}
MIXED = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
    "model.norm": "disk",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}
# accelerate cannot offload embeddings that another part of the model ties to its own.
T5_MAP = {
    **dict.fromkeys(["shared", "encoder", "decoder.embed_tokens", "decoder.dropout", "lm_head"], "cpu"),
    **dict.fromkeys(["decoder.block", "decoder.final_layer_norm"], "disk"),
}
MAPS = {"cpu": {"": "cpu"}, "auto": "auto", "disk": DISK, "mixed": MIXED}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = AutoModelForCausalLMWithValueHead(build("llama"))
    torch.nn.init.normal_(model.v_head.summary.bias)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return model, folder


def load(folder, device_map, tmp_path):
    return AutoModelForCausalLMWithValueHead.from_pretrained(
        folder, device_map=device_map, offload_folder=str(tmp_path / "offload")
    )


@pytest.mark.parametrize("name", MAPS)
@torch.no_grad()
def test_offloaded_models_give_the_same_values(saved, tmp_path, name):
    model, folder = saved
    loaded = load(folder, MAPS[name], tmp_path)
    inputs = batch(model.pretrained_model)
    expected, output = model(**inputs), loaded(**inputs)
    assert torch.equal(output.value, expected.value)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(loaded.values(**inputs), model.values(**inputs))
    assert loaded.v_head.summary.weight.device == torch.device("cpu")
    assert torch.equal(loaded.v_head.summary.weight, model.v_head.summary.weight)
    assert loaded.is_sequential_parallel is False
    if loaded.device.type == "meta":
        return  # older versions of transformers warn of generating with such a model
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    row = {key: value[:1] for key, value in inputs.items()}
    assert torch.equal(loaded.generate(**row, **options), model.generate(**row, **options))


def test_the_maps_really_offload(saved, tmp_path):
    loaded = load(saved[1], MIXED, tmp_path)
    assert loaded.pretrained_model.model.norm.weight.is_meta
    assert loaded.hf_device_map == loaded.pretrained_model.hf_device_map
    assert "disk" in loaded.hf_device_map.values()


@pytest.mark.skipif(IS_BEFORE_4_57, reason="this transformers saves no offloaded model")
@pytest.mark.parametrize("name", ["disk", "mixed"])
def test_an_offloaded_model_is_saved_whole(saved, tmp_path, name):
    model, folder = saved
    loaded = load(folder, MAPS[name], tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
        loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "again").state_dict()
    assert list(again) == list(model.state_dict())
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["cpu", "auto"])
def test_a_model_on_one_device_can_be_pickled_and_copied(saved, tmp_path, name):
    model, folder = saved
    loaded = load(folder, MAPS[name], tmp_path)
    inputs = batch(model.pretrained_model)
    for other in (pickle.loads(pickle.dumps(loaded)), copy.deepcopy(loaded)):
        assert torch.equal(other(**inputs).value, model(**inputs).value)


@pytest.mark.parametrize("offload", [cpu_offload, lambda body, **_: disk_offload(body, "offloaded", **_)])
@torch.no_grad()
def test_a_given_object_that_is_offloaded(offload, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLMWithValueHead(build("llama"))
    body = build("llama")
    offload(body, execution_device=torch.device("cpu"))
    assert body.lm_head.weight.is_meta
    other = AutoModelForCausalLMWithValueHead.from_pretrained(body)
    other.v_head.load_state_dict(model.v_head.state_dict())
    inputs = batch(build("llama"))
    assert torch.equal(other(**inputs).value, model(**inputs).value)
    assert torch.equal(other.values(**inputs), model.values(**inputs))


# transformers 4.57 loads one embedding under one name, and accelerate misses the other.
@pytest.mark.filterwarnings("ignore:The following device_map keys do not match any submodules:UserWarning")
@torch.no_grad()
def test_an_encoder_decoder_that_is_offloaded(tmp_path):
    model = AutoModelForSeq2SeqLMWithValueHead(build("t5"))
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(
        tmp_path / "model",
        device_map=T5_MAP,
        offload_folder=str(tmp_path / "offload"),
    )
    inputs = batch(model.pretrained_model)
    assert torch.equal(loaded(**inputs).value, model(**inputs).value)
    assert torch.equal(loaded.values(**inputs), model.values(**inputs))


def test_the_head_follows_the_last_hidden_state():
    """The last norm decides, not the output embeddings: tied ones are beside the first layer."""
    body = build("llama")
    body.model.norm.to("meta")
    assert last_hidden_device(body) == torch.device("meta")
    body.model.norm.to_empty(device="cpu")
    body.lm_head.to("meta")
    assert last_hidden_device(body) == torch.device("cpu")


def test_an_offloaded_weight_counts_where_it_is_executed():
    body = build("llama")
    hook = AlignDevicesHook(execution_device=torch.device("cpu"), offload=True)
    add_hook_to_module(body.model.norm, hook)
    assert body.model.norm.weight.is_meta
    assert last_hidden_device(body) == torch.device("cpu")
    body.model.norm._hf_hook = SequentialHook(AlignDevicesHook(), hook)
    assert last_hidden_device(body) == torch.device("cpu")


@pytest.mark.parametrize(
    ("device_map", "expected"),
    [
        ({"": "cpu"}, False),
        ({"": 0}, False),
        ({"": torch.device("cpu")}, False),
        ({"a": 0, "b": "cpu", "c": "disk"}, False),
        ({"a": 0, "b": "cuda:0"}, False),
        ({"a": 0, "b": 1}, True),
        ({"a": "cuda:0", "b": "cuda:1", "c": "disk"}, True),
        ({"a": torch.device("cuda", 0), "b": torch.device("cuda", 1)}, True),
    ],
)
def test_old_trainers_are_told_of_several_accelerators(device_map, expected):
    body = build("gpt2")
    body.hf_device_map = device_map
    assert uses_several_accelerators(body) is expected
    assert AutoModelForCausalLMWithValueHead(body).is_sequential_parallel is expected


def test_only_values_are_moved(monkeypatch):
    """The hidden states stay where they are: as many bytes less as the hidden size says."""
    model = AutoModelForCausalLMWithValueHead(build("llama"))
    moved = []
    original = torch.Tensor.to

    def to(tensor, *arguments, **kwargs):
        if any(isinstance(a, torch.device) for a in (*arguments, *kwargs.values())):
            moved.append(tensor.shape)
        return original(tensor, *arguments, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)
    states = torch.randn(2, 7, 32)
    model._values_of(states, torch.device("meta"))
    assert moved[-1] == (2, 7)
    assert model._values_of(states, torch.device("meta")).is_meta


def test_no_map_no_attribute():
    assert not hasattr(AutoModelForCausalLMWithValueHead(build("gpt2")), "hf_device_map")


def test_a_head_from_the_state_dict_is_placed_and_the_state_dict_stays(saved, caplog):
    model, _ = saved
    other = AutoModelForCausalLMWithValueHead(build("llama").train())
    for state in (model.state_dict(), torch.nn.Module.state_dict(model)):
        names = list(state)
        torch.nn.init.zeros_(other.v_head.summary.weight)
        with caplog.at_level(logging.INFO):
            other.post_init(state)
        assert list(state) == names
        assert torch.equal(other.v_head.summary.weight, model.v_head.summary.weight)
        assert other.head_source == "post_init"
        assert other.v_head.training
    untouched = AutoModelForCausalLMWithValueHead(build("llama"))
    weight = untouched.v_head.summary.weight.clone()
    untouched.post_init({})
    assert torch.equal(untouched.v_head.summary.weight, weight)
    assert untouched.head_source is None
    with pytest.raises(RuntimeError, match=r"summary\.bias"):
        untouched.post_init({"v_head.summary.weight": weight})
    with pytest.raises(RuntimeError, match="size mismatch"):
        untouched.post_init({"v_head.summary.weight": torch.ones(1, 31), "v_head.summary.bias": torch.ones(1)})


@torch.no_grad()
def test_dispatching_later_keeps_the_values(saved, tmp_path):
    model, _ = saved
    inputs = batch(model.pretrained_model)
    other = copy.deepcopy(model)
    dispatch_model(other.pretrained_model, MIXED, main_device="cpu", offload_dir=str(tmp_path))
    assert torch.equal(other(**inputs).value, model(**inputs).value)
