"""Decoder layers in place along packed rows: the same bits, never for what only looks alike, and rows nobody reads."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from transformers import modeling_utils

from tests.scoring.scoring_models import critic, trees, worst
from vhead import Rollout, Scorer
from vhead.ops.rotary import rotate, rotates_in_place
from vhead.packing import gates, layers
from vhead.packing.attention import interface
from vhead.scoring.fields import FIELDS

pytestmark = pytest.mark.skipif(not hasattr(modeling_utils, "ALL_ATTENTION_FUNCTIONS"), reason="no attention interface")


def rotated(heads, cos, sin):
    """What transformers' models compute, one operation after the other."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos[:, :, None] + torch.cat([-second, first], dim=-1) * sin[:, :, None]


def angles(rows: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    noise = torch.randn(1, rows, size)
    return noise.cos().to(dtype), noise.sin().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "size"), [(3, 2), (2, 30), (14, 64), (2, 80), (5, 96), (1, 128), (2, 256)])
def test_a_rotation_in_place_rounds_as_torch_s_operations_do(dtype, heads, size):
    states = torch.randn(1, 37, heads, size).to(dtype)
    cos, sin = angles(37, size, dtype)
    expected = rotated(states, cos, sin)
    assert not torch.equal(states, expected)
    rotate(states, cos, sin)
    assert torch.equal(states, expected)


def test_a_rotation_in_memory_that_is_aligned_to_nothing():
    memory = torch.randn(1 + 5 * 2 * 80).bfloat16()
    states = memory[1:].view(1, 5, 2, 80)
    cos, sin = (torch.cat([memory[:1], x.flatten()])[1:].view(x.shape) for x in angles(5, 80, torch.bfloat16))
    expected, beside = rotated(states, cos, sin), memory[0].clone()
    rotate(states, cos, sin)
    assert torch.equal(states, expected)
    assert memory[0] == beside


def test_what_a_rotation_refuses():
    cos, sin = angles(5, 8, torch.float32)
    with pytest.raises(TypeError, match="cos: expected bfloat16, as x is, got float32"):
        rotate(torch.randn(1, 5, 2, 8).bfloat16(), cos, sin)
    with pytest.raises(ValueError, match="contiguous"):
        rotate(torch.randn(1, 5, 8, 2).transpose(2, 3), cos, sin)
    with pytest.raises(ValueError, match="sin"):
        rotate(torch.randn(1, 5, 2, 8), cos, sin[:, :4])
    with pytest.raises(ValueError, match="cos"):
        rotate(torch.randn(1, 5, 2, 7), cos[..., :7], sin[..., :7])
    assert not rotates_in_place(torch.randn(1, 5, 2, 8).double(), cos.double(), sin.double())


def states_of(model: nn.Module, scorer: Scorer, **fused: object) -> list[torch.Tensor]:
    """The last states of the trees' batches with these modules."""
    engine = scorer._engine
    encoded = [scorer.encoder.encode(at, record, "") for at, record in enumerate(trees())]
    usual, body = engine._ways.usual, engine._body
    before, body.fused = body.fused, gates.Fused(**fused)
    try:
        with torch.no_grad():
            batches = usual.batches([rollout.tokens for rollout in encoded], [1] * len(encoded), 10_000)
            return [usual.states(batch) for batch in batches]
    finally:
        body.fused = before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_the_same_bits(architecture, dtype):
    model = critic(architecture)
    model.pretrained_model.to(dtype)
    scorer = Scorer(model)
    own = scorer._engine._body.fused.layers
    assert len(own) == 2
    by_the_model, in_place = states_of(model, scorer), states_of(model, scorer, layers=own)
    assert all(map(torch.equal, by_the_model, in_place))
    with torch.no_grad():
        own[1].self_attn.o_proj.weight.mul_(1.1)
    assert not any(map(torch.equal, in_place, states_of(model, scorer, layers=own)))


