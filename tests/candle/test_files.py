"""Heads in safetensors files: what torch writes candle reads and the other way round; hostile files are refused."""

import json
import os
import pickle
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vhead import Support, ValueHead
from vhead.candle import CandleValueHead
from vhead.errors import HeadFileError, HeadMismatchError
from vhead.formats import save

from .conftest import bits, make_head, random_floats

PREFIXES = ["v_head.summary.", "summary.", ""]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def linear(columns: int = 37, outputs: int = 1, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(7)
    return nn.Linear(columns, outputs, dtype=dtype)


def state(layer: nn.Linear, prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("outputs", [1, 3])
def test_candle_reads_what_torch_wrote(tmp_path, prefix, dtype, outputs):
    layer = linear(outputs=outputs, dtype=dtype)
    others = {"model.layers.0.weight": torch.randn(5, 5), "step": torch.tensor(3)}
    save_file({**state(layer, prefix), **others}, tmp_path / "head.safetensors")
    head = CandleValueHead.load(tmp_path / "head.safetensors")
    assert bits(head.weight) == bits(layer.weight.detach().float().numpy())
    assert bits(head.bias) == bits(layer.bias.detach().float().numpy())
    assert bits(head.weight) != bits(np.nextafter(head.weight, np.float32(9)))  # the comparison sees one unit


@pytest.mark.parametrize("outputs", [1, 3])
def test_torch_reads_what_candle_wrote(tmp_path, outputs):
    head = make_head(outputs, 37)
    head.save(tmp_path / "head.safetensors")
    tensors = load_file(tmp_path / "head.safetensors")
    assert set(tensors) == {"v_head.summary.weight", "v_head.summary.bias"}
    assert bits(tensors["v_head.summary.weight"].numpy()) == bits(head.weight)
    assert bits(tensors["v_head.summary.bias"].numpy()) == bits(head.bias)


def test_candle_writes_the_bytes_that_torch_writes(tmp_path):
    layer = linear()
    save_file(state(layer, "v_head.summary."), tmp_path / "torch.safetensors", metadata={"format": "pt"})
    CandleValueHead.load(tmp_path / "torch.safetensors").save(tmp_path / "candle.safetensors")
    assert (tmp_path / "candle.safetensors").read_bytes() == (tmp_path / "torch.safetensors").read_bytes()


def test_a_head_without_bias_is_saved_with_zeros_and_keeps_its_values(tmp_path):
    head, hidden = make_head(1, 96, bias=False), random_floats(5, 96)
    head.save(str(tmp_path / "head.safetensors"))
    loaded = CandleValueHead.load(str(tmp_path / "head.safetensors"))
    assert loaded.bias.tolist() == [0.0]
    assert bits(loaded(hidden)) == bits(head(hidden))


def test_saving_replaces_the_file_beside_which_it_wrote(tmp_path):
    path = tmp_path / "head.safetensors"
    path.write_bytes(b"old")
    make_head(1, 8).save(path)
    assert os.listdir(tmp_path) == ["head.safetensors"]
    assert CandleValueHead.load(path).in_features == 8


def test_saving_where_nothing_can_be_written_names_the_path(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        make_head(1, 8).save(tmp_path / "nowhere" / "head.safetensors")
    assert str(caught.value.filename) == str(tmp_path / "nowhere" / "head.safetensors")


def test_a_missing_file_is_a_file_not_found_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="No such file or directory") as caught:
        CandleValueHead.load(tmp_path / "none.safetensors")
    assert str(caught.value.filename) == str(tmp_path / "none.safetensors")


def test_a_folder_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match=f"{tmp_path}: expected a safetensors file, got a folder"):
        CandleValueHead.load(tmp_path)


WEIGHT, BIAS = torch.randn(1, 5), torch.randn(1)


@pytest.mark.parametrize(
    ("tensors", "found"),
    [
        ({"lm_head.weight": WEIGHT}, "found lm_head.weight"),
        ({"v_head.weight": WEIGHT, "v_head.bias": BIAS}, "found v_head.bias, v_head.weight"),
        ({"v_head.summary.weight": WEIGHT}, "found v_head.summary.weight"),
        ({"v_head.summary.bias": BIAS}, "found v_head.summary.bias"),
        ({"summary.weight": WEIGHT}, "found summary.weight"),
        ({"bias": BIAS}, "found bias"),
        ({"weight": WEIGHT, "summary.weight": WEIGHT, "summary.bias": BIAS}, "found weight, summary.bias"),
        ({"weight": WEIGHT[0]}, r"tensor `weight`: expected shape \[K, H\], neither zero, found \[5\]"),
        ({"weight": torch.zeros(1, 0)}, r"tensor `weight`: expected shape \[K, H\], neither zero, found \[1, 0\]"),
        ({"weight": WEIGHT, "bias": torch.zeros(2)}, r"tensor `bias`: expected shape \[1\], found \[2\]"),
        ({"weight": WEIGHT, "bias": torch.zeros(())}, r"tensor `bias`: expected shape \[1\], found \[\]"),
        ({"weight": WEIGHT.double()}, "tensor `weight`: expected dtype F32, BF16 or F16, found F64"),
        ({"weight": WEIGHT, "bias": BIAS.long()}, "tensor `bias`: expected dtype F32, BF16 or F16, found I64"),
    ],
)
def test_a_file_whose_head_does_not_fit_says_what_was_found_and_expected(tmp_path, tensors, found):
    path = tmp_path / "head.safetensors"
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    with pytest.raises(HeadMismatchError, match=found) as caught:
        CandleValueHead.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "expected" in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def file_bytes(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: list[int], start: int, end: int) -> dict:
    return {"weight": {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}}


GOOD = file_bytes(entry([1, 2], 0, 8), bytes(8))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        GOOD[:-1],
        GOOD[:4],
        GOOD[:20],
        GOOD + b"\0",
        struct.pack("<Q", 2**64 - 1) + b"{}",
        struct.pack("<Q", 2**40) + b"{}",
        file_bytes(b"\xff\xfe"),
        file_bytes(b"[1, 2"),
        file_bytes(b'{"weight": ' + b"[" * 10_000),
        file_bytes(entry([1, 3], 0, 8), bytes(8)),
        file_bytes(entry([1, 2], 8, 0), bytes(8)),
        file_bytes(entry([1, 2], 8, 16), bytes(8)),
        file_bytes(entry([1, 2], -8, 0), bytes(8)),
        file_bytes(entry([2**32, 2**32], 0, 8), bytes(8)),
        file_bytes(entry([1, 2**61], 0, 8), bytes(8)),
        b"PK\x03\x04 a torch checkpoint is a zip file",
    ],
)
def test_a_truncated_or_hostile_file_is_an_error(tmp_path, content):
    path = tmp_path / "head.safetensors"
    path.write_bytes(content)
    with pytest.raises(HeadFileError, match="not a safetensors file") as caught:
        CandleValueHead.load(path)
    assert str(path) in str(caught.value)


