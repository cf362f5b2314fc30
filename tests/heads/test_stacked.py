"""Several heads as one module: each gives the bits that it gives alone, side by side with the others."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vhead import Support, ValueHead, heads, ops
from vhead.errors import HeadError

CONFIG = SimpleNamespace(hidden_size=96)


def head(**arguments):
    return ValueHead(CONFIG, **{"v_head_init_strategy": "normal", **arguments}).eval()


def plain_heads():
    torch.manual_seed(1)
    plain = {f"reward.{index}": head() for index in range(6)}
    plain |= {"attributes": head(num_outputs=19), "prm": head(num_outputs=2, activation="softmax")}
    for each in plain.values():
        nn.init.normal_(each.summary.bias)
    return plain


def mixed_heads():
    torch.manual_seed(2)
    return {
        "values": head(),
        "two layers": head(num_outputs=3, intermediate_size=40),
        "distribution": head(support=Support(-1.0, 1.0, 11)),
        "again": head(num_outputs=2),
    }


@pytest.mark.parametrize("make", [plain_heads, mixed_heads])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 50)])
def test_each_head_gives_the_bits_that_it_gives_alone(make, dtype, shape):
    parts, states = make(), torch.randn(*shape, 96).to(dtype)
    stacked = heads.stacked(parts)
    together = stacked(states)
    assert together.dtype == torch.float32
    assert together.shape == (*shape, stacked.num_outputs)
    assert list(stacked.columns) == list(parts)
    for name, part in parts.items():
        assert torch.equal(together[..., stacked.columns[name]], part(states))
    first, second = list(stacked.columns.values())[:2]
    assert not torch.equal(together[..., first], together[..., second][..., :1]), "heads that are alike prove nothing"


def test_plain_heads_are_one_operation_and_others_run_one_after_the_other(monkeypatch):
    calls = []
    one = ops.value_head

    def counted(*args, **kwargs):
        calls.append(args[1].shape)
        return one(*args, **kwargs)

    monkeypatch.setattr(ops, "value_head", counted)
    heads.stacked(plain_heads())(torch.randn(4, 96))
    assert calls == [(6 + 19 + 2, 96)]
    calls.clear()
    heads.stacked(mixed_heads())(torch.randn(4, 96))
    assert calls == [(1, 96), (11, 96), (11,), (2, 96)]


def test_weights_that_change_later_count_at_once():
    parts, states = plain_heads(), torch.randn(4, 96)
    stacked = heads.stacked(parts)
    before = stacked(states)
    with torch.no_grad():
        parts["prm"].summary.weight.add_(1.0)
    after = stacked(states)
    assert torch.equal(after[..., stacked.columns["prm"]], parts["prm"](states))
    assert not torch.equal(after[..., stacked.columns["prm"]], before[..., stacked.columns["prm"]])


def test_a_head_in_training_keeps_its_dropout_and_gradients_reach_every_head():
    parts, states = plain_heads(), torch.randn(4, 96)
    stacked = heads.stacked(parts)
    stacked.train()
    assert not torch.equal(stacked(states), stacked(states))
    stacked.eval()
    stacked(states).square().sum().backward()
    assert all(parameter.grad.any() for part in parts.values() for parameter in part.parameters())


def test_a_hooked_head_is_called():
    parts, called = plain_heads(), []
    parts["prm"].summary.register_forward_hook(lambda *_args: called.append(True))
    stacked, states = heads.stacked(parts), torch.randn(4, 96)
    torch.testing.assert_close(stacked(states)[..., stacked.columns["prm"]], parts["prm"](states))
    assert len(called) == 2


def test_a_single_head_is_itself():
    alone = head()
    states = torch.randn(3, 96)
    assert torch.equal(heads.stacked({"one": alone})(states), alone(states))


def test_heads_of_other_widths_and_no_heads_are_refused():
    other = ValueHead(SimpleNamespace(hidden_size=95))
    with pytest.raises(HeadError, match=r"heads: expected heads .* of one width, got a \[96\], b \[95\]"):
        heads.stacked({"a": head(), "b": other})
    with pytest.raises(HeadError, match="heads: expected at least one head"):
        heads.stacked({})