@pytest.mark.parametrize(
    "settings",
    [
        {"head_dim": 80},
        {"head_dim": 96},
        {"head_dim": 256, "num_key_value_heads": 1},
        {
            "hidden_size": 45,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 10,
            "intermediate_size": 77,
        },
        {"attention_bias": True, "mlp_bias": True},
    ],
    ids=lambda settings: ",".join(f"{name}={value}" for name, value in settings.items()),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_sizes_with_one_thread(settings, dtype):
    model = critic("llama", **settings)
    scorer = Scorer(model, num_threads=1)
    assert len(scorer._engine._body.fused.layers) == 2
    expected = scorer.score(trees(), FIELDS)
    assert worst(model, trees(), expected) < 1e-4
    model.pretrained_model.to(dtype)
    rounded = Scorer(model, num_threads=1)
    assert len(rounded._engine._body.fused.layers) == 2
    found = rounded.score(trees(), FIELDS)
    assert np.abs(found.values - expected.values).max() < (1e-5 if dtype == torch.float32 else 0.3)


def test_storages_that_are_aligned_to_nothing():
    model = critic("qwen2")
    for parameter in model.parameters():
        memory = torch.empty(parameter.numel() + 1)
        memory[1:].copy_(parameter.detach().flatten())
        parameter.data = memory[1:].view(parameter.shape)
    scorer = Scorer(model)
    assert len(scorer._engine._body.fused.layers) == 2
    assert worst(model, trees(), scorer.score(trees(), FIELDS)) < 1e-4


@pytest.mark.parametrize(
    "change",
    ["class", "module", "child", "head norm", "window", "hook", "hook of attention", "forward of attention", "forward"],
)
def test_a_layer_that_only_looks_like_one_is_left_alone(change):
    model = critic("llama")
    layer = model.pretrained_model.model.layers[0]
    assert layer in gates.Fused.of(model).layers
    kind = type(layer)
    if change == "class":
        layer.__class__ = type("GraniteDecoderLayer", (kind,), {"__module__": kind.__module__})
    if change == "module":
        layer.__class__ = type(kind.__name__, (kind,), {"__module__": "remote.code"})
    if change == "child":
        layer.post_feedforward_layernorm = nn.Identity()
    if change == "head norm":
        layer.self_attn.qk_norm = nn.Identity()
    if change == "window":
        layer.self_attn.config.sliding_window = 4
    if change == "hook":
        layer.register_forward_hook(lambda _module, _inputs, output: output)
    if change == "hook of attention":
        layer.self_attn.register_forward_pre_hook(lambda _module, inputs: inputs)
    if change == "forward of attention":
        layer.self_attn.forward = lambda states: states
    if change == "forward":
        layer.forward = lambda states: states
    assert layer not in gates.Fused.of(model).layers


def test_a_layer_that_computes_something_else_is_noticed_and_the_plan_says_so(monkeypatch):
    model = critic("llama")
    attention = type(model.pretrained_model.model.layers[0].self_attn)
    own = attention.forward

    def scaled(self, *arguments, **named):
        states, weights = own(self, *arguments, **named)
        return 0.5 * states, weights

    monkeypatch.setattr(attention, "forward", scaled)
    scorer = Scorer(model)
    assert "5 of 5 norms, 0 of 2 decoder layers" in str(scorer.plan)
    assert scorer.plan.last_layer == ""
    assert scorer.plan.strategy == "tree packing"
    assert worst(model, trees(), scorer.score(trees(), FIELDS)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_last_layer_that_gives_other_rows_is_noticed(monkeypatch, dtype):
    own = layers.forward

    def shifted(layer, rows, *arguments, **named):
        return own(layer, rows if rows is None else rows.roll(1), *arguments, **named)

    monkeypatch.setattr(layers, "forward", shifted)
    model = critic("llama")
    model.pretrained_model.to(dtype)
    scorer = Scorer(model)
    assert scorer.plan.last_layer == ""
    assert len(scorer._engine._body.fused.layers) == 2


def test_layers_of_older_releases_give_their_states_in_a_tuple():
    layer = critic("llama").pretrained_model.model.layers[0]
    states = torch.randn(1, 3, 32)
    cos, sin = angles(3, 8, torch.float32)

    def attend(query, key, value, **_options):
        return value.repeat_interleave(2, dim=1).transpose(1, 2)

    with torch.no_grad(), interface.AttentionInterface(layer).attending(attend):
        (inside,) = layers.forward(layer, None, True, states, position_embeddings=(cos, sin))
        plain = layers.forward(layer, None, False, states, position_embeddings=(cos, sin))
        chosen = layers.forward(layer, torch.tensor([2]), False, states, position_embeddings=(cos, sin))
    assert torch.equal(inside, plain)
    torch.testing.assert_close(chosen, plain[:, 2:], rtol=0, atol=1e-5)


def records() -> list[Rollout]:
    """Traces most of whose tokens are observations."""
    rng = np.random.default_rng(3)
    masks = [np.arange(len(record.completion)) % 5 == 4 for record in trees()]
    for mask in masks:
        mask[rng.integers(len(mask))] = True
    return [Rollout(r.prompt, r.completion, mask=mask) for r, mask in zip(trees(), masks, strict=True)]


def rows_of_last_layer(model: nn.Module, returns: tuple[str, ...], given: list[Rollout]) -> tuple[int, int]:
    """How many rows the first feed-forward layer computes, and how many the last one."""
    scorer, seen = Scorer(model), []
    own = gates._forward

    def noting(layer, states):
        seen.append(states.shape[1])
        return own(layer, states)

    gates._forward = noting
    try:
        scorer.score(given, returns)
    finally:
        gates._forward = own
    return seen[0], seen[-1]


@pytest.mark.parametrize(
    ("returns", "share"), [(("reward",), 0.15), (("logprobs",), 0.5), (("prompt_value",), 0.1), (("bootstrap",), 0.2)]
)
def test_the_last_layer_computes_the_rows_that_are_read(returns, share):
    whole, last = rows_of_last_layer(critic("llama"), returns, records())
    assert 0 < last < share * whole


def test_where_most_rows_are_read_all_are_computed():
    whole, last = rows_of_last_layer(critic("llama"), ("values",), [Rollout([5], list(range(10, 50)))])
    assert whole == last == 41


@pytest.mark.parametrize("returns", [("reward",), ("logprobs",), ("prompt_value",), ("reward", "logprobs", "entropy")])
def test_scores_do_not_depend_on_which_rows_are_read(returns):
    model = critic("qwen2")
    scorer = Scorer(model)
    assert scorer.plan.last_layer
    few, all_fields = scorer.score(records(), returns), scorer.score(records(), FIELDS)
    for name in returns:
        np.testing.assert_allclose(getattr(few, name), getattr(all_fields, name), rtol=0, atol=1e-5)


def test_a_hook_anywhere_sees_all_rows():
    model = critic("llama")
    scorer = Scorer(model)
    seen = []
    model.pretrained_model.model.norm.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    scorer.score(records(), ("reward",))
    assert seen[0].shape[1] > 3 * len(records())


@pytest.mark.parametrize("without", [{"layers": ()}, {"last": None}, {"layers": (), "last": None}])
def test_without_its_kernels_the_scores_are_the_same(without):
    model = critic("llama")
    scorer = Scorer(model)
    expected = scorer.score(records(), ("reward",))
    body = scorer._engine._body
    body.fused = dataclasses.replace(body.fused, **without)
    np.testing.assert_allclose(scorer.score(records(), ("reward",)).reward, expected.reward, rtol=0, atol=1e-5)
