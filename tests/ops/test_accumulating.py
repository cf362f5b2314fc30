"""Backward that adds the weight's gradient to the weight's own by itself, beside autograd's way."""

import pytest
import torch
from torch import nn

from vhead.ops import token_logprobs
from vhead.ops.token_statistics import accumulating_token_logprobs

# More columns than one call of a kernel takes.
VOCABULARY = 20_000


def _drawn(dtype, *, with_bias):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    hidden, weight = draw(5, 48), nn.Parameter(draw(VOCABULARY, 48))
    weight.grad = draw(VOCABULARY, 48) * 0.01
    targets = torch.randint(VOCABULARY, (5,), generator=generator)
    bias = nn.Parameter(draw(VOCABULARY)) if with_bias else None
    return hidden.requires_grad_(), weight, targets, bias


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "with a bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_added_to_what_is_there(dtype, with_bias):
    found = []
    for compute in (token_logprobs, accumulating_token_logprobs):
        hidden, weight, targets, bias = _drawn(dtype, with_bias=with_bias)
        logprobs, entropy = compute(hidden, weight, targets, bias=bias, temperature=0.7, scale=0.3)
        (logprobs.sum() - 2.0 * entropy.sum()).backward()
        found.append([logprobs, entropy, hidden.grad, weight.grad, None if bias is None else bias.grad])
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 2e-2)
    for one, other in zip(*found, strict=True):
        if other is not None:
            assert one.dtype == other.dtype
            assert (one.double() - other.double()).abs().max() <= tolerance * other.double().abs().max()


def test_a_weight_without_gradients_gets_one():
    hidden, weight, targets, _ = _drawn(torch.float32, with_bias=False)
    weight.grad = None
    accumulating_token_logprobs(hidden.detach(), weight, targets)[0].sum().backward()
    expected = torch.autograd.grad(token_logprobs(hidden, weight, targets)[0].sum(), [weight])[0]
    torch.testing.assert_close(weight.grad, expected)
