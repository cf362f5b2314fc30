"""The processor's matrix unit against float64, and that it is left alone where it does not fit."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from vhead import _native, ops
from vhead.ops import matrix_unit
from vhead.ops.norm import rms_norm
from vhead.ops.token_statistics import operator
from vhead.ops.token_statistics.cpu import CpuTiling

needs_unit = pytest.mark.skipif(not _native.has_matrix_unit(), reason="this processor has no matrix unit")


def drawn(*sizes: int) -> Tensor:
    return (torch.randn(*sizes) / sizes[-1] ** 0.5).bfloat16()


@needs_unit
@pytest.mark.parametrize(("rows", "hidden", "inner"), [(1, 32, 64), (3, 33, 70), (37, 80, 300), (2100, 96, 257)])
def test_a_gated_layer_is_as_near_to_float64_as_torchs(rows: int, hidden: int, inner: int) -> None:
    torch.manual_seed(rows)
    x, gate, up, down = 4 * drawn(rows, hidden), drawn(inner, hidden), drawn(inner, hidden), drawn(hidden, inner)

    def layer(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        inner_states = functional.silu(functional.linear(x, gate)) * functional.linear(x, up)
        return functional.linear(inner_states, down)

    exact = layer(*(tensor.double() for tensor in (x, gate, up, down)))
    own = (matrix_unit.GatedLayers()(x, gate, up, down) - exact).abs().max()
    torchs = (layer(x, gate, up, down) - exact).abs().max()
    assert own <= 1.5 * torchs + 1e-6
    assert (matrix_unit.GatedLayers()(x, up, gate, down) - exact).abs().max() > 1.5 * torchs


@needs_unit
def test_a_row_of_a_gated_layer_depends_on_that_row_alone() -> None:
    x, weights = drawn(300, 100), (drawn(130, 100), drawn(130, 100), drawn(100, 130))
    layers = matrix_unit.GatedLayers()
    assert torch.equal(layers(x, *weights)[211:212], layers(x[211:212], *weights))
    assert torch.equal(layers(x.t().contiguous().t(), *weights), layers(x, *weights))


@needs_unit
def test_sizes_of_a_gated_layer_that_do_not_fit_are_refused() -> None:
    layers = matrix_unit.GatedLayers()
    with pytest.raises(ValueError, match="up"):
        layers(drawn(3, 32), drawn(64, 32), drawn(63, 32), drawn(32, 64))
    with pytest.raises(TypeError, match="gate: expected bfloat16"):
        layers(drawn(3, 32), drawn(64, 32).float(), drawn(64, 32), drawn(32, 64))


def gradients_of(operation, x: Tensor, weight: Tensor, upstream: list[Tensor], *rest, **rule) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in (x, weight)]
    found = operation(*leaves, *rest, **rule)
    return [grad.double() for grad in torch.autograd.grad(found[:2], leaves, [u.to(found[0].dtype) for u in upstream])]


RULES = [{}, {"temperature": 0.7, "softcap": 5.0, "scale": 1.3}]


@needs_unit
@pytest.mark.parametrize("rule", RULES, ids=["plain", "with a rule"])
@pytest.mark.parametrize(("rows", "hidden", "vocabulary"), [(1, 31, 40), (37, 100, 3000), (200, 64, 17_000)])
def test_gradients_by_the_unit_are_as_near_to_float64_as_two_roundings_let_them_be(
    rows: int, hidden: int, vocabulary: int, rule: dict[str, float]
) -> None:
    torch.manual_seed(rows)
    x, weight = 4 * drawn(rows, hidden), 4 * drawn(vocabulary, hidden)
    targets = torch.randint(0, vocabulary, (rows,))
    upstream = [torch.randn(rows), torch.randn(rows)]

    exact = gradients_of(ops.token_statistics_plain, x.double(), weight.double(), upstream, targets, **rule)
    own = gradients_of(ops.token_logprobs, x, weight, upstream, targets, **rule)
    swapped = gradients_of(ops.token_logprobs, x, weight, upstream[::-1], targets, **rule)
    for found, wrong, expected in zip(own, swapped, exact, strict=True):
        # A gradient of a product and a sum of them are rounded to eight bits each.
        assert (found - expected).norm() <= 4e-3 * expected.norm()
        assert (wrong - expected).norm() > 0.1 * expected.norm()


@needs_unit
@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_a_gradient_by_the_unit_is_the_same_where_the_other_one_is_not_asked_for(trained: str) -> None:
    x, weight, targets = drawn(70, 50), drawn(2100, 50), torch.randint(0, 2100, (70,))
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    both = torch.autograd.grad(ops.token_logprobs(x, weight, targets)[0].sum(), leaves)
    asked = ["hidden", "weight"].index(trained)
    leaves[1 - asked].requires_grad_(False)
    (alone,) = torch.autograd.grad(ops.token_logprobs(x, weight, targets)[0].sum(), [leaves[asked]])
    assert torch.equal(alone, both[asked])


@needs_unit
def test_gradients_by_the_unit_need_no_tile_of_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "Sums", None)
    x, weight = drawn(5, 50).requires_grad_(), drawn(70, 50).requires_grad_()
    ops.token_logprobs(x, weight, torch.arange(5))[0].sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0


@needs_unit
def test_a_bias_gets_its_gradient_too() -> None:
    torch.manual_seed(0)
    x, weight, bias = drawn(9, 50), drawn(70, 50), torch.randn(70, requires_grad=True)
    targets = torch.arange(9)
    (found,) = torch.autograd.grad(ops.token_logprobs(x, weight, targets, bias=bias)[0].sum(), [bias])
    doubled = [x.double(), weight.double(), targets]
    (exact,) = torch.autograd.grad(ops.token_statistics_plain(*doubled, bias=bias)[0].sum(), [bias])
    assert (found - exact).abs().max() < 1e-4


@needs_unit
def test_gradients_that_do_not_fit_are_refused() -> None:
    x, weight, numbers = drawn(4, 32), drawn(64, 32), torch.randn(4)
    gradients = _native.LogitGradients(torch.arange(4), 64, None, 1.0, None, 1.0, [numbers] * 3, [numbers] * 2)
    with pytest.raises(ValueError, match="grad_weight"):
        gradients.add_products(x, weight, 0, None, drawn(63, 32))
    with pytest.raises(ValueError, match="grad_hidden"):
        gradients.add_products(x, weight, 0, torch.zeros(4, 31), None)
    with pytest.raises(ValueError, match="grad_weight: expected bfloat16, got float32"):
        gradients.add_products(x, weight, 0, None, torch.zeros(64, 32))
    with pytest.raises(ValueError, match="column"):
        gradients.add_products(x, weight[:32], 32)
    with pytest.raises(ValueError, match="hidden"):
        gradients.add_products(drawn(5, 32), weight, 0)


@needs_unit
@pytest.mark.parametrize(("rows", "hidden", "vocabulary"), [(1, 31, 40), (37, 100, 3000), (200, 64, 17_000)])
def test_statistics_by_the_unit_are_as_near_to_float64_as_those_of_upcast_operands(
    rows: int, hidden: int, vocabulary: int
) -> None:
    torch.manual_seed(rows)
    x, weight = 4 * drawn(rows, hidden), 4 * drawn(vocabulary, hidden)
    targets = torch.randint(0, vocabulary, (rows,))
    own = ops.token_statistics(x, weight, targets, temperature=0.7, top=3)
    exact = ops.token_statistics_plain(x.double(), weight.double(), targets, temperature=0.7, top=3)
    upcast = ops.token_statistics(x.float(), weight.float(), targets, temperature=0.7, top=3)
    for name in ("logprobs", "entropy", "top_logprobs"):
        numbers, expected, others = (getattr(found, name) for found in (own, exact, upcast))
        assert (numbers - expected).abs().max() <= 3 * (others - expected).abs().max() + 4e-6
    assert torch.equal(own.top_tokens, exact.top_tokens)


@needs_unit
def test_statistics_of_a_row_by_the_unit_depend_on_that_row_alone() -> None:
    x, weight, targets = drawn(150, 70), 4 * drawn(2100, 70), torch.arange(150)
    together = ops.token_logprobs(x, weight, targets)
    alone = ops.token_logprobs(x[77:78], weight, targets[77:78])
    assert all(torch.equal(whole[77:78], row) for whole, row in zip(together, alone, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_are_not_given_to_the_unit(dtype: torch.dtype) -> None:
    assert not CpuTiling().multiplies(drawn(2, 32).to(dtype), drawn(5, 32))


def test_onednns_variable_keeps_the_unit_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    assert not matrix_unit.has_matrix_unit()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX")
    assert matrix_unit.has_matrix_unit() == _native.has_matrix_unit()


def row_of_a_tree(rows: int) -> tuple[Tensor, Tensor]:
    """A beginning of half the rows, then two branches: ends and positions."""
    half, quarter = rows // 2, rows // 4
    ends = torch.tensor([rows] * half + [half + quarter] * quarter + [rows] * (rows - half - quarter))
    positions = torch.cat([torch.arange(half + quarter), half + torch.arange(rows - half - quarter)])
    return ends, positions


def dense(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, positions: Tensor, window: int | None) -> Tensor:
    rows = torch.arange(len(ends))
    visible = (rows <= rows[:, None]) & (rows[:, None] < ends)
    if window is not None:
        visible &= positions[:, None] - positions < window
    each = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(each, 0), value.repeat_interleave(each, 0)
    products = (query @ key.transpose(1, 2) * 0.2).masked_fill(~visible, float("-inf"))
    return (products.softmax(-1).to(value.dtype) @ value).transpose(0, 1)


@needs_unit
@pytest.mark.parametrize("window", [None, 1, 50])
@pytest.mark.parametrize(
    ("rows", "heads", "key_heads", "size"), [(1, 2, 1, 64), (100, 4, 2, 80), (333, 7, 1, 96), (70, 2, 2, 256)]
)
def test_attention_by_the_unit_is_as_near_to_float64_as_torchs(
    rows: int, heads: int, key_heads: int, size: int, window: int | None
) -> None:
    torch.manual_seed(rows)
    ends, positions = row_of_a_tree(rows)
    # As projections leave them: each row's heads side by side.
    query, key, value = (
        (2 * torch.randn(rows, count, size)).bfloat16().transpose(0, 1) for count in (heads, key_heads, key_heads)
    )
    own = matrix_unit.RowAttention(ends, positions)(query, key, value, 0.2, window)
    exact = dense(query.double(), key.double(), value.double(), ends, positions, window)
    torchs = dense(query, key, value, ends, positions, window)
    assert own.shape == (rows, heads, size)
    assert (own - exact).abs().max() <= 1.5 * (torchs - exact).abs().max() + 1e-6
    if rows > 99:
        other = matrix_unit.RowAttention(torch.full_like(ends, rows), positions)(query, key, value, 0.2, window)
        assert (other - exact).abs().max() > 0.1


@needs_unit
def test_what_attention_by_the_unit_cannot_take_is_refused() -> None:
    attend = matrix_unit.RowAttention(*row_of_a_tree(8))
    with pytest.raises(ValueError, match="key"):
        attend(drawn(2, 8, 32), drawn(2, 7, 32), drawn(2, 7, 32), 1.0, None)
    with pytest.raises(ValueError, match="heads"):
        attend(drawn(3, 8, 32), drawn(2, 8, 32), drawn(2, 8, 32), 1.0, None)
    with pytest.raises(TypeError, match="query: expected bfloat16"):
        attend(drawn(2, 8, 32).float(), drawn(2, 8, 32), drawn(2, 8, 32), 1.0, None)
    with pytest.raises(ValueError, match="positions"):
        matrix_unit.RowAttention(torch.arange(3), torch.arange(2))


def test_norms_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="weight"):
        rms_norm(torch.randn(3, 8), torch.randn(7), 1e-6)
    with pytest.raises(TypeError, match="weight: expected float32"):
        rms_norm(torch.randn(3, 8), torch.randn(8).bfloat16(), 1e-6)
    assert rms_norm(torch.randn(0, 8), torch.randn(8), 1e-6).shape == (0, 8)
    misaligned = torch.randn(25).bfloat16()[1:].view(3, 8)
    assert torch.equal(
        rms_norm(misaligned, torch.ones(8).bfloat16(), 1e-6),
        rms_norm(misaligned.clone(), torch.ones(8).bfloat16(), 1e-6),
    )
