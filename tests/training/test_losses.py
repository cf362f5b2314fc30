"""Losses against plain loops in float64, with masks that hide nonsense, and what they refuse."""

import itertools
import math

import pytest
import torch

from vhead import Support, losses
from vhead.training import Totals

LENGTHS = [3, 1, 6, 4]
OFFSETS = [0, 3, 4, 10, 14]


@pytest.fixture
def arrays():
    generator = torch.Generator().manual_seed(1)
    names = ("logprobs", "old_logprobs", "advantages", "values", "returns", "old_values")
    found = {name: torch.randn(sum(LENGTHS), generator=generator) for name in names}
    found["mask"] = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1]).bool()
    return found


def of_sequences(arrays, one):
    """What a plain loop gives for each token, sequence by sequence, masked ones left out."""
    rows = []
    for start, stop in itertools.pairwise(OFFSETS):
        tokens = [at for at in range(start, stop) if arrays["mask"][at]]
        rows.append([one({name: array[at].item() for name, array in arrays.items()}) for at in tokens])
    return rows


def mean(numbers):
    numbers = list(numbers)
    return sum(numbers) / len(numbers)


AGGREGATED = {
    "token-mean": lambda rows: mean(loss for row in rows for loss in row),
    "seq-mean-token-sum": lambda rows: mean(sum(row) for row in rows),
    "seq-mean-token-mean": lambda rows: mean(mean(row) for row in rows),
    "seq-mean-token-sum-norm": lambda rows: mean(sum(row) / 8 for row in rows),
}


def clipped(token, low=0.2, high=0.28, dual=None):
    ratio = math.exp(token["logprobs"] - token["old_logprobs"])
    gain = token["advantages"]
    loss = max(-gain * ratio, -gain * min(max(ratio, 1 - low), 1 + high))
    return min(loss, -gain * dual) if dual is not None and gain < 0 else loss


def spoilt(arrays):
    """The same with NaN wherever the mask hides it."""
    return {n: a if n == "mask" else a.masked_fill(~arrays["mask"], math.nan) for n, a in arrays.items()}


