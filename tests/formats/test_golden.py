"""Every framework's checkpoint gives its head, and with a language model its values."""

import json

import pytest
import torch

from tests.formats.golden import EXPECTED, GOLDEN, layers, location
from vhead import formats
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
    assert head.num_outputs == len(head.weight) == len(head.bias) == last.weight.shape[0]
    assert head.intermediate_size == (first.weight.shape[0] if len(head.layers) == 2 else None)
    assert head.bias.tolist() == (EXPECTED[name]["layers"][-1]["bias"] or [0.0] * head.num_outputs)


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
