"""The support of distributional heads: targets against a float64 twin, and what is no support."""

import json
import math
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch

from vhead import Support
from vhead.errors import HeadError

SUPPORTS = [
    Support(-1.0, 1.0, 51),
    Support(-2.5, 7.0, 7, sigma=0.4),
    Support(0, 1, 2),
    Support(-1.0, 1.0, 51, kind="two_hot"),
    Support(3.0, 4.0, 2, kind="two_hot"),
]


def normal_cdf(x, mean, sigma):
    return 0.5 * math.erfc((mean - x) / (sigma * math.sqrt(2.0)))


def twin(support, value):
    """The target of one return, by the definitions, in Python's floats."""
    value = min(max(value, support.low), support.high)
    bins = support.bins
    if support.kind == "two_hot":
        width = (support.high - support.low) / (bins - 1)
        lower = min(int((value - support.low) / width), bins - 2)
        share = (value - support.low) / width - lower
        return [1.0 - share if k == lower else share if k == lower + 1 else 0.0 for k in range(bins)]
    width = (support.high - support.low) / bins
    sigma = 0.75 * width if support.sigma is None else support.sigma
    below = [normal_cdf(support.low + k * width, value, sigma) for k in range(bins + 1)]
    return [(b - a) / (below[-1] - below[0]) for a, b in pairwise(below)]


def returns_for(support):
    generator = torch.Generator().manual_seed(support.bins)
    inside = support.low + (support.high - support.low) * torch.rand(40, generator=generator, dtype=torch.float64)
    return torch.cat([inside, torch.tensor([support.low, support.high, -1e9, 1e9, math.inf, -math.inf]).double()])