class TestPolicy:
    @pytest.mark.parametrize("agg", AGGREGATED)
    @pytest.mark.parametrize("dual", [None, 1.5])
    def test_a_plain_loop_gives_the_same(self, arrays, agg, dual):
        expected = AGGREGATED[agg](of_sequences(arrays, lambda token: clipped(token, dual=dual)))
        given = spoilt(arrays)
        found = losses.policy(
            given["logprobs"],
            given["old_logprobs"],
            given["advantages"],
            mask=given["mask"],
            clip=(0.2, 0.28),
            dual_clip=dual,
            agg=agg,
            offsets=OFFSETS,
            norm=8 if agg.endswith("norm") else None,
        )
        assert found.item() == pytest.approx(expected, rel=1e-5)

    def test_padded_arrays_give_what_flat_ones_give(self, arrays):
        names = ("logprobs", "old_logprobs", "advantages", "mask")
        padded = {n: torch.nn.utils.rnn.pad_sequence(arrays[n].split(LENGTHS), batch_first=True) for n in names}
        mask, flat_mask = padded.pop("mask"), arrays["mask"]
        for agg in ("token-mean", "seq-mean-token-mean"):
            flat = losses.policy(*(arrays[n] for n in names[:3]), mask=flat_mask, agg=agg, offsets=OFFSETS)
            assert losses.policy(*padded.values(), mask=mask, agg=agg).item() == pytest.approx(flat.item(), rel=1e-5)

    def test_masked_tokens_and_ratios_that_gain_nothing_more_get_no_gradient(self, arrays):
        logprobs = spoilt(arrays)["logprobs"].requires_grad_()
        others = (arrays["old_logprobs"], arrays["advantages"])
        losses.policy(logprobs, *others, mask=arrays["mask"]).backward()
        ratio = (arrays["logprobs"] - arrays["old_logprobs"]).exp()
        gains = torch.where(arrays["advantages"] > 0, ratio < 1.2, ratio > 0.8) & arrays["mask"]
        assert torch.equal(logprobs.grad != 0, gains)
        assert 0 < gains.sum() < arrays["mask"].sum()

    def test_a_ratio_beyond_any_number_is_finite(self):
        logprobs = torch.tensor([0.0, -900.0], requires_grad=True)
        loss = losses.policy(logprobs, torch.tensor([-900.0, 0.0]), torch.tensor([-1.0, 1.0]))
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(logprobs.grad).all()

    def test_batches_of_a_step_add_up_to_the_mean_over_all_of_them(self, arrays):
        names, totals = ("logprobs", "old_logprobs", "advantages"), Totals(int(arrays["mask"].sum()), 4)
        for agg in ("token-mean", "seq-mean-token-sum"):
            whole = losses.policy(*(arrays[n] for n in names), mask=arrays["mask"], agg=agg, offsets=OFFSETS)
            parts = [
                losses.policy(
                    *(arrays[n][start:stop] for n in names),
                    mask=arrays["mask"][start:stop],
                    agg=agg,
                    offsets=bounds,
                    totals=totals,
                )
                for start, stop, bounds in ((0, 4, [0, 3, 4]), (4, 14, [0, 6, 10]))
            ]
            assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-5)
            doubled = losses.policy(
                *(arrays[n] for n in names),
                mask=arrays["mask"],
                agg=agg,
                offsets=OFFSETS,
                totals=Totals(totals.tokens, 4, 2),
            )
            assert doubled.item() == pytest.approx(2 * whole.item(), rel=1e-5)

    def test_metrics_are_those_of_a_plain_loop(self, arrays):
        names = ("logprobs", "old_logprobs", "advantages")
        given = {name: array.requires_grad_() if name == "logprobs" else array for name, array in arrays.items()}
        found = losses.policy_metrics(*(given[n] for n in names), mask=given["mask"], clip=(0.2, 0.28))
        tokens = [token for row in of_sequences(arrays, dict) for token in row]
        ratios = [math.exp(token["logprobs"] - token["old_logprobs"]) for token in tokens]
        gains = [token["advantages"] for token in tokens]
        clipped_share = mean(r > 1.28 if a >= 0 else r < 0.8 for r, a in zip(ratios, gains, strict=True))
        assert found["clip_fraction"] == pytest.approx(clipped_share)
        assert found["kl_k1"] == pytest.approx(-mean(map(math.log, ratios)), rel=1e-5)
        assert found["kl_k3"] == pytest.approx(mean(r - 1 - math.log(r) for r in ratios), rel=1e-5)
        assert found["ratio_max"] == pytest.approx(max(ratios), rel=1e-5)
        assert found["ratio_p01"] < found["ratio_median"] < found["ratio_p99"]
        assert {type(number) for number in found.values()} == {float}


class TestValue:
    @pytest.mark.parametrize("clip", [None, 0.4])
    def test_a_plain_loop_gives_the_same(self, arrays, clip):
        def one(token):
            v, old, wanted = token["values"], token["old_values"], token["returns"]
            near = v if clip is None else old + min(max(v - old, -clip), clip)
            return 0.5 * max((v - wanted) ** 2, (near - wanted) ** 2)

        given = spoilt(arrays)
        found = losses.value(
            given["values"], given["returns"], old_values=given["old_values"], clip=clip, mask=given["mask"]
        )
        assert found.item() == pytest.approx(mean(x for row in of_sequences(arrays, one) for x in row), rel=1e-5)

    def test_metrics(self, arrays):
        given = spoilt(arrays)
        found = losses.value_metrics(
            given["values"], given["returns"], old_values=given["old_values"], clip=0.4, mask=given["mask"]
        )
        values, returns = (arrays[n][arrays["mask"]].double() for n in ("values", "returns"))
        expected = 1 - (returns - values).var(correction=0) / returns.var(correction=0)
        assert found["explained_variance"] == pytest.approx(expected.item())
        moved = (values - arrays["old_values"][arrays["mask"]]).abs() > 0.4
        assert found["value_clip_fraction"] == pytest.approx(moved.double().mean().item())
        same = losses.value_metrics(arrays["values"], torch.ones(14))
        assert math.isnan(same["explained_variance"])

    def test_distributional_is_the_support_s_cross_entropy(self, arrays):
        support = Support(-3.0, 3.0, 11)
        logits = torch.randn(14, 11, generator=torch.Generator().manual_seed(2))
        found = losses.distributional(logits, spoilt(arrays)["returns"], support, mask=arrays["mask"])
        assert found.item() == pytest.approx(
            support.cross_entropy(logits, arrays["returns"])[arrays["mask"]].mean().item(), rel=1e-5
        )


