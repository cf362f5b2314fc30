"""Metrics of uneven batches, combined, are those of all their tokens at once; means of them are not."""

import copy
import itertools
import math
import pickle

import pytest
import torch

from vhead import losses

QUANTILES = {"ratio_p01", "ratio_median", "ratio_p99"}
# Two batches without any token of the model's among them.
BOUNDS = [0, 40, 40, 47, 52, 300, 301]


@pytest.fixture
def arrays():
    generator = torch.Generator().manual_seed(3)
    names = ("logprobs", "old_logprobs", "advantages", "values", "returns", "old_values")
    found = {name: torch.randn(301, generator=generator) for name in names}
    # Later tokens differ from earlier ones, so that batches do too.
    found["returns"] = found["returns"] * torch.linspace(0.1, 5, 301) + 1000 + torch.linspace(0, 9, 301)
    found["values"] += found["returns"]
    found["old_values"] = found["values"] + 0.3 * found["old_values"]
    found["logprobs"] = found["old_logprobs"] + torch.linspace(0, 0.5, 301) * found["logprobs"]
    found["mask"] = torch.rand(301, generator=generator) < 0.7
    found["mask"][47:52] = False
    return found


def policy(arrays):
    names = ("logprobs", "old_logprobs", "advantages")
    return losses.policy_metrics(*(arrays[n] for n in names), mask=arrays["mask"], clip=(0.2, 0.28))


def value(arrays):
    old = arrays["old_values"]
    return losses.value_metrics(arrays["values"], arrays["returns"], old_values=old, clip=0.2, mask=arrays["mask"])


def batches(arrays):
    pairs = itertools.pairwise(BOUNDS)
    return [{name: array[start:stop] for name, array in arrays.items()} for start, stop in pairs]


@pytest.mark.parametrize("metrics", [policy, value])
class TestCombined:
    def test_uneven_batches_give_what_all_tokens_give(self, arrays, metrics):
        whole = metrics(arrays)
        found = losses.combined_metrics(metrics(batch) for batch in batches(arrays))
        assert found.keys() == whole.keys() - QUANTILES
        for name, number in found.items():
            assert number == pytest.approx(whole[name], rel=1e-9), name
        assert found.tokens == whole.tokens == int(arrays["mask"].sum())

    def test_means_of_batches_are_other_numbers(self, arrays, metrics):
        whole, parts = metrics(arrays), [metrics(batch) for batch in batches(arrays)]
        filled = [part for part in parts if part.tokens]
        for name in whole.keys() - QUANTILES:
            mean = sum(part[name] for part in filled) / len(filled)
            assert abs(mean - whole[name]) > 1e-5 * abs(whole[name]), name

    def test_what_is_combined_can_be_combined_again_and_copied(self, arrays, metrics):
        parts = [metrics(batch) for batch in batches(arrays)]
        halves = [losses.combined_metrics(parts[:2]), losses.combined_metrics(parts[2:])]
        expected = pytest.approx(dict(losses.combined_metrics(parts)), rel=1e-9)
        for copied in (halves, pickle.loads(pickle.dumps(halves)), copy.deepcopy(halves)):
            assert dict(losses.combined_metrics(copied)) == expected

    def test_a_copy_has_what_was_added_and_taken_away(self, arrays, metrics):
        found = metrics(arrays)
        found["learning_rate"] = 0.5
        del found[next(iter(found))]
        assert list(pickle.loads(pickle.dumps(found)).items()) == list(found.items())

    def test_no_tokens_at_all_are_nan(self, arrays, metrics):
        nothing = metrics(batches(arrays)[1])
        found = losses.combined_metrics([nothing, nothing])
        assert found.tokens == 0
        assert found
        assert all(map(math.isnan, found.values()))

    def test_a_number_that_is_nan_is_not_hidden(self, arrays, metrics):
        first, *others = batches(arrays)
        first["logprobs"][first["mask"].nonzero()[0]] = math.nan
        first["values"][first["mask"].nonzero()[0]] = math.nan
        found = losses.combined_metrics(map(metrics, [*others, first]))
        names = ("kl_k1", "ratio_max") if metrics is policy else ("value_mean", "explained_variance")
        assert all(math.isnan(found[name]) for name in names)

    def test_a_plain_dict_is_refused(self, arrays, metrics):
        with pytest.raises(
            TypeError, match="parts: expected what policy_metrics or value_metrics gave, got a dict at 1"
        ):
            losses.combined_metrics([metrics(arrays), {**metrics(arrays)}])


@pytest.mark.parametrize("number", [0.1, 1e6 / 3, -7.3])
def test_returns_that_do_not_vary_have_no_explained_variance_however_they_are_divided(number):
    returns = torch.full((1000,), number, dtype=torch.float64)
    values = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parts = [
        losses.value_metrics(values[start:stop], returns[start:stop]) for start, stop in ((0, 7), (7, 500), (500, 1000))
    ]
    assert math.isnan(losses.combined_metrics(parts)["explained_variance"])
    returns[3] += 1e-6 * number
    assert not math.isnan(losses.value_metrics(values, returns)["explained_variance"])


def test_metrics_of_different_things_are_refused(arrays):
    with pytest.raises(
        ValueError, match=r"parts: expected metrics of clipped, .*, as the first has, got error, .* at 1"
    ):
        losses.combined_metrics([policy(arrays), value(arrays)])
    with pytest.raises(ValueError, match="parts: expected the metrics of at least one batch, got none"):
        losses.combined_metrics([])
