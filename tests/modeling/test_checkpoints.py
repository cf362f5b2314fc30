"""Checkpoints: ours and TRL's read each other, only the head's two tensors are read for the head, noise stays away."""

import json
import logging
import os
from contextlib import nullcontext

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from transformers.quantizers.base import HfQuantizer

import vhead.checkpoints.checkpoint
import vhead.checkpoints.tensor_files
import vhead.modeling.loading
from tests.library_versions import CHECKPOINT_DTYPE, DTYPE, READS_PICKLES
from tests.modeling.tiny_models import batch, build
from vhead import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead
from vhead.errors import HeadError, HeadMismatchError

HEAD_KEYS = {"v_head.summary.weight", "v_head.summary.bias"}


def wrapped(architecture="llama", dtype=torch.float32):
    model = AutoModelForCausalLMWithValueHead(build(architecture, dtype))
    torch.nn.init.normal_(model.v_head.summary.bias)
    return model


def wrapper_for(body):
    is_encoder_decoder = body.config.is_encoder_decoder
    return AutoModelForSeq2SeqLMWithValueHead if is_encoder_decoder else AutoModelForCausalLMWithValueHead


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@pytest.fixture
def saved(tmp_path):
    model = wrapped()
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


@pytest.fixture
def trl():
    return pytest.importorskip("trl.experimental.ppo", exc_type=ImportError)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "8KB"}], ids=["single", "sharded"])
def test_save_and_load_bit_for_bit(tmp_path, architecture, dtype, options):
    model = wrapped(architecture, dtype)
    model.save_pretrained(tmp_path / "new" / "folder", **options)
    assert (tmp_path / "new" / "folder" / "model.safetensors.index.json").exists() == bool(options)
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "new" / "folder", **CHECKPOINT_DTYPE)
    assert same_state(model, loaded)
    assert loaded.v_head.summary.weight.dtype == torch.float32
    assert loaded.dtype == dtype
    assert "new/folder/model" in loaded.head_source
    inputs = batch(model.pretrained_model)
    assert torch.equal(loaded(**inputs).value, model(**inputs).value)


def test_seq2seq_round_trip(tmp_path):
    model = AutoModelForSeq2SeqLMWithValueHead(build("t5"))
    model.save_pretrained(save_directory=str(tmp_path), max_shard_size="8KB")
    assert same_state(model, AutoModelForSeq2SeqLMWithValueHead.from_pretrained(str(tmp_path)))


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "8KB"}], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reads_what_trl_wrote(tmp_path, trl, options, dtype):
    theirs = trl.AutoModelForCausalLMWithValueHead.from_pretrained(build("llama", dtype))
    theirs.save_pretrained(str(tmp_path), **options)
    assert same_state(theirs, AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path))


def test_trl_reads_what_we_wrote(trl, saved):
    model, folder = saved
    assert same_state(trl.AutoModelForCausalLMWithValueHead.from_pretrained(str(folder)), model)


def test_trl_cannot_reload_its_own_shards(tmp_path, trl):
    """The defect that the sharded cases above are about: should TRL's class ever work here, they prove nothing."""
    from huggingface_hub.errors import HFValidationError

    theirs = trl.AutoModelForCausalLMWithValueHead.from_pretrained(build("llama"))
    theirs.save_pretrained(str(tmp_path), max_shard_size="8KB")
    with pytest.raises(HFValidationError):
        trl.AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "8KB"}], ids=["single", "sharded"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
def test_plain_transformers_reads_the_body(tmp_path, architecture, options):
    body = build(architecture)
    wrapper = wrapper_for(body)
    wrapper(body).save_pretrained(tmp_path, **options)
    assert (tmp_path / "model.safetensors.index.json").exists() == bool(options)
    loaded, info = wrapper.transformers_parent_class.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["unexpected_keys"]) == HEAD_KEYS
    assert not info["missing_keys"]
    assert same_state(loaded, build(architecture))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
