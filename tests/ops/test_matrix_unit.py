"""The processor's matrix unit against float64, and that it is left alone where it does not fit."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from vhead import _native, ops
from vhead.ops import matrix_unit
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
