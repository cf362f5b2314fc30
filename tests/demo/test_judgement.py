"""Reading scores: where a byte's value belongs, bits per byte, and the area under the ROC curve."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhead import Score
from vhead.demo.judgement import auc, corrupted_characters, judge
from vhead.demo.rollouts import NATURAL, DemoRollout
from vhead.errors import MissingFieldError

FEW_LEVELS = st.lists(st.integers(-3, 3), min_size=1, max_size=20)


@pytest.fixture
def rollout() -> DemoRollout:
    return DemoRollout("some/id", "some", "A ", "né→", "kind", NATURAL, (1, 2), "PSF-2.0")


def score(count: int, **changes: object) -> SimpleNamespace:
    values = np.arange(10, 10 + count, dtype=np.float32)
    return SimpleNamespace(**{"values": values, "logprobs": -values * math.log(2), "reward": 99.0} | changes)


def test_a_character_has_the_value_after_its_last_byte(rollout: DemoRollout) -> None:
    # One, two and three bytes: after byte 0 stands values[1], after byte 2 values[3], after the last the reward.
    judged = judge(rollout, score(6))
    assert judged.values.tolist() == [11.0, 13.0, 99.0]
    assert judged.reward == 99.0
    assert judged.bits_per_byte == pytest.approx(12.5)


def test_another_tokenizer_is_an_error(rollout: DemoRollout) -> None:
    with pytest.raises(ValueError, match=r"^some/id: expected 6 tokens, one per byte, got 3$"):
        judge(rollout, score(3))


@pytest.mark.parametrize("field", ["values", "logprobs", "reward"])
def test_a_missing_field_is_an_error(rollout: DemoRollout, field: str) -> None:
    computed = {name: value for name, value in vars(score(6)).items() if name != field}
    with pytest.raises(MissingFieldError, match=f"^{field}: expected one of the fields that were computed"):
        judge(rollout, Score(0, "r", 2, computed))


def test_the_span_counts_characters(rollout: DemoRollout) -> None:
    assert corrupted_characters(rollout).tolist() == [False, True, False]
    assert not corrupted_characters(dataclasses.replace(rollout, span=(0, 0))).any()


@given(FEW_LEVELS, FEW_LEVELS)
def test_auc_counts_pairs(positive: list[int], negative: list[int]) -> None:
    pairs = [(p > n) + (p == n) / 2 for p in positive for n in negative]
    assert auc(positive, negative) == pytest.approx(sum(pairs) / len(pairs))