def test_the_state_dict_is_the_body_s_and_the_head_s(architecture):
    body = build(architecture)
    wrapper = (
        AutoModelForSeq2SeqLMWithValueHead if body.config.is_encoder_decoder else AutoModelForCausalLMWithValueHead
    )
    state, expected = wrapper(body).state_dict(), build(architecture).state_dict()
    assert set(state) == set(expected) | HEAD_KEYS
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_saves_a_state_dict_of_another_layout(tmp_path):
    model = wrapped()
    raw = {f"module.{name}": value for name, value in torch.nn.Module.state_dict(model).items()}
    assert any(name.startswith("module.pretrained_model.") for name in raw)
    model.save_pretrained(tmp_path, state_dict=raw)
    assert same_state(model, AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path))


reads_pickles = pytest.mark.skipif(not READS_PICKLES, reason="this transformers reads pickles with torch >= 2.6 only")


@reads_pickles
def test_loads_a_pickled_checkpoint(tmp_path, saved):
    model, _ = saved
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert same_state(model, AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path))


@reads_pickles
def test_loads_a_pickled_sharded_checkpoint(tmp_path, saved):
    model, _ = saved
    model.config.save_pretrained(tmp_path)
    state = model.state_dict()
    weight_map = {name: f"pytorch_model-{1 + (name in HEAD_KEYS)}.bin" for name in state}
    for file in set(weight_map.values()):
        torch.save({name: state[name] for name in state if weight_map[name] == file}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert same_state(model, AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path))


def test_loads_a_llama_factory_folder(tmp_path):
    from safetensors.torch import save_file

    model = wrapped()
    model.pretrained_model.save_pretrained(tmp_path)
    save_file({k: v for k, v in model.state_dict().items() if k in HEAD_KEYS}, tmp_path / "value_head.safetensors")
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert same_state(model, loaded)
    assert "llama-factory" in loaded.head_source


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "8KB"}], ids=["single", "sharded"])
def test_the_head_costs_two_tensors(tmp_path, monkeypatch, options):
    wrapped().save_pretrained(tmp_path, **options)
    read, opened = [], set()

    class Spy:
        def __init__(self, path, **kwargs):
            opened.add(os.path.realpath(path))
            self._inner = safe_open(path, **kwargs)

        def get_tensor(self, name):
            read.append(name)
            return self._inner.get_tensor(name)

        def __getattr__(self, name):
            return getattr(self._inner, name)

    monkeypatch.setattr(vhead.checkpoints.tensor_files, "safe_open", Spy)
    AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert sorted(read) == sorted(HEAD_KEYS)
    assert len(opened) == 1


class Hub:
    """Serves a folder as the hub's download function would, and writes down what was asked."""

    def __init__(self, folder):
        self.folder, self.asked = folder, []

    def __call__(self, repository, name, *, subfolder=None, **arguments):
        self.asked.append((repository, name, subfolder, arguments))
        path = self.folder / (subfolder or "") / name
        if not path.exists():
            raise EntryNotFoundError(name)
        return str(path)


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "8KB"}], ids=["single", "sharded"])
def test_finds_the_head_on_the_hub(tmp_path, monkeypatch, options):
    model = wrapped()
    model.save_pretrained(tmp_path / "weights", **options)
    hub = Hub(tmp_path)
    monkeypatch.setattr(vhead.checkpoints.checkpoint, "hf_hub_download", hub)
    where = {"revision": "abc", "cache_dir": "/cache", "token": "t", "local_files_only": True}
    head = vhead.formats.find_head("some/repository", subfolder="weights", **where)
    assert torch.equal(head.weight, model.v_head.summary.weight)
    assert all(ask[0] == "some/repository" and ask[2:] == ("weights", where) for ask in hub.asked)
    shards = {name for _, name, _, _ in hub.asked if name.startswith("model-")}
    assert len(shards) == bool(options)


