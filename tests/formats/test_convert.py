"""A checkpoint that was converted gives the same values in its new format, or nothing was written."""

import json
import os
import shutil
import warnings
import weakref

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

from tests.formats.golden import EXPECTED, GOLDEN, TOKENS, WITH_BODY, layers, location
from tests.typer_runner import RUNNER
from vhead import AutoModelForCausalLMWithValueHead
from vhead.checkpoints import replacing
from vhead.checkpoints.tensor_files import TensorInfo
from vhead.cli.app import app
from vhead.errors import AdapterError, BodyMismatchError, HeadError, HeadFileError, HeadMismatchError
from vhead.formats import FORMATS, convert, detect, load
from vhead.formats.streaming import Entry, write_safetensors

TARGETS = [head_format.name for head_format in FORMATS if head_format.body is not None]
HEADS_ONLY = [head_format.name for head_format in FORMATS if head_format.body is None]


def holds(target, name):
    """Whether a golden head fits a format, by the formats' published limits."""
    head_format = next(f for f in FORMATS if f.name == target)
    golden = EXPECTED[name]["layers"]
    names = next((layouts for layouts in head_format.layouts if len(layouts) == len(golden)), None)
    has_bias = any(layer["bias"] is not None for layer in golden)
    outputs = len(golden[-1]["weight"])
    return (
        names is not None
        and (head_format.intermediate is None or len(golden[0]["weight"]) == head_format.intermediate * 8)
        and head_format.outputs in (None, outputs)
        and (target == "vhead" or "support" not in EXPECTED[name])
        and not (has_bias and names[0].bias is None)
        and not (target == "hf-token-classification" and name.startswith("deepspeed_chat"))
    )


def two_of(pairs):
    """The first two sources for each target: all of them would take a minute."""
    pairs = list(pairs)
    return [pair for target in TARGETS for pair in [other for other in pairs if other[1] == target][:2]]


PAIRS = two_of((name, target) for name in WITH_BODY for target in TARGETS if holds(target, name))
MISFITS = two_of((name, target) for name in WITH_BODY for target in TARGETS if not holds(target, name))


def framework_values(name):
    values = torch.tensor(EXPECTED[name]["values"])
    return values.squeeze(-1) if values.shape[-1] == 1 else values


def values_of(path):
    model = AutoModelForCausalLMWithValueHead.from_pretrained(path, torch_dtype=torch.float32)
    with torch.no_grad():
        return model.values(TOKENS)


@pytest.mark.parametrize(("name", "target"), PAIRS)
def test_values_survive(tmp_path, name, target):
    done = convert(location(name), tmp_path / "converted", target)
    assert [path.name for path in tmp_path.iterdir()] == ["converted"]
    assert sorted(path.name for path in done.path.iterdir()) == list(done.files)
    # A head of one projection and one output is the same in both.
    assert detect(done.path).format in ({"trl", "vhead"} if target == "vhead" else {target})
    assert detect(done.path).body_prefix == ""
    head = load(done.path)
    for layer, (weight, bias) in zip(head.layers, layers(name), strict=True):
        assert torch.equal(layer.weight, weight)
        assert torch.equal(layer.bias_or_zeros, torch.zeros(len(weight)) if bias is None else bias)
    torch.testing.assert_close(values_of(done.path), framework_values(name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "target"), MISFITS)
def test_what_a_format_cannot_hold_is_not_written(tmp_path, name, target):
    with pytest.raises(HeadError):
        convert(location(name), tmp_path / "converted", target)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "target", "architecture"),
    [
        ("qwen_process", "vhead", "Qwen2ForCausalLM"),
        ("qwen_process", "qwen", "Qwen2ForProcessRewardModel"),
        ("trl_process", "vhead", "LlamaForCausalLM"),
        ("trl_process", "hf-token-classification", "LlamaForTokenClassification"),
    ],
)
def test_the_labels_of_a_process_reward_model_stay_labels(tmp_path, name, target, architecture):
    done = convert(location(name), tmp_path / "converted", target)
    assert json.loads((done.path / "config.json").read_text())["architectures"] == [architecture]
    assert (load(done.path).activation, load(done.path).num_outputs) == ("softmax", 2)
    assert not [note for note in done.notes if "softmax" in note]