@pytest.mark.parametrize("support", SUPPORTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_targets_are_those_of_the_twin(support, dtype):
    returns = returns_for(support).to(dtype)
    target = support.target(returns.reshape(2, -1)).reshape(-1, support.bins)
    assert target.dtype == torch.float32
    expected = torch.tensor([twin(support, value) for value in returns.double().tolist()], dtype=torch.float64)
    torch.testing.assert_close(target.double(), expected, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(target.double(), expected.roll(1, dims=-1), atol=1e-3), "a shift would be noticed"
    torch.testing.assert_close(target.sum(-1), torch.ones(len(returns)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_a_return_outside_the_support_is_the_nearest_end(support):
    ends = support.target(torch.tensor([support.low, support.high]))
    assert torch.equal(support.target(torch.tensor([support.low - 3.0, support.high + 0.1])), ends)
    assert not torch.equal(ends[0], ends[1])


def test_two_hot_gives_the_return_back_as_its_expectation():
    support = Support(-1.0, 1.0, 51, kind="two_hot")
    returns = torch.rand(100, generator=torch.Generator().manual_seed(1)) * 2 - 1
    torch.testing.assert_close(support.target(returns) @ support.centers(), returns, rtol=0, atol=1e-6)


def test_hl_gauss_gives_the_return_back_away_from_the_ends():
    support = Support(-1.0, 1.0, 51)
    returns = torch.rand(100, generator=torch.Generator().manual_seed(2)) * 1.6 - 0.8
    torch.testing.assert_close(support.target(returns) @ support.centers(), returns, rtol=0, atol=1e-4)
    assert (support.target(torch.tensor([1.0])) @ support.centers()).item() < 0.99, "at the end it is pulled inwards"


def test_centers_are_in_the_middle_of_bins_or_reach_the_ends():
    assert Support(0.0, 1.0, 4).centers().tolist() == [0.125, 0.375, 0.625, 0.875]
    assert Support(0.0, 1.0, 5, kind="two_hot").centers().tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("kind", ["hl_gauss", "two_hot"])
def test_a_return_that_is_no_number_gives_a_target_that_says_so(kind):
    target = Support(-1.0, 1.0, 5, kind=kind).target(torch.tensor([math.nan, 0.25]))
    assert target[0].isnan().all()
    assert target[1].isfinite().all()


def test_cross_entropy_is_the_twin_s_and_has_its_gradient():
    torch.manual_seed(3)
    support, returns = SUPPORTS[1], torch.randn(4, 6)
    logits = torch.randn(4, 6, 7, requires_grad=True)
    loss = support.cross_entropy(logits, returns)
    target = torch.tensor([twin(support, value) for value in returns.double().flatten().tolist()]).reshape(4, 6, 7)
    expected = -(target.double() * logits.detach().double().log_softmax(-1)).sum(-1)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    loss.sum().backward()
    torch.testing.assert_close(logits.grad, logits.detach().softmax(-1) - target.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("logits", "returns"), [((3, 6), (3,)), ((3, 7), (4,)), ((7,), (1,)), ((3, 7), (3, 1))])
def test_logits_and_returns_that_do_not_belong_together_are_refused(logits, returns):
    with pytest.raises(HeadError, match=r"logits: expected \[.*7\] for returns"):
        SUPPORTS[1].cross_entropy(torch.zeros(logits), torch.zeros(returns))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((1.0, 1.0, 5), "low, high: expected low below high"),
        ((2.0, 1.0, 5), "low, high: expected low below high"),
        ((math.nan, 1.0, 5), "low: expected a finite number"),
        ((0.0, math.inf, 5), "high: expected a finite number"),
        ((0.0, 10**400, 5), "high: expected a finite number"),
        (("0", 1.0, 5), "low: expected a finite number"),
        ((False, 1.0, 5), "low: expected a finite number"),
        ((0.0, 1.0, 1), "bins: expected an integer from 2"),
        ((0.0, 1.0, 5.0), "bins: expected an integer from 2"),
        ((0.0, 1.0, True), "bins: expected an integer from 2"),
        ((0.0, 1.0, 10**400), "bins: expected an integer from 2"),
        ((1e8, 1e8 + 1, 50), "bins: expected bins that float32 can tell apart"),
        ((0.0, 1.0, 5, "gauss"), "kind: expected one of hl_gauss, two_hot"),
        ((0.0, 1.0, 5, ["hl_gauss"]), "kind: expected one of hl_gauss, two_hot"),
        ((0.0, 1.0, 5, "two_hot", 0.1), "sigma: expected None for two_hot"),
        ((0.0, 1.0, 5, "hl_gauss", 0.0), "sigma: expected a number above 0"),
        ((0.0, 1.0, 5, "hl_gauss", 1.5), "sigma: expected a number above 0 and at most"),
        ((0.0, 1.0, 5, "hl_gauss", math.nan), "sigma: expected a finite number"),
    ],
)
def test_what_is_no_support_is_refused(arguments, word):
    with pytest.raises(HeadError, match=f"support: {word}"):
        Support(*arguments)


def test_settings_go_through_json_and_numpy_s_numbers_become_python_s():
    support = Support(np.float32(-0.5), np.int64(2), np.int32(9), sigma=np.float64(0.25))
    again = Support.from_settings(json.loads(json.dumps(support.settings())), "a file")
    assert again == support == pickle.loads(pickle.dumps(support))
    assert hash(again) == hash(support)
    assert Support(-0.5, 2, 9) != support


@pytest.mark.parametrize(
    "settings",
    [None, [], "support", {}, {"low": 0, "high": 1, "bins": 3}, {**SUPPORTS[0].settings(), "more": 1}],
)
def test_settings_of_another_form_are_refused_with_their_source(settings):
    with pytest.raises(HeadError, match=r"a file: expected an object with bins, high, kind, low"):
        Support.from_settings(settings, "a file")


def test_settings_with_a_wrong_number_are_refused_with_their_source():
    with pytest.raises(HeadError, match="a file: support: bins: expected an integer"):
        Support.from_settings({**SUPPORTS[0].settings(), "bins": "51"}, "a file")