def test_from_pretrained_hands_the_location_arguments_on(saved, monkeypatch):
    seen = []

    class Spy(vhead.checkpoints.checkpoint.Checkpoint):
        def __init__(self, location, **where):
            seen.append((location, where))
            super().__init__(location, **where)

    monkeypatch.setattr(vhead.modeling.loading, "Checkpoint", Spy)
    _, folder = saved
    where = {"revision": "main", "cache_dir": "/cache", "local_files_only": True, "token": "t"}
    AutoModelForCausalLMWithValueHead.from_pretrained(folder, **where, **{DTYPE: torch.float32})
    assert len(seen) > 2
    assert all(look == (str(folder), where) for look in seen)


def test_a_local_folder_never_asks_the_hub(saved, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("asked the hub")

    monkeypatch.setattr(vhead.checkpoints.checkpoint, "hf_hub_download", refuse)
    AutoModelForCausalLMWithValueHead.from_pretrained(saved[1])


def test_local_subfolder(saved):
    model, folder = saved
    head = vhead.formats.find_head(folder.parent, subfolder="model")
    assert torch.equal(head.bias, model.v_head.summary.bias)


def test_a_plain_language_model_gets_a_fresh_head_and_one_log_line(tmp_path, caplog):
    build("llama").save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO):
        model = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert [record.name for record in caplog.records] == ["vhead"]
    assert str(tmp_path) in caplog.text
    assert "fresh" in caplog.text
    assert model.head_source is None


def test_loading_a_head_does_not_report_it_as_unexpected(saved, transformers_log):
    AutoModelForCausalLMWithValueHead.from_pretrained(saved[1])
    assert "v_head" not in transformers_log.text
    AutoModelForCausalLM.from_pretrained(saved[1])
    assert "v_head" in transformers_log.text


def test_other_unexpected_tensors_are_still_reported(tmp_path, transformers_log):
    model = wrapped()
    model.save_pretrained(tmp_path, state_dict={**model.state_dict(), "stray.weight": torch.ones(2)})
    AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert "stray.weight" in transformers_log.text


def test_head_arguments_do_not_reach_transformers(saved):
    _, folder = saved
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        folder,
        summary_dropout_prob=0.25,
        v_head_init_strategy="normal",
        v_head_initializer_range=0.1,
        **{DTYPE: torch.bfloat16},
    )
    assert model.v_head.dropout.p == 0.25
    assert model.dtype == torch.bfloat16
    assert not hasattr(model.config, "summary_dropout_prob")


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}])
def test_a_model_with_a_device_map(saved, device_map):
    pytest.importorskip("accelerate")
    model, folder = saved
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(folder, device_map=device_map)
    inputs = batch(model.pretrained_model)
    assert torch.equal(loaded.values(**inputs), model.values(**inputs))


@pytest.mark.parametrize("architecture", ["llama", "t5"])
@pytest.mark.parametrize("way", ["argument", "configuration"])
def test_the_dropout_of_a_loaded_model_is_what_was_asked_for(tmp_path, architecture, way):
    body = build(architecture)
    if way == "configuration":
        body.config.summary_dropout_prob = 0.5
    body.save_pretrained(tmp_path)
    wrapper = wrapper_for(body)
    arguments = {"summary_dropout_prob": 0.5} if way == "argument" else {}
    assert wrapper.from_pretrained(tmp_path, **arguments).v_head.dropout.p == 0.5
    assert wrapper.from_pretrained(body, **arguments).v_head.dropout.p == 0.5


def test_arguments_are_not_changed(saved):
    arguments = {"summary_dropout_prob": 0.25, DTYPE: torch.float32}
    AutoModelForCausalLMWithValueHead.from_pretrained(saved[1], **arguments)
    assert arguments == {"summary_dropout_prob": 0.25, DTYPE: torch.float32}