def test_the_file_that_the_hostile_ones_were_made_from_loads(tmp_path):
    (tmp_path / "head.safetensors").write_bytes(GOOD)
    assert CandleValueHead.load(tmp_path / "head.safetensors").weight.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(
    "options", [{"support": Support(-1.0, 1.0, bins=5)}, {"num_outputs": 3, "activation": "softmax"}], ids=str
)
def test_heads_whose_outputs_are_no_values_are_refused_rather_than_read_as_logits(tmp_path, options):
    file = save(ValueHead(None, hidden_size=16, **options).weights(), tmp_path / "head.safetensors", "vhead")
    with pytest.raises(
        HeadMismatchError, match=r"metadata `v_head`: expected a head whose outputs are its values, found"
    ):
        CandleValueHead.load(file)
    file = save(ValueHead(None, hidden_size=16, num_outputs=5).weights(), tmp_path / "plain.safetensors", "vhead")
    assert CandleValueHead.load(file).out_features == 5


@pytest.mark.parametrize(
    "stated", [{"v_head_support": Support(-1.0, 1.0, bins=3).settings()}, {"v_head_activation": "softmax"}], ids=str
)
def test_a_model_whose_configuration_states_what_its_outputs_mean_is_refused(tmp_path, stated):
    tensors = {
        "model.norm.weight": torch.randn(16),
        "v_head.summary.weight": torch.randn(3, 16),
        "v_head.summary.bias": torch.randn(3),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 16} | stated))
    (name,) = stated
    with pytest.raises(HeadMismatchError, match=f"config.json beside it: expected .* found one with {name}"):
        CandleValueHead.load(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 16, name: None}))
    assert CandleValueHead.load(tmp_path / "model.safetensors").out_features == 3


def test_a_head_s_own_file_beside_a_distributional_model_is_read(tmp_path):
    save_file({"v_head.summary.weight": WEIGHT, "v_head.summary.bias": BIAS}, tmp_path / "head.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"v_head_support": Support(-1.0, 1.0, bins=5).settings()}))
    assert CandleValueHead.load(tmp_path / "head.safetensors").out_features == 1
