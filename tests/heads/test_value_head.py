"""The head by itself: children, width, dropout, initial weights, and what bypassing its modules must not bypass."""

import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig

from tests.modeling.tiny_models import COMMON, batch, build
from vhead import AutoModelForCausalLMWithValueHead, ValueHead, ValueHeadModel, formats
from vhead.errors import HeadError, HeadMismatchError
from vhead.formats import FORMATS, HeadWeights, LinearWeights
from vhead.formats.writing import head_tensors


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


@pytest.mark.parametrize("strategy", ["zero", "uniform", "Normal", "", 1])
def test_an_unknown_strategy_is_an_error(strategy):
    with pytest.raises(ValueError, match='v_head_init_strategy: expected None or "normal" or "zeros", got'):
        ValueHead(config(hidden_size=4), v_head_init_strategy=strategy)
    with pytest.raises(HeadError, match="v_head_init_strategy"):
        AutoModelForCausalLMWithValueHead.from_pretrained(build("llama"), v_head_init_strategy=strategy)


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_a_range_that_is_no_standard_deviation_is_an_error(value):
    with pytest.raises(HeadError, match="v_head_initializer_range"):
        ValueHead(config(hidden_size=4), v_head_init_strategy="normal", v_head_initializer_range=value)


@pytest.mark.parametrize(
    "mistake", [{"v_head_init_strategy": "ones"}, {"summary_dropout_prob": 1.0}, {"v_head_initializer_range": -1.0}]
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


@pytest.mark.parametrize(("outputs", "intermediate"), [(1, None), (3, None), (2, 5)])
def test_a_head_of_zeros_gives_zeros_and_learns_all_the_same(outputs, intermediate):
    torch.manual_seed(4)
    arguments = {"num_outputs": outputs, "intermediate_size": intermediate, "summary_dropout_prob": 0.0}
    head = ValueHead(config(hidden_size=8), v_head_init_strategy="zeros", **arguments)
    states, wanted = torch.randn(9, 8), torch.randn(9, outputs)
    assert not head(states).any()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    for _ in range(2):
        (head(states) - wanted).square().mean().backward()
        optimizer.step()
    assert all(parameter.grad.any() for parameter in head.parameters())
    assert head(states).any()


def test_a_model_and_its_pretrained_form_take_zeros():
    model = AutoModelForCausalLMWithValueHead.from_pretrained(build("llama"), v_head_init_strategy="zeros").eval()
    inputs = batch(model.pretrained_model)
    assert not model.values(**inputs).any()
    assert not ValueHeadModel.from_wrapper(model)(**inputs).value.any()
    model._init_weights(v_head_init_strategy="normal")
    assert model.values(**inputs).any()


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


def trained(outputs=1, intermediate=None, bias=True, width=8):
    def layer(inputs, size):
        return LinearWeights(torch.randn(size, inputs), torch.randn(size) if bias else None)

    layers = (
        (layer(width, outputs),) if intermediate is None else (layer(width, intermediate), layer(intermediate, outputs))
    )
    return HeadWeights(layers, format="test", source="some file")


KINDS = [(1, None), (3, None), (1, 5), (3, 5), (1, 1), (2, 1)]


@pytest.mark.parametrize(("outputs", "intermediate"), KINDS)
def test_shapes_and_names_of_every_kind(outputs, intermediate):
    head = ValueHead(config(hidden_size=8), num_outputs=outputs, intermediate_size=intermediate)
    names = ["summary"] if intermediate is None else ["summary.0", "summary.2"]
    assert list(head.state_dict()) == [f"{name}.{part}" for name in names for part in ("weight", "bias")]
    assert (head.hidden_size, head.num_outputs, head.intermediate_size) == (8, outputs, intermediate)
    assert head(torch.randn(2, 3, 8)).shape == (2, 3, outputs)
    assert head(torch.randn(8)).shape == (outputs,)
    assert all(parameter.dtype == torch.float32 for parameter in head.parameters())
    assert type(head.summary) is (nn.Linear if intermediate is None else nn.Sequential)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("outputs", "intermediate"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_like_a_trained_one_computes_what_it_did(outputs, intermediate, bias, dtype):
    torch.manual_seed(outputs)
    weights = trained(outputs, intermediate, bias=bias)
    head = ValueHead.like(weights, config(hidden_size=8)).eval()
    states = torch.randn(4, 7, 8).to(dtype)
    expected = states.double()
    for index, layer in enumerate(weights.layers):
        expected = expected.relu() if index else expected
        expected = nn.functional.linear(expected, layer.weight.double(), layer.bias_or_zeros.double())
    values = head(states)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-5)
    head.summary.register_forward_hook(lambda *_args: None)
    torch.testing.assert_close(head(states), values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("intermediate", [None, 5])
def test_gradients_reach_every_parameter_and_the_states(intermediate):
    head = ValueHead(config(hidden_size=8), num_outputs=2, intermediate_size=intermediate, summary_dropout_prob=0.0)
    states = torch.randn(6, 8, requires_grad=True)
    plain = [p.detach().clone().requires_grad_() for p in head.parameters()]
    head(states).square().sum().backward()
    twin = states.detach().clone().requires_grad_()
    inner = twin if intermediate is None else nn.functional.linear(twin, *plain[:2]).relu()
    nn.functional.linear(inner, *plain[-2:]).square().sum().backward()
    torch.testing.assert_close(states.grad, twin.grad, rtol=1e-4, atol=1e-5)
    for parameter, expected in zip(head.parameters(), plain, strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-4, atol=1e-5)


def test_dropout_of_a_head_of_two_projections_is_on_the_states():
    torch.manual_seed(3)
    head = ValueHead(config(hidden_size=64), intermediate_size=32, summary_dropout_prob=0.5).train()
    states = torch.randn(9, 64)
    assert not torch.equal(head(states), head(states))
    torch.manual_seed(5)
    first = head(states)
    torch.manual_seed(5)
    assert torch.equal(head(states), first)
    head.eval()
    assert torch.equal(head(states), head(states))


def test_a_row_s_value_does_not_depend_on_the_batch():
    torch.manual_seed(6)
    head = ValueHead(config(hidden_size=64), num_outputs=3, intermediate_size=32).eval()
    states = torch.randn(17, 64)
    together = head(states)
    assert all(torch.equal(head(states[row : row + 1])[0], together[row]) for row in range(17))
    assert not torch.equal(head(states[:1] * 1.0001)[0], together[0])


def test_a_path_is_no_head_to_load():
    with pytest.raises(TypeError, match=r"head: expected HeadWeights, as vhead\.formats\.load gives them .* got a str"):
        ValueHead(config(hidden_size=8)).load("v_head.safetensors")


@pytest.mark.parametrize(
    ("weights", "found"),
    [
        (trained(width=7), "v_head.summary.weight [1, 7]"),
        (trained(2), "v_head.summary.weight [2, 8]"),
        (trained(1, 5), "v_head.summary.0.weight [5, 8] and v_head.summary.2.weight [1, 5]"),
    ],
)
def test_a_head_of_another_kind_is_not_loaded(weights, found):
    head = ValueHead(config(hidden_size=8))
    before = head.summary.weight.clone()
    with pytest.raises(HeadMismatchError) as error:
        head.load(weights)
    assert str(error.value) == f"some file: found {found}, expected v_head.summary.weight [1, 8]"
    assert torch.equal(head.summary.weight, before)


def test_a_trained_head_for_another_width_is_refused():
    with pytest.raises(HeadMismatchError, match=r"found .* \[1, 8\], expected .* \[1, 9\]"):
        ValueHead.like(trained(), config(hidden_size=9))


def test_like_takes_the_head_s_other_arguments():
    assert ValueHead.like(trained(), config(hidden_size=8), summary_dropout_prob=0.25).dropout.p == 0.25
    assert ValueHead.like(trained(), config(hidden_size=3), hidden_size=8).hidden_size == 8


@pytest.mark.parametrize("strategy", [None, "normal"])
def test_both_projections_are_drawn(strategy):
    torch.manual_seed(1)
    head = ValueHead(config(hidden_size=1024), intermediate_size=512, v_head_init_strategy=strategy)
    for linear, width in ((head.summary[0], 1024), (head.summary[2], 512)):
        std = 0.2 if strategy else 1 / math.sqrt(3 * width)
        assert linear.weight.std().item() == pytest.approx(std, rel=0.15)
        assert linear.bias.any().item() == (strategy is None)


@pytest.mark.parametrize(
    "size", [{"num_outputs": 0}, {"intermediate_size": 0}, {"hidden_size": -1}, {"num_outputs": -2}]
)
def test_sizes_are_positive(size):
    with pytest.raises(HeadError, match=f"{next(iter(size))}: expected a positive number"):
        ValueHead(config(hidden_size=8), **size)


@pytest.mark.parametrize(("outputs", "intermediate"), KINDS)
def test_a_model_takes_a_head_of_any_kind(tmp_path, outputs, intermediate):
    body = build("llama")
    body.save_pretrained(tmp_path)
    head = trained(outputs, intermediate, width=32)
    state = head_tensors(head, next(f for f in FORMATS if f.name == "vhead"))
    save_file(
        {**load_file(tmp_path / "model.safetensors"), **state},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    inputs = batch(model.pretrained_model)
    length = inputs["input_ids"].shape
    assert model(**inputs).value.shape == (length if outputs == 1 else (*length, outputs))
    assert torch.equal(model.values(**inputs), model(**inputs).value)


@pytest.mark.parametrize(("outputs", "intermediate"), [(1, None), (3, None), (1, 6)])
def test_weights_go_to_a_file_and_back(tmp_path, outputs, intermediate):
    head = ValueHead(config(hidden_size=8), num_outputs=outputs, intermediate_size=intermediate)
    weights = head.weights()
    formats.save(weights, tmp_path / "head.safetensors", format="vhead")
    again = ValueHead.like(formats.load(tmp_path / "head.safetensors"), config(hidden_size=8))
    for name, value in head.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    with torch.no_grad():
        head.requires_grad_(False).get_parameter(next(name for name, _ in head.named_parameters())).fill_(0.5)
    assert not (weights.layers[0].weight == 0.5).any()