def test_a_format_without_a_place_for_the_softmax_says_so(tmp_path):
    head = torch.randn(2, 8)
    shutil.copytree(location("trl_process"), tmp_path / "source")
    state = load_file(tmp_path / "source" / "model.safetensors")
    del state["score.bias"]
    save_file({**state, "score.weight": head}, tmp_path / "source" / "model.safetensors")
    done = convert(tmp_path / "source", tmp_path / "converted", "hf-sequence-classification")
    assert load(done.path).activation is None
    assert (
        "left out, since hf-sequence-classification has no place for it: the softmax of the head's outputs"
        in done.notes
    )


def test_several_rewards_do_not_become_labels(tmp_path):
    done = convert(location("vhead_outputs"), tmp_path / "converted", "hf-token-classification")
    assert (load(done.path).activation, load(done.path).num_outputs) == (None, 3)
    back = convert(done.path, tmp_path / "back", "vhead")
    assert (load(back.path).activation, load(back.path).num_outputs) == (None, 3)


@pytest.mark.parametrize("name", WITH_BODY)
def test_the_default_holds_every_head(tmp_path, name):
    done = convert(location(name), tmp_path / "converted")
    simple = len(EXPECTED[name]["layers"]) == 1 and len(EXPECTED[name]["layers"][0]["weight"]) == 1
    assert load(done.path).activation == EXPECTED[name].get("activation")
    assert done.format == detect(done.path).format == ("trl" if simple else "vhead")
    torch.testing.assert_close(values_of(done.path), framework_values(name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", EXPECTED)
def test_every_head_can_be_taken_out(tmp_path, name):
    done = convert(location(name), tmp_path / "head.safetensors", "vhead")
    assert done.files == ("head.safetensors",)
    head = load(tmp_path / "head.safetensors")
    for layer, (weight, bias) in zip(head.layers, layers(name), strict=True):
        assert torch.equal(layer.weight, weight)
        assert torch.equal(layer.bias_or_zeros, torch.zeros(len(weight)) if bias is None else bias)


@pytest.mark.parametrize(
    ("target", "auto_class"),
    [
        ("hf-token-classification", AutoModelForTokenClassification),
        ("hf-sequence-classification", AutoModelForSequenceClassification),
        ("trl", AutoModelForCausalLM),
    ],
)
def test_transformers_loads_the_result_whole(tmp_path, target, auto_class):
    convert(location("openrlhf"), tmp_path / "converted", target)
    model, report = auto_class.from_pretrained(
        tmp_path / "converted", torch_dtype=torch.float32, output_loading_info=True
    )
    assert list(report["missing_keys"]) == (["lm_head.weight"] if target == "trl" else [])
    assert set(report["unexpected_keys"]) == (
        {"v_head.summary.weight", "v_head.summary.bias"} if target == "trl" else set()
    )
    config = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__]
    assert "value_head_prefix" not in config
    if target == "hf-token-classification":
        values = model.eval()(TOKENS).logits.detach()
        torch.testing.assert_close(values, torch.tensor(EXPECTED["openrlhf"]["values"]), rtol=1e-4, atol=1e-5)


def test_statistics_of_rewards_survive(tmp_path):
    convert(location("openrlhf"), tmp_path / "beaver", "beaver")
    assert (load(tmp_path / "beaver").mean, load(tmp_path / "beaver").std) == (0.25, 1.5)
    convert(tmp_path / "beaver", tmp_path / "trl", "trl")
    assert (load(tmp_path / "trl").mean, load(tmp_path / "trl").std) == (0.25, 1.5)
    convert(location("beaver_cost"), tmp_path / "openrlhf", "openrlhf")
    assert (load(tmp_path / "openrlhf").mean, load(tmp_path / "openrlhf").std) == (0.0, 2.0)


def test_what_is_left_out_and_missing_is_said(tmp_path):
    to_classifier = convert(location("trlx_hydra"), tmp_path / "vhead", "vhead")
    assert [note for note in to_classifier.notes if "frozen_head.decoder_blocks.0" in note and "left out" in note]
    without_lm_head = convert(location("openrlhf"), tmp_path / "trl", "trl")
    assert [note for note in without_lm_head.notes if "log-probabilities cannot" in note]
    assert convert(location("trl_single"), tmp_path / "again", "vhead").notes == ()


def test_the_language_model_s_tensors_are_the_same_bytes(tmp_path):
    convert(location("hf_sequence"), tmp_path / "converted", "vhead")
    before, after = (
        load_file(folder / "model.safetensors") for folder in (location("hf_sequence"), tmp_path / "converted")
    )
    body = {name for name in before if name.startswith("model.")}
    assert body
    assert all(before[name].dtype == after[name].dtype == torch.bfloat16 for name in body)
    assert all(torch.equal(before[name], after[name]) for name in body)
    assert set(after) == {*body, "v_head.summary.weight", "v_head.summary.bias"}


@pytest.mark.parametrize("target", ["trl", "llama-factory"])
def test_shards_stay_shards(tmp_path, target):
    done = convert(location("trl_sharded"), tmp_path / "converted", target)
    index = json.loads((tmp_path / "converted" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == sorted(path.name for path in done.path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert all(f"-of-{len(shards):05}." in shard for shard in shards)
    sizes = 0
    for shard in shards:
        with safe_open(done.path / shard, framework="pt") as file:
            assert set(file.keys()) == {name for name, place in index["weight_map"].items() if place == shard}
            sizes += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118, no iterator
    assert index["metadata"]["total_size"] == sizes
    assert ("value_head.safetensors" in done.files) == (target == "llama-factory")


def test_tokenizers_are_carried_and_optimizers_are_not(tmp_path):
    shutil.copytree(GOLDEN / "openrlhf", tmp_path / "source")
    carried = {"tokenizer.json", "tokenizer.model", "vocab.txt", "chat_template.jinja", "generation_config.json"}
    left = {"optimizer.pt", "trainer_state.json", "training_args.bin", "README.md", "rng_state.pth"}
    for name in carried | left:
        (tmp_path / "source" / name).write_text("{}")
    (tmp_path / "source" / "global_step7").mkdir()
    done = convert(tmp_path / "source", tmp_path / "converted")
    assert set(done.files) == {*carried, "config.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("target", "file"), [("trl", "pytorch_model.bin"), ("llama-factory", "value_head.safetensors")]
)
def test_an_adapter_s_folder_stays_one(tmp_path, target, file):
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "trl_adapter", source)
    (source / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"base_model.model.x.lora_A.weight": torch.randn(2, 2)}, source / "adapter_model.safetensors")
    done = convert(source, tmp_path / "converted", target)
    assert set(done.files) == {"adapter_config.json", "adapter_model.safetensors", file}
    assert load(done.path).format == target
    assert load(done.path).bias.tolist() == EXPECTED["trl_adapter"]["layers"][0]["bias"]
    with pytest.raises(HeadError, match="beside an adapter"):
        convert(source, tmp_path / "other", "openrlhf")


# What is written loads


def copied(tmp_path, name):
    shutil.copytree(location(name), tmp_path / "model")
    return tmp_path / "model"


def rewritten(folder, change):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def refused(source, message):
    """The error of a conversion that leaves nothing behind."""
    before = set(source.parent.iterdir())
    with pytest.raises(BodyMismatchError, match=message) as error:
        convert(source, source.parent / "converted")
    assert set(source.parent.iterdir()) == before
    return str(error.value)


def test_names_with_a_prefix_that_nothing_loads_are_refused(tmp_path):
    source = copied(tmp_path, "openrlhf")
    rewritten(source, lambda state: {n if n == "score.weight" else f"encoder.{n}": v for n, v in state.items()})
    message = refused(source, "what would be written does not load as a LlamaForCausalLM")
    assert "model.embed_tokens.weight" in message
    assert "model.encoder." in message


def test_a_checkpoint_without_a_layer_is_refused(tmp_path):
    source = copied(tmp_path, "openrlhf")
    rewritten(source, lambda state: {n: v for n, v in state.items() if "input_layernorm" not in n})
    assert "model.layers.0.input_layernorm.weight missing" in refused(source, "does not load as a LlamaForCausalLM")


def test_a_tensor_of_another_shape_than_the_configuration_says_is_refused(tmp_path):
    source = copied(tmp_path, "openrlhf")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    assert "expected [48, 8]" in refused(source, "model.layers.0.mlp")


def test_what_cannot_be_tried_is_said(tmp_path):
    assert any("transformers has none" in note for note in convert(location("internlm2"), tmp_path / "other").notes)
    source = copied(tmp_path, "openrlhf")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    assert any("quantised" in note for note in convert(source, tmp_path / "converted", "openrlhf").notes)


def test_a_head_that_would_not_be_found_again_is_not_written(tmp_path, monkeypatch):
    other = load(location("beaver"))
    monkeypatch.setattr("vhead.formats.conversion.load", lambda _folder: other)
    with pytest.raises(
        HeadMismatchError, match="converted: the head that was read back differs from the one in the source"
    ):
        convert(location("openrlhf"), tmp_path / "converted")
    assert not list(tmp_path.iterdir())


# Files that go along


@pytest.mark.parametrize("name", ["tokenizer.json", "additional_chat_templates/tool.jinja", "model.safetensors"])
def test_a_link_out_of_the_checkpoint_is_not_followed(tmp_path, name):
    source = copied(tmp_path, "openrlhf")
    (tmp_path / "key.json").write_text("secret")
    (source / "additional_chat_templates").mkdir()
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(tmp_path / "key.json")
    with pytest.raises(HeadFileError, match=r"expected a file of the checkpoint, found a link to .*key\.json"):
        convert(source, tmp_path / "converted")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key.json", "model"]


def test_a_link_to_a_folder_elsewhere_is_not_followed(tmp_path):
    source = copied(tmp_path, "openrlhf")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "key.json").write_text("secret")
    (source / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HeadFileError, match=r"found a link to .*key\.json"):
        convert(source, tmp_path / "converted")


def test_a_pipe_or_a_device_is_named_not_opened(tmp_path):
    source = copied(tmp_path, "openrlhf")
    os.mkfifo(source / "vocab.txt")
    with pytest.raises(HeadFileError, match=r"vocab\.txt: expected a file of the checkpoint, found a pipe or a device"):
        convert(source, tmp_path / "converted")
    (source / "vocab.txt").unlink()
    (source / "vocab.txt").symlink_to("/dev/zero")
    with pytest.raises(HeadFileError, match="expected a file of the checkpoint, found a link to /dev/zero"):
        convert(source, tmp_path / "converted")


def test_links_inside_the_hub_s_cache_become_files(tmp_path):
    repository = tmp_path / "models--some--critic"
    snapshot = repository / "snapshots" / "0123abc"
    shutil.copytree(location("openrlhf"), repository / "blobs")
    (repository / "blobs" / "vocab.txt").write_text("a b c")
    snapshot.mkdir(parents=True)
    for path in (repository / "blobs").iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    done = convert(snapshot, tmp_path / "converted")
    assert set(done.files) == {"config.json", "model.safetensors", "vocab.txt"}
    assert not any(path.is_symlink() for path in done.path.iterdir())
    assert (done.path / "vocab.txt").read_text() == "a b c"


# Classifiers' adapters


@pytest.fixture
def judge(tmp_path):
    """A LoRA reward model as peft saves it, on a language model without a head, and its rewards."""
    peft = pytest.importorskip("peft")
    base, folder = tmp_path / "base", tmp_path / "judge"
    convert(location("openrlhf"), base, "trl")
    rewritten(base, lambda state: {name: value for name, value in state.items() if not name.startswith("v_head")})
    with warnings.catch_warnings(action="ignore"):
        body = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0)
        config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"], init_lora_weights=False)
        model = peft.get_peft_model(body, config).eval()
        torch.nn.init.normal_(model.base_model.model.score.modules_to_save["default"].weight)
        model.save_pretrained(folder)
        return folder, model(TOKENS).logits.detach()[:, 0]