def tampered(folder, change):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda s: s.pop("v_head.summary.bias"), "v_head.summary.weight [1, 32]"),
        (lambda s: s.pop("v_head.summary.weight"), "v_head.summary.bias [1]"),
        (lambda s: s.update({"v_head.weight": s.pop("v_head.summary.weight")}), "v_head.weight [1, 32]"),
        (lambda s: s.update({"v_head.extra.weight": torch.ones(3)}), "v_head.extra.weight [3]"),
        (lambda s: s.update({"v_head.summary.weight": torch.ones(2, 32)}), "v_head.summary.weight [2, 32]"),
        (lambda s: s.update({"v_head.summary.weight": torch.ones(32)}), "v_head.summary.weight [32]"),
        (lambda s: s.update({"v_head.summary.bias": torch.ones(1, 1)}), "v_head.summary.bias [1, 1]"),
        (lambda s: s.update({"v_head.summary.weight": torch.ones(1, 31)}), "v_head.summary.weight [1, 31]"),
        (lambda s: s.update({"v_head.summary.bias": torch.ones(1, dtype=torch.int64)}), "torch.int64"),
    ],
    ids=["no-bias", "no-weight", "misnamed", "extra", "rows", "flat", "bias-shape", "width", "integers"],
)
def test_a_head_that_does_not_fit_is_an_error(saved, change, found):
    _, folder = saved
    tampered(folder, change)
    with pytest.raises(HeadMismatchError) as error:
        AutoModelForCausalLMWithValueHead.from_pretrained(folder)
    assert found in str(error.value)
    assert "expected" in str(error.value)


@pytest.mark.parametrize("argument", [None, 3, torch.nn.Linear(2, 2), {"a": 1}])
def test_only_paths_and_language_models_are_taken(argument):
    with pytest.raises(HeadError, match="string, a path or a PreTrainedModel"):
        AutoModelForCausalLMWithValueHead.from_pretrained(argument)


def test_a_missing_folder_is_transformers_error(tmp_path):
    with pytest.raises((OSError, ValueError), match="nowhere") as theirs:
        AutoModelForCausalLM.from_pretrained(str(tmp_path / "nowhere"))
    # Some releases raise what huggingface_hub raises for a name that no repository can have.
    kind = OSError if isinstance(theirs.value, OSError) else ValueError
    with pytest.raises(kind, match="nowhere"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "nowhere")


class Quantizer(HfQuantizer):
    """What transformers asks for the weights of a quantised model, in place of those that it is given to save."""

    is_trainable = True

    def __init__(self):
        self.quantization_config = None

    def is_serializable(self, *_arguments, **_options):
        return True

    def get_state_dict_and_metadata(self, model, *_arguments):
        return model.state_dict(), {}

    def _process_model_before_weight_loading(self, model, **_arguments):
        return model

    def _process_model_after_weight_loading(self, model, **_arguments):
        return model


def quantised():
    model = wrapped()
    model.pretrained_model.hf_quantizer = Quantizer()
    return model


def test_a_quantised_model_keeps_its_head(tmp_path):
    model = quantised()
    names = [name for name, _ in model.pretrained_model.named_modules()]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert same_state(model, loaded)
    assert loaded.head_source is not None
    assert [name for name, _ in model.pretrained_model.named_modules()] == names


def test_a_quantised_model_is_its_own_again_also_where_saving_fails(tmp_path):
    model = quantised()
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(Exception, match=r"model\.safetensors|directory"):
        model.save_pretrained(tmp_path)
    assert "v_head" not in dict(model.pretrained_model.named_children())


@pytest.mark.skipif(
    not hasattr(HfQuantizer, "get_state_dict_and_metadata"), reason="transformers saves the weights that it is given"
)
def test_the_stand_in_for_a_quantiser_loses_heads(tmp_path, monkeypatch):
    monkeypatch.setattr("vhead.modeling.state._as_child", lambda *_arguments: nullcontext())
    quantised().save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert not HEAD_KEYS & set(file.keys())
