"""The guess at a cause: right for real pairs of each one, for several seeds, and silent where no cause is there."""

import re
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from tests.report.pairs import Pair, Policy
from vhead.report import Cause, compare

SEEDS = (("gpt2", 0), ("gpt2", 1), ("llama", 2), ("llama", 3))


@cache
def policy_of(architecture: str, seed: int) -> Policy:
    return Policy(seed, architecture)


@pytest.fixture(params=SEEDS, ids=lambda param: f"{param[0]}-{param[1]}")
def policy(request: pytest.FixtureRequest) -> Policy:
    return policy_of(*request.param)


def cause_of(pair: Pair, *, entropy: bool = False) -> Cause:
    compared = compare(
        pair.ours,
        pair.theirs,
        offsets=pair.offsets,
        entropy=pair.entropy if entropy else None,
        prompt_lengths=pair.prompt_lengths,
    )
    assert compared.cause is not None
    return compared.cause


@pytest.mark.parametrize("temperature", [0.7, 0.9, 1.3])
@pytest.mark.parametrize("entropy", [True, False], ids=["with entropy", "without entropy"])
def test_another_temperature_is_named_and_estimated(policy: Policy, temperature: float, entropy: bool) -> None:
    cause = cause_of(policy.at_temperature(temperature), entropy=entropy)
    assert cause.name == "temperature"
    assert cause.temperature == pytest.approx(temperature, abs=0.01 if entropy else 0.06)
    assert f"{temperature:.2f} times" in cause.evidence or not entropy


@pytest.mark.parametrize("step", [1, -1])
def test_a_shift_by_one_token_is_named(policy: Policy, step: int) -> None:
    cause = cause_of(policy.shifted(step))
    assert cause.name == "shift"
    assert f"the token {'after' if step > 0 else 'before'} it" in cause.evidence


def test_left_padding_without_position_ids_is_named(policy: Policy) -> None:
    # Rotary positions are relative, so that only padding that is seen harms Llama.
    cause = cause_of(policy.padded(hidden=policy.model.config.model_type != "llama"))
    assert cause.name == "padding"
    # The longest of each of the twelve batches, and those that are as long.
    found = re.match(r"(\d+) of 96 rollouts are unharmed", cause.evidence)
    assert found
    assert 12 <= int(found[1]) <= 18


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("entropy", [True, False], ids=["with entropy", "without entropy"])
def test_a_shorter_dtype_is_named(policy: Policy, dtype: torch.dtype, entropy: bool) -> None:
    assert cause_of(policy.in_dtype(dtype), entropy=entropy).name == "dtype"


@pytest.mark.parametrize("size", [0.02, 0.05])
def test_other_weights_are_named(policy: Policy, size: float) -> None:
    assert cause_of(policy.perturbed(size)).name == "weights"
    assert cause_of(policy.perturbed(size), entropy=True).name == "weights"


@pytest.mark.parametrize("rate", [3e-4, 1e-3])
def test_weights_of_before_an_update_are_named(policy: Policy, rate: float) -> None:
    assert cause_of(policy.updated(rate)).name == "weights"


def test_identical_numbers_have_no_cause(policy: Policy) -> None:
    cause = cause_of(policy.pair(policy.ours))
    assert cause.name is None
    assert "The two agree" in cause.evidence


@pytest.mark.parametrize("size", [0.003, 0.03, 0.3, 1.0])
@pytest.mark.parametrize("capped", [False, True], ids=["any", "at most 0"])
def test_noise_has_no_cause(policy: Policy, size: float, capped: bool) -> None:
    for entropy in (True, False):
        cause = cause_of(policy.noisy(size, capped=capped), entropy=entropy)
        assert cause == Cause(None, "None of the known causes fits.")


def test_numbers_of_other_tokens_have_no_cause(policy: Policy) -> None:
    assert cause_of(policy.shuffled()).name is None
    assert cause_of(policy.shuffled(), entropy=True).name is None


def test_a_cause_is_seen_through_the_rounding_of_bfloat16(policy: Policy) -> None:
    rounding = policy.in_dtype(torch.bfloat16)
    for pair in (policy.at_temperature(0.7), policy.shifted(1)):
        both = replace(pair, theirs=pair.theirs + rounding.theirs - rounding.ours)
        assert cause_of(both).name == cause_of(pair).name


def test_a_few_tokens_are_not_enough_for_a_guess(policy: Policy) -> None:
    pair = policy.at_temperature(0.7)
    compared = compare(pair.ours[:100], pair.theirs[:100])
    assert compared.cause == Cause(None, "A guess needs 200 tokens, and here are 100.")


def test_masked_tokens_say_nothing_about_the_cause(policy: Policy) -> None:
    pair = policy.at_temperature(0.7)
    mask = np.random.default_rng(3).random(len(pair.ours)) < 0.6
    theirs = np.where(mask, pair.theirs, np.nan)
    compared = compare(pair.ours, theirs, offsets=pair.offsets, mask=mask, entropy=pair.entropy)
    assert compared.cause is not None
    assert compared.cause.name == "temperature"
