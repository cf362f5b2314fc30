"""Products of half precisions in float32: as close to the truth as torch's own, and only where they are faster."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.scoring.scoring_models import critic
from vhead import Rollout, Scorer
from vhead.packing import products
from vhead.packing.gates import Fused
from vhead.packing.products import WideProducts

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def faster(monkeypatch):
    """A processor that multiplies float32 faster, whatever this one does."""
    monkeypatch.setattr(products, "suits_matrix_unit", lambda _weight: False)
    monkeypatch.setattr(products, "is_float32_faster", lambda _dtype: True)


def _drawn(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("sizes", [(2**23, 2**21), (60, 90)], ids=["whole", "in parts"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("turned", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 12, 29), (5, 64, 3), (0, 4, 3), (4, 0, 3), (4, 3, 0)])
def test_products_are_the_true_ones_rounded_once(monkeypatch, sizes, dtype, turned, shape):
    monkeypatch.setattr(products, "_FIRST", sizes[0])
    monkeypatch.setattr(products, "_SECOND", sizes[1])
    (rows, inner, columns), wide = shape, WideProducts()
    for seed in range(2):
        first = _drawn(inner, rows, dtype=dtype, seed=seed).t() if turned[0] else _drawn(rows, inner, dtype=dtype)
        second = _drawn(columns, inner, dtype=dtype).t() if turned[1] else _drawn(inner, columns, dtype=dtype)
        bias = _drawn(columns, dtype=dtype) if seed else None
        truth = first.double() @ second.double() + (0.0 if bias is None else bias.double())
        found = wide.multiply(first, second, bias)
        assert (found.dtype, found.shape) == (dtype, truth.shape)
        allowed = 1.01 * torch.finfo(dtype).eps / 2 * truth.abs() + 1e-5
        assert ((found.double() - truth).abs() <= allowed).all()
        spoilt = found.double() * (1 + 4 * torch.finfo(dtype).eps)
        assert not truth.numel() or inner == 0 or not ((spoilt - truth).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_layers_of_half_precision_are_found_but_not_the_one_for_logits(faster, dtype):
    model = critic("llama").pretrained_model
    assert not Fused.of(model).linears
    model.to(dtype)
    found = Fused.of(model).linears
    assert len(found) == 7 * model.config.num_hidden_layers
    assert all(linear is not model.lm_head for linear in found)
    assert "linear layers in float32" in Fused.of(model).products


@pytest.mark.parametrize(("unit", "faster"), [(True, True), (False, False)])
def test_where_torch_is_as_fast_nothing_is_changed(monkeypatch, unit, faster):
    monkeypatch.setattr(products, "suits_matrix_unit", lambda _weight: unit)
    monkeypatch.setattr(products, "is_float32_faster", lambda _dtype: faster)
    fused = Fused.of(critic("llama").pretrained_model.to(torch.bfloat16))
    assert (fused.linears, fused.products) == ((), "")


@torch.no_grad()
def test_other_dtypes_and_single_rows_go_through_torch():
    linear, wide = nn.Linear(16, 4).to(torch.bfloat16), WideProducts()
    states = _drawn(1, 8, 16, dtype=torch.bfloat16)
    torch.testing.assert_close(products.forward(linear, wide, states), linear(states), rtol=2**-7, atol=1e-2)
    assert torch.equal(products.forward(linear, wide, states[0, 0]), linear(states[0, 0]))
    with pytest.raises(RuntimeError, match="dtype"):
        products.forward(linear, wide, states.float())


@pytest.mark.parametrize("dtype", HALVES)
def test_a_scorer_is_no_further_from_float32_than_torch_s_own_products(faster, monkeypatch, dtype):
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 60, 9)
    rollouts = [Rollout(prompt, rng.integers(0, 60, 12)) for _ in range(6)]

    def errors(faster):
        monkeypatch.setattr(products, "is_float32_faster", lambda _dtype: faster)
        exact = Scorer(critic("llama").eval()).score(rollouts, ["values", "logprobs"])
        scorer = Scorer(critic("llama").to(dtype).eval())
        assert bool(scorer.plan.products) == faster
        found = scorer.score(rollouts, ["values", "logprobs"])
        return [
            np.sqrt(np.square(a - b).mean())
            for a, b in ((found.values, exact.values), (found.logprobs, exact.logprobs))
        ]

    own, wide = errors(False), errors(True)
    assert all(w <= 1.3 * o for o, w in zip(own, wide, strict=True))
    assert wide != own