@pytest.mark.parametrize(
    ("kind", "one"),
    [
        ("k1", lambda d: d),
        ("k2", lambda d: d * d / 2),
        ("k3", lambda d: math.exp(-d) - 1 + d),
        ("abs", abs),
    ],
)
def test_divergences_and_entropies_are_means_over_the_model_s_tokens(arrays, kind, one):
    rows = of_sequences(arrays, lambda token: one(token["logprobs"] - token["old_logprobs"]))
    given = spoilt(arrays)
    found = losses.kl(given["logprobs"], given["old_logprobs"], kind=kind, mask=given["mask"])
    assert found.item() == pytest.approx(mean(x for row in rows for x in row), rel=1e-4)
    found = losses.entropy(given["values"], mask=given["mask"])
    assert found.item() == pytest.approx(arrays["values"][arrays["mask"]].mean().item(), rel=1e-5)


class TestBadInput:
    def test_old_log_probabilities_of_another_length(self, arrays):
        with pytest.raises(ValueError, match=r"old_logprobs: expected \[14\], as logprobs, got \[13\]"):
            losses.policy(arrays["logprobs"], arrays["old_logprobs"][1:], arrays["advantages"])

    def test_a_mask_without_any_token(self, arrays):
        nothing = torch.zeros(14, dtype=torch.bool)
        with pytest.raises(ValueError, match="mask: expected a token of the model's, got none"):
            losses.value(arrays["values"], arrays["returns"], mask=nothing)
        loss = losses.value(arrays["values"].requires_grad_(), arrays["returns"], mask=nothing, totals=Totals(5, 2))
        loss.backward()
        assert loss.item() == 0.0
        assert not arrays["values"].grad.any()

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"clip": (1.2, 0.2)}, "clip: expected how far below 1"),
            ({"clip": (0.2, 0.2, 0.3)}, r"clip: expected how far below 1, .* got \(0.2, 0.2, 0.3\)"),
            ({"clip": None}, "clip: expected how far below 1, .* got None"),
            ({"clip": "0.2"}, "clip: expected how far below 1, .* got '0.2'"),
            ({"dual_clip": 0.5}, "dual_clip: expected a number above 1, got 0.5"),
            ({"agg": "mean"}, "agg: expected one of token-mean"),
            ({"agg": "seq-mean-token-sum"}, "offsets: expected them beside flat arrays"),
            ({"agg": "seq-mean-token-sum", "offsets": [0, 3]}, "offsets: expected rising numbers from 0 to 14"),
            ({"norm": 3.0}, "norm: expected a number above 0 with seq-mean-token-sum-norm alone"),
        ],
    )
    def test_settings_that_do_not_fit(self, arrays, changed, message):
        with pytest.raises(ValueError, match=message):
            losses.policy(arrays["logprobs"], arrays["old_logprobs"], arrays["advantages"], **changed)

    def test_a_mask_of_numbers(self, arrays):
        with pytest.raises(TypeError, match=r"mask: expected a bool tensor, got torch\.float32"):
            losses.value(arrays["values"], arrays["returns"], mask=torch.ones(14))

    def test_several_outputs_under_a_mask_of_tokens(self, arrays):
        two = torch.stack([arrays["values"], arrays["values"]], dim=1)
        with pytest.raises(ValueError, match=r"mask: expected \[14, 2\], as values, got \[14\]; .* values\[:, k\]"):
            losses.value(two, torch.zeros_like(two), mask=arrays["mask"])

    def test_a_clip_without_old_values(self, arrays):
        with pytest.raises(ValueError, match="clip: expected a number above 0 beside old_values"):
            losses.value(arrays["values"], arrays["returns"], clip=0.2)
