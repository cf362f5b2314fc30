"""The head by itself: children, width, dropout, initial weights, and what bypassing its modules must not bypass."""

import math
from types import SimpleNamespace

import pytest
import torch
from tiny_models import COMMON, batch, build
from torch import nn
from transformers import LlamaConfig

from vhead import AutoModelForCausalLMWithValueHead, ValueHead
from vhead.errors import HeadError


def config(**attributes):
    return SimpleNamespace(**attributes)


def test_children_and_shapes_are_trls():
    head = ValueHead(config(hidden_size=12))
    assert [name for name, _ in head.named_children()] == ["dropout", "summary", "flatten"]
    assert type(head.summary) is nn.Linear
    assert head.summary.weight.shape == (1, 12)
    assert head.summary.bias.shape == (1,)
    assert head.summary.weight.dtype == head.summary.bias.dtype == torch.float32
    assert head.summary.weight.requires_grad
    assert head(torch.randn(2, 3, 12)).shape == (2, 3, 1)


def test_the_default_dtype_does_not_reach_the_head():
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert ValueHead(config(hidden_size=4)).summary.weight.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("attributes", "width"),
    [
        ({"hidden_size": 3}, 3),
        ({"word_embed_proj_dim": 5, "hidden_size": 3}, 5),
        ({"text_config": config(hidden_size=7)}, 7),
        ({"hidden_size": None, "text_config": config(hidden_size=7)}, 7),
        ({"decoder": config(hidden_size=9)}, 9),
        ({"hidden_size": 3, "decoder": config(hidden_size=9)}, 3),
    ],
)
def test_width_comes_from_the_configuration(attributes, width):
    assert ValueHead(config(**attributes)).summary.in_features == width


def test_the_output_embedding_knows_the_width_better():
    model = AutoModelForCausalLMWithValueHead(build("opt"))
    assert model.v_head.summary.in_features == 16
    body = build("llama")
    body.config.hidden_size = 99
    assert AutoModelForCausalLMWithValueHead(body).v_head.summary.in_features == 32


@pytest.mark.parametrize("attributes", [{}, {"hidden_size": "12"}, {"hidden_size": 0}, {"decoder": config()}])
def test_no_width_is_an_error(attributes):
    with pytest.raises(HeadError, match="hidden_size"):
        ValueHead(config(**attributes))


@pytest.mark.parametrize(
    ("attributes", "arguments", "probability"),
    [
        ({}, {}, 0.1),
        ({}, {"summary_dropout_prob": 0.3}, 0.3),
        ({"summary_dropout_prob": 0.2}, {"summary_dropout_prob": 0.3}, 0.2),
        ({"summary_dropout_prob": 0.0}, {"summary_dropout_prob": 0.3}, None),
        ({"summary_dropout_prob": None}, {"summary_dropout_prob": 0.3}, 0.3),
        ({}, {"summary_dropout_prob": 0.0}, None),
    ],
)
def test_dropout_probability(attributes, arguments, probability):
    head = ValueHead(config(hidden_size=4, **attributes), **arguments)
    assert getattr(head.dropout, "p", None) == probability
    assert isinstance(head.dropout, nn.Identity) == (probability is None)


@pytest.mark.parametrize("probability", [-0.1, 1.0, 1.5, math.nan])
def test_a_probability_outside_the_range_is_an_error(probability):
    with pytest.raises(HeadError, match="summary_dropout_prob"):
        ValueHead(config(hidden_size=4), summary_dropout_prob=probability)


@pytest.mark.parametrize("strategy", ["zeros", "uniform", "Normal", "", 1])
def test_an_unknown_strategy_is_an_error(strategy):
    with pytest.raises(ValueError, match="v_head_init_strategy"):
        ValueHead(config(hidden_size=4), v_head_init_strategy=strategy)
    with pytest.raises(HeadError, match="v_head_init_strategy"):
        AutoModelForCausalLMWithValueHead.from_pretrained(build("llama"), v_head_init_strategy=strategy)


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_a_range_that_is_no_standard_deviation_is_an_error(value):
    with pytest.raises(HeadError, match="v_head_initializer_range"):
        ValueHead(config(hidden_size=4), v_head_init_strategy="normal", v_head_initializer_range=value)


