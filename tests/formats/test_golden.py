"""Every framework's checkpoint gives its head, and with a language model its values."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.formats.golden import EXPECTED, GOLDEN, layers, location
from vhead import Support, formats
from vhead.errors import HeadError, HeadMismatchError, HeadNotFoundError
from vhead.formats import FORMATS, detect, find_head, load


def same(one, other):
    return torch.equal(one, other) if one is not None and other is not None else one is other


@pytest.mark.parametrize("name", EXPECTED)
def test_golden_files_give_their_head(name):
    head = load(location(name))
    assert head.format == EXPECTED[name]["format"]
    assert f"({head.format})" in head.source
    assert name in head.source
    assert len(head.layers) == len(EXPECTED[name]["layers"])
    for layer, (weight, bias) in zip(head.layers, layers(name), strict=True):
        assert layer.weight.dtype == torch.float32
        assert same(layer.weight, weight)
        assert same(layer.bias, bias)
    assert (head.mean, head.std) == (EXPECTED[name].get("mean"), EXPECTED[name].get("std"))
    assert head.activation == EXPECTED[name].get("activation")
    support = EXPECTED[name].get("support")
    assert head.support == (None if support is None else Support(**support))


@pytest.mark.parametrize("name", EXPECTED)
def test_find_head_and_load_agree(name):
    found, loaded = find_head(location(name)), load(location(name), format=EXPECTED[name]["format"])
    assert found.format == loaded.format
    assert torch.equal(found.weight, loaded.weight)


@pytest.mark.parametrize("name", EXPECTED)
def test_properties_are_those_of_the_projections(name):
    head = load(location(name))
    first, last = head.layers[0], head.layers[-1]
    assert head.hidden_size == first.weight.shape[1]
    assert len(head.weight) == len(head.bias) == last.weight.shape[0]
    assert head.num_outputs == (1 if "support" in EXPECTED[name] else len(head.weight))
    assert head.intermediate_size == (first.weight.shape[0] if len(head.layers) == 2 else None)
    assert head.bias.tolist() == (EXPECTED[name]["layers"][-1]["bias"] or [0.0] * len(head.weight))


@pytest.mark.parametrize("name", EXPECTED)
def test_detect_says_what_and_why(name):
    detection = detect(location(name))
    assert detection.format == EXPECTED[name]["format"]
    assert detection.body_prefix == EXPECTED[name]["body_prefix"]
    assert detection.reason.endswith(f"which makes it {detection.format}")
    assert "\n" not in detection.reason
    assert "{" not in detection.reason
    tensors = sum(1 + (layer["bias"] is not None) for layer in EXPECTED[name]["layers"])
    assert len(detection.tensors) == tensors


def test_every_format_has_a_golden_file():
    assert {head_format.name for head_format in FORMATS} == {what["format"] for what in EXPECTED.values()}


def test_the_golden_shards_are_what_their_name_says():
    index = json.loads((GOLDEN / "trl_sharded" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1


def test_a_plain_model_has_no_head():
    assert find_head(GOLDEN / "plain") is None
    for look in (load, detect):
        with pytest.raises(HeadNotFoundError, match="plain: expected a trained value head, found none"):
            look(GOLDEN / "plain")


def test_a_value_branch_of_blocks_is_refused():
    for look in (find_head, load, detect):
        with pytest.raises(HeadMismatchError, match="num_value_layers_unfrozen"):
            look(GOLDEN / "refused_trlx_branch")


def test_a_format_can_be_asked_for():
    with pytest.raises(HeadNotFoundError, match="a value head in the format nemo"):
        load(GOLDEN / "plain", format="nemo")
    with pytest.raises(HeadMismatchError, match="rm_head"):
        load(GOLDEN / "trl_single", format="nemo")
    with pytest.raises(HeadError, match=r"format: expected one of trl, .*, got 'trm'"):
        load(GOLDEN / "trl_single", format="trm")


def test_names_are_unique():
    names = [head_format.name for head_format in formats.FORMATS]
    assert len(names) == len(set(names))


# What tells the labels of a process reward model from several rewards


def with_config(tmp_path, name, **settings):
    shutil.copytree(location(name), tmp_path / name)
    config = json.loads((tmp_path / name / "config.json").read_text())
    (tmp_path / name / "config.json").write_text(json.dumps({**config, **settings}))
    return load(tmp_path / name)


def test_a_classifier_of_sequences_is_not_read_by_a_softmax(tmp_path):
    settings = {"architectures": ["LlamaForSequenceClassification"], "num_labels": 2}
    head = with_config(tmp_path, "trl_process", **settings, problem_type="single_label_classification")
    assert load(location("trl_process")).activation == "softmax"
    assert (head.num_outputs, head.activation) == (2, None)


def test_a_reward_model_of_two_rewards_is_not_read_by_a_softmax(tmp_path):
    head = with_config(tmp_path, "qwen_process", architectures=["Qwen2ForRewardModel"])
    assert load(location("qwen_process")).activation == "softmax"
    assert (head.num_outputs, head.activation) == (2, None)


def test_a_token_classifier_that_is_a_regression_is_not_read_by_a_softmax(tmp_path):
    head = with_config(tmp_path, "trl_process", problem_type="regression")
    assert (head.format, head.num_outputs, head.activation) == ("hf-token-classification", 2, None)


def test_a_critic_of_one_output_is_not_read_by_a_softmax(tmp_path):
    assert load(location("hf_token")).activation is None
    assert with_config(tmp_path, "qwen", architectures=["Qwen2ForProcessRewardModel"]).activation is None


def test_a_bare_score_without_a_configuration_is_not_read_by_a_softmax(tmp_path):
    head = load(location("trl_process") / "model.safetensors")
    assert (head.format, head.num_outputs, head.activation) == ("hf-token-classification", 2, None)


def test_older_openrlhf_is_told_from_xtuner_by_the_class():
    assert detect(location("openrlhf_older")).format == "openrlhf"
    assert detect(location("xtuner")).format == "xtuner"
    assert detect(location("openrlhf_older")).tensors == detect(location("xtuner")).tensors == ("value_head.weight",)


def test_a_layer_called_regression_without_a_gate_is_of_no_known_format(tmp_path):
    state = load_file(location("armorm") / "model.safetensors")
    names = ("regression_layer.weight", "model.norm.weight")
    save_file({name: state[name] for name in names}, tmp_path / "model.safetensors")
    with pytest.raises(HeadMismatchError, match="regression_layer"):
        load(tmp_path)
