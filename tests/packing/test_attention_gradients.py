"""Gradients of attention by blocks of queries, against autograd in float64."""

import pytest
import torch
from torch.nn import functional

from vhead.packing.attention import gradients


def _case(dtype, batch=3, heads=6, key_heads=2, queries=7, keys=19):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    query, grad_output = draw(batch, heads, queries, 8), draw(batch, heads, queries, 5)
    key, value = draw(batch, key_heads, keys, 8), draw(batch, key_heads, keys, 5)
    before = torch.tensor([12, 3, 0])[:batch, None, None, None] + torch.arange(queries)[:, None]
    mask = torch.zeros(batch, 1, queries, keys, dtype=dtype).masked_fill_(torch.arange(keys) > before, -torch.inf)
    return query, key, value, mask, grad_output


def _expected(query, key, value, mask, grad_output, scale):
    query, key, value = (tensor.double().requires_grad_() for tensor in (query, key, value))
    repeated = [t.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for t in (key, value)]
    output = functional.scaled_dot_product_attention(query, *repeated, attn_mask=mask.double(), scale=scale)
    return torch.autograd.grad(output, (query, key, value), grad_output.double())


@pytest.mark.parametrize("weights", [1, 6 * 3 * 19, 2**19], ids=["a query at a time", "three queries", "all queries"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_are_those_of_autograd_in_float64(monkeypatch, dtype, weights):
    monkeypatch.setattr(gradients, "_WEIGHTS", weights)
    case = _case(dtype)
    given = [tensor.clone() for tensor in case]
    found = gradients.differentiate(*case, scale=0.3)
    for one, expected, own in zip(found, _expected(*case, 0.3), case, strict=False):
        assert one.shape == own.shape
        assert one.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6
        assert (one - expected).abs().max() <= tolerance * expected.abs().max()
    assert all(torch.equal(one, other) for one, other in zip(given, case, strict=True))


def test_one_mask_serves_all_of_a_batch_and_the_scale_has_its_default():
    query, key, value, mask, grad_output = _case(torch.float32)
    found = gradients.differentiate(query, key, value, mask[:1], grad_output, None)
    expected = _expected(query, key, value, mask[:1].expand_as(mask), grad_output, None)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one.double(), other, rtol=1e-5, atol=1e-6)


def test_the_comparison_sees_a_key_too_many():
    query, key, value, mask, grad_output = _case(torch.float32)
    wrong = gradients.differentiate(query, key, value, torch.zeros_like(mask), grad_output, 0.3)
    expected = _expected(query, key, value, mask, grad_output, 0.3)
    assert not torch.allclose(wrong[1].double(), expected[1], rtol=1e-3, atol=1e-3)