@pytest.mark.parametrize(
    "mistake", [{"v_head_init_strategy": "zeros"}, {"summary_dropout_prob": 1.0}, {"v_head_initializer_range": -1.0}]
)
def test_mistakes_are_found_before_anything_is_loaded(mistake):
    # The folder does not exist, which would be the error of the first attempt to read it.
    with pytest.raises(HeadError, match=next(iter(mistake))):
        AutoModelForCausalLMWithValueHead.from_pretrained("/nowhere", **mistake)


def test_an_unknown_argument_is_an_error():
    with pytest.raises(TypeError, match="v_head_initializer"):
        AutoModelForCausalLMWithValueHead(build("llama"), v_head_initializer=0.1)


def test_default_initial_weights_are_linears():
    head = ValueHead(config(hidden_size=4096))
    bound = 1 / math.sqrt(4096)
    weight = head.summary.weight.detach()
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert abs(weight.mean().item()) < 5 * bound / math.sqrt(3 * 4096)
    assert head.summary.bias.item() != 0.0


@pytest.mark.parametrize(("arguments", "std"), [({}, 0.2), ({"v_head_initializer_range": 0.01}, 0.01)])
def test_normal_initial_weights(arguments, std):
    head = ValueHead(config(hidden_size=4096), v_head_init_strategy="normal", **arguments)
    assert head.summary.weight.std().item() == pytest.approx(std, rel=0.05)
    assert head.summary.bias.item() == 0.0


@pytest.mark.parametrize("strategy", [None, "normal"])
def test_initial_weights_follow_torchs_seed(strategy):
    def draw(seed):
        torch.manual_seed(seed)
        return ValueHead(config(hidden_size=64), v_head_init_strategy=strategy).summary.weight.detach()

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_disabling_dropout_on_the_child_disables_it():
    head = ValueHead(config(hidden_size=64), summary_dropout_prob=0.5).train()
    states = torch.randn(9, 64)
    assert not torch.equal(head(states), head(states))
    head.dropout.p = 0.0
    assert torch.equal(head(states), head(states))
    head.dropout.p = 0.5
    head.dropout.eval()
    assert torch.equal(head(states), head(states))


def test_nan_and_infinity_are_passed_on():
    head = ValueHead(config(hidden_size=8)).eval()
    states = torch.randn(3, 8)
    states[0, 2], states[1, 3] = math.nan, math.inf
    values = head(states).squeeze(-1)
    assert values[0].isnan()
    assert values[1].isinf()
    assert values[2].isfinite()


class Doubled(nn.Linear):
    def forward(self, states):
        return 2.0 * super().forward(states)


def test_a_replaced_summary_is_called():
    head = ValueHead(config(hidden_size=8)).eval()
    states = torch.randn(5, 8)
    expected = head(states)
    doubled = Doubled(8, 1)
    doubled.load_state_dict(head.summary.state_dict())
    head.summary = doubled
    torch.testing.assert_close(head(states), 2.0 * expected)
    assert head(states.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hooked_summary_is_called(register):
    head, called = ValueHead(config(hidden_size=8)).eval(), []
    states = torch.randn(5, 8)
    expected = head(states)
    getattr(head.summary, register)(lambda *_args: called.append(True))
    torch.testing.assert_close(head(states), expected)
    assert called


def test_real_configurations_give_a_head():
    assert ValueHead(LlamaConfig(**COMMON)).summary.in_features == 32
    model = AutoModelForCausalLMWithValueHead(build("llama"), summary_dropout_prob=0.0)
    assert isinstance(model.v_head.dropout, nn.Identity)
    assert model.train()(**batch(model.pretrained_model)).value.requires_grad
