"""A configuration that asks for more than its checkpoint holds is refused before anything is allocated for it."""

import json
import threading

import pytest
import torch
from torch import nn

from tests.modeling.tiny_models import build
from vhead import AutoModelForCausalLMWithValueHead
from vhead.checkpoints.checkpoint import Checkpoint
from vhead.checkpoints.config_bounds import bounded_by, check_config
from vhead.errors import BodyMismatchError, LoadError, VheadError

ABSURD = {
    "a billion layers": {"num_hidden_layers": 10**9},
    "99,999 layers": {"num_hidden_layers": 99_999},
    "no layers": {"num_hidden_layers": 0},
    "less than no layers": {"num_hidden_layers": -1},
    "a vocabulary of 10^18": {"vocab_size": 10**18},
    "a vocabulary of 10^10": {"vocab_size": 10**10},
    "a negative vocabulary": {"vocab_size": -1},
    "states of 10^9": {"hidden_size": 10**9},
    "states of nothing": {"hidden_size": 0},
    "a layer of 10^12": {"intermediate_size": 10**12},
    "heads of 10^9": {"head_dim": 10**9},
    "no heads": {"num_attention_heads": 0},
    "10^12 positions": {"max_position_embeddings": 10**12},
    "10^9 labels": {"num_labels": 10**9},
    "float99": {"dtype": "float99", "torch_dtype": "float99"},
    "a list for a dtype": {"dtype": ["float32"], "torch_dtype": ["float32"]},
    "a list for a type": {"model_type": ["llama"]},
    "a number for code": {"auto_map": 7},
    "a number for a scaling": {"rope_scaling": 5, "rope_parameters": 5},
    "an unknown activation": {"hidden_act": "nothing"},
    "a list for a size": {"intermediate_size": [1]},
}


@pytest.fixture
def folder(tmp_path):
    AutoModelForCausalLMWithValueHead(build("llama")).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("absurd", ABSURD)
def test_an_absurd_configuration_is_one_line_that_names_the_folder(folder, absurd):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | ABSURD[absurd]))
    with pytest.raises(VheadError) as caught:
        AutoModelForCausalLMWithValueHead.from_pretrained(folder)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"text_config": {"num_hidden_layers": 10**6}}, "text_config.num_hidden_layers: expected at most 100,000"),
        ({"moe": {"num_experts": 10**7}}, "moe.num_experts: expected at most"),
        ({"decoder_layers": -3}, "decoder_layers: expected 0 or more layers, got -3"),
        ({"text_config": {"_attn_implementation": "a/b"}}, "text_config._attn_implementation: 'a/b' is code from"),
    ],
)
def test_a_part_of_a_configuration_is_named(config, found):
    with pytest.raises(LoadError, match=f"^x: {found}"):
        check_config(config, "x")


def test_what_real_configurations_hold_passes():
    check_config(
        {
            "vocab_size": 262_208,
            "max_position_embeddings": 10_485_760,
            "vision_feature_layer": -2,
            "rope_theta": 500_000_000,
            "sliding_window": -1,
            "num_hidden_layers": 126,
            "encoder_layers": 0,
            "tie_word_embeddings": True,
            "attn_implementation": "eager",
            "seen_tokens": 15 * 10**12,
        },
        "x",
    )


def test_what_a_model_registers_is_counted_until_it_is_too_much(folder):
    built = []

    def build_many():
        for _ in range(100):
            built.append(nn.Linear(1 << 12, 1 << 12, device="meta"))

    with pytest.raises(
        BodyMismatchError, match=r"asks for a larger model .* has weights for: 3 parameters with 33,558,528 elements"
    ):
        with_bounds(folder, build_many)
    assert len(built) == 1
    nn.Linear(1 << 12, 1 << 13, device="meta")


def with_bounds(folder, build_many):
    with bounded_by(Checkpoint(folder)):
        build_many()


def test_many_small_parameters_are_too_much_as_well(folder):
    with pytest.raises(BodyMismatchError, match=r"asks for a larger model"), bounded_by(Checkpoint(folder)):
        nn.ParameterList(torch.zeros(1) for _ in range(10_000))


def test_what_another_thread_builds_does_not_count(folder):
    with bounded_by(Checkpoint(folder)):
        thread = threading.Thread(target=lambda: nn.Linear(1 << 14, 1 << 14, device="meta"))
        thread.start()
        thread.join()


def test_the_same_name_again_is_no_more(folder):
    with bounded_by(Checkpoint(folder)):
        linear = nn.Linear(1 << 11, 1 << 11, device="meta")
        for _ in range(100):
            linear.weight = nn.Parameter(linear.weight.detach())