def test_a_classifier_s_adapter_scores_as_it_is(judge):
    folder, rewards = judge
    with warnings.catch_warnings(action="ignore"):
        torch.testing.assert_close(values_of(folder)[:, -1], rewards, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["trl", "llama-factory", "vhead"])
def test_a_classifier_s_adapter_converts_into_a_language_model_s(judge, tmp_path, target):
    folder, rewards = judge
    done = convert(folder, tmp_path / "converted", target)
    assert json.loads((done.path / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    assert not [name for name in load_file(done.path / "adapter_model.safetensors") if "lora" not in name]
    with warnings.catch_warnings(action="ignore"):
        torch.testing.assert_close(values_of(done.path)[:, -1], rewards, rtol=1e-4, atol=1e-5)


def test_an_adapter_for_another_task_is_refused(judge, tmp_path):
    folder, _ = judge
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "task_type": "QUESTION_ANS"}))
    with pytest.raises(AdapterError, match=r"task_type: expected one of CAUSAL_LM, .*, got 'QUESTION_ANS'"):
        convert(folder, tmp_path / "converted")
    (folder / "adapter_model.safetensors").rename(folder / "value_head.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(HeadError):
        convert(folder, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


# Replacing a folder


def test_an_adapter_that_was_in_the_folder_does_not_win_over_the_new_model(judge, tmp_path):
    folder, _ = judge
    convert(location("openrlhf"), folder, overwrite=True)
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors"}
    assert not [path.name for path in folder.iterdir() if path.name.startswith("adapter")]
    torch.testing.assert_close(values_of(folder), framework_values("openrlhf"), rtol=1e-4, atol=1e-5)


def test_what_stays_in_a_replaced_folder_is_the_same_file(tmp_path):
    destination = tmp_path / "converted"
    convert(location("trl_sharded"), destination)
    (destination / "runs" / "one").mkdir(parents=True)
    (destination / "runs" / "one" / "log.txt").write_text("mine")
    (destination / "latest").symlink_to("runs/one")
    destination.chmod(0o750)
    inode = (destination / "runs" / "one" / "log.txt").stat().st_ino
    convert(location("openrlhf"), destination, overwrite=True)
    assert (destination / "runs" / "one" / "log.txt").stat().st_ino == inode
    assert (destination / "latest" / "log.txt").read_text() == "mine"
    assert destination.stat().st_mode & 0o777 == 0o750


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    convert(location("trl_sharded"), tmp_path / "v1")
    (tmp_path / "latest").symlink_to("v1")
    convert(location("openrlhf"), tmp_path / "latest", overwrite=True)
    assert (tmp_path / "latest").is_symlink()
    assert load(tmp_path / "v1").format == "trl"
    torch.testing.assert_close(values_of(tmp_path / "v1"), framework_values("openrlhf"), rtol=1e-4, atol=1e-5)


def test_a_file_system_that_cannot_swap_folders_says_so_before_anything_is_written(tmp_path, monkeypatch):
    convert(location("trl_sharded"), tmp_path / "converted")
    before = {path.name: path.read_bytes() for path in (tmp_path / "converted").iterdir()}
    monkeypatch.setattr(replacing, "_RENAME_EXCHANGE", 1 << 20)
    monkeypatch.setattr("vhead.formats.conversion.write_safetensors", None)
    with pytest.raises(OSError, match=r"cannot replace a folder in one step.*remove the folder first"):
        convert(location("openrlhf"), tmp_path / "converted", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "converted").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["converted"]


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    def load_late(folder):
        (tmp_path / "converted").mkdir()
        (tmp_path / "converted" / "thesis.txt").write_text("mine")
        return load(folder)

    monkeypatch.setattr("vhead.formats.conversion.load", load_late)
    with pytest.raises(FileExistsError, match="converted: another folder was put there in the meantime"):
        convert(location("openrlhf"), tmp_path / "converted")
    assert [path.name for path in tmp_path.iterdir()] == ["converted"]
    assert (tmp_path / "converted" / "thesis.txt").read_text() == "mine"


def test_the_current_folder_is_not_pulled_away(tmp_path, monkeypatch):
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    for destination in (".", ".."):
        with pytest.raises(HeadError, match="this is the current folder or one around it"):
            convert(location("openrlhf"), destination, overwrite=True)
    with pytest.raises(HeadError, match="a file system is mounted here"):
        convert(location("openrlhf"), "/proc", overwrite=True)


def test_a_folder_is_replaced_only_when_asked(tmp_path):
    destination = tmp_path / "converted"
    convert(location("trl_sharded"), destination)
    (destination / "notes.md").write_text("mine")
    before = {path.name: path.read_bytes() for path in destination.iterdir()}
    with pytest.raises(FileExistsError, match="--force"):
        convert(location("openrlhf"), destination)
    assert {path.name: path.read_bytes() for path in destination.iterdir()} == before
    convert(location("openrlhf"), destination, overwrite=True)
    assert {path.name for path in destination.iterdir()} == {"notes.md", "config.json", "model.safetensors"}
    torch.testing.assert_close(values_of(destination), framework_values("openrlhf"), rtol=1e-4, atol=1e-5)


def test_a_checkpoint_is_never_converted_onto_itself(tmp_path):
    shutil.copytree(GOLDEN / "openrlhf", tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    for destination in ("model", "link", "model/../model"):
        with pytest.raises(HeadError, match="another folder"):
            convert(tmp_path / "model", tmp_path / destination, overwrite=True)
    assert load(tmp_path / "model").format == "openrlhf"


def test_an_empty_folder_is_as_good_as_none(tmp_path):
    (tmp_path / "converted").mkdir()
    assert convert(location("openrlhf"), tmp_path / "converted").files == ("config.json", "model.safetensors")


def test_a_failure_on_the_way_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("vhead.formats.conversion.write_safetensors", fail)
    with pytest.raises(OSError, match="disk full"):
        convert(location("openrlhf"), tmp_path / "converted")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", HEADS_ONLY)
def test_formats_that_hold_heads_only_say_so(tmp_path, target):
    name = "trlx" if target == "trlx" else "openrlhf"
    with pytest.raises(HeadError, match=f"{target} holds a head alone, without its language model; name a file"):
        convert(location(name), tmp_path / "converted", target)


def test_other_sources_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="download"):
        convert(tmp_path / "nowhere", tmp_path / "converted")
    with pytest.raises(HeadError, match="is one file"):
        convert(GOLDEN / "openrlhf" / "model.safetensors", tmp_path / "converted", "trl")
    with pytest.raises(HeadError, match="no language model"):
        convert(location("llama_factory_bin"), tmp_path / "converted", source_format="llama-factory")
    shutil.copytree(GOLDEN / "openrlhf", tmp_path / "model")
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(HeadFileError, match=r"expected a config\.json"):
        convert(tmp_path / "model", tmp_path / "converted")


def test_unmerged_adapters_are_refused(tmp_path):
    shutil.copytree(GOLDEN / "openrlhf", tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    state["model.layers.0.self_attn.q_proj.lora_A.default.weight"] = torch.ones(2, 8)
    save_file(state, tmp_path / "model" / "model.safetensors")
    with pytest.raises(HeadMismatchError, match="merge the adapter into its model"):
        convert(tmp_path / "model", tmp_path / "converted")


def test_a_model_that_transformers_does_not_have_keeps_its_names(tmp_path):
    convert(location("internlm2"), tmp_path / "converted")
    assert set(load_file(tmp_path / "converted" / "model.safetensors")) == {
        "model.tok_embeddings.weight",
        "v_head.summary.bias",
        "v_head.summary.weight",
    }
    config = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert config == {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2"}


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    """Each tensor has been let go of before the next one is read, so that a file costs one tensor, not all of them."""
    alive, most = weakref.WeakSet(), 0

    def entry(index):
        def read():
            nonlocal most
            tensor = torch.full((1000,), float(index))
            alive.add(tensor.untyped_storage())
            most = max(most, len(alive))
            return tensor

        return Entry(f"t{index}", TensorInfo((1000,), "torch.float32"), read)

    write_safetensors([entry(index) for index in range(32)], tmp_path / "x.safetensors")
    assert most == 1
    written = load_file(tmp_path / "x.safetensors")
    assert all((written[f"t{index}"] == index).all() for index in range(32))


def test_files_are_the_library_s_own_bytes(tmp_path):
    generator = torch.Generator().manual_seed(0)
    state = {
        "b.weight": torch.randn(3, 5, generator=generator).bfloat16(),
        "a.weight": torch.randn(2, 2, generator=generator),
        "ä.bias": torch.randn(1, generator=generator).double(),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False, True]),
        "small": torch.randn(3, generator=generator).to(torch.float8_e4m3fn),
    }
    write_safetensors([Entry.of(name, tensor) for name, tensor in state.items()], tmp_path / "ours.safetensors")
    written = load_file(tmp_path / "ours.safetensors")
    assert written.keys() == state.keys()
    for name, tensor in state.items():
        assert written[name].dtype == tensor.dtype
        assert written[name].shape == tensor.shape
        assert written[name].flatten().view(torch.uint8).tolist() == tensor.flatten().view(torch.uint8).tolist()
    # Wider dtypes come first, whatever the names.
    simple = {"a": state["b.weight"], "b": state["a.weight"]}
    write_safetensors([Entry.of(name, tensor) for name, tensor in simple.items()], tmp_path / "ours.safetensors")
    save_file(simple, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def run(*words):
    return RUNNER.invoke(app, ["convert", *map(str, words)])


def test_the_command_converts_and_says_what(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(location("openrlhf"), "critic", "--format", "trl")
    assert done.exit_code == 0, done.stderr
    assert done.stdout == ""
    assert "openrlhf: openrlhf: the configuration names score as value_head_prefix" in done.stderr
    assert "critic: written as trl: config.json, model.safetensors" in done.stderr
    assert load("critic").format == "trl"
    again = run(location("openrlhf"), "critic", "--format", "trl")
    assert again.exit_code == 1
    assert again.stderr.startswith("vhead: critic: the folder is not empty; --force")
    assert len(again.stderr.splitlines()) == 1
    assert run(location("beaver"), "critic", "--force").exit_code == 0
    assert load("critic").std == 2.0


def test_the_command_only_looks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(location("deepspeed_chat"), "--detect")
    assert done.exit_code == 0
    first, *rest = done.stdout.splitlines()
    assert first.endswith("deepspeed-chat: v_head is itself a projection, which makes it deepspeed-chat")
    assert dict(line.rsplit(maxsplit=1) for line in rest) == {
        "tensors": "v_head.weight",
        "hidden size": "4",
        "projections": "1",
        "outputs": "1",
        "body prefix": "rwtransformer.",
    }
    assert "rewards      mean 0.25, standard deviation 1.5" in run(location("openrlhf"), "--detect").stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["x"], 2, "--detect alone"),
        (["x", "y", "--detect"], 2, "leave DST out"),
        (["x", "y", "--format", "lrt"], 2, "expected one of trl"),
        (["x", "--detect"], 1, "x: no such file or folder"),
        ([GOLDEN / "plain", "--detect"], 1, "found none"),
        ([GOLDEN / "trl_single", "y", "--from", "nemo"], 1, "rm_head.weight"),
    ],
)
def test_the_command_explains_what_is_wrong(tmp_path, monkeypatch, words, code, message):
    monkeypatch.chdir(tmp_path)
    done = run(*words)
    assert done.exit_code == code
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert not list(tmp_path.iterdir())


def test_the_help_lists_every_format():
    from vhead.cli.convert import convert as command

    listed = " ".join((command.__doc__ or "").split()).partition("Formats: ")[2].partition(".")[0]
    assert listed.split(", ") == [head_format.name for head_format in FORMATS]


def test_a_classification_model_has_no_language_model_head(tmp_path):
    convert(location("openrlhf"), tmp_path / "source", "trl")
    file = tmp_path / "source" / "model.safetensors"
    save_file({**load_file(file), "lm_head.weight": torch.randn(11, 8)}, file, metadata={"format": "pt"})
    done = convert(tmp_path / "source", tmp_path / "converted", "hf-token-classification")
    assert "lm_head.weight" not in load_file(tmp_path / "converted" / "model.safetensors")
    assert [note for note in done.notes if note.endswith("no place for it: lm_head.weight")]
    whole = convert(tmp_path / "source", tmp_path / "whole", "llama-factory")
    assert "lm_head.weight" in load_file(tmp_path / "whole" / "model.safetensors")
    assert whole.notes == ()


@pytest.mark.parametrize("name", ["deepspeed_chat", "deepspeed_chat_older"])
def test_a_base_model_s_names_get_the_language_model_s_prefix(tmp_path, name):
    convert(location(name), tmp_path / "converted", "llama-factory")
    names = set(load_file(tmp_path / "converted" / "model.safetensors"))
    assert names
    assert all(key.startswith("model.decoder.") for key in names)
