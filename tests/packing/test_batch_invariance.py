"""Bit for bit the same numbers, whatever else is scored."""

import numpy as np
import pytest
import torch

from tests.scoring.scoring_models import critic, rollouts, trees, worst
from vhead import Rollout, Scorer
from vhead.scoring.fields import FIELDS

TOLERANCE = 1e-4


def bits(score):
    return [getattr(score, name).tobytes() for name in ("values", "logprobs", "entropy")] + [score.reward]


def settings_that_change_rounding():
    """Wide enough for kernels that split their work by shape."""
    return {"hidden_size": 128, "intermediate_size": 352, "vocab_size": 1031, "max_position_embeddings": 256}


@pytest.fixture(scope="module")
def model():
    return critic("llama", **settings_that_change_rounding())


@pytest.fixture(scope="module")
def records():
    return [*trees(prompts=4, completions=4), *rollouts(8, seed=3, longest=60)]


def compositions(records):
    """The same rollouts among different others, in different orders."""
    half = len(records) // 2
    return [records, records[::-1], records[:half], records[half:], *([record] for record in records[:6])]


def distinct_results(scorer, records, compositions):
    seen = {record.id: set() for record in records}
    for composition in compositions:
        for score in scorer.score(composition, FIELDS):
            seen[score.id].add(tuple(bits(score)))
    return [len(results) for results in seen.values()]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mamba", "bloom"])
def test_the_same_bits_in_any_company(architecture, records, model):
    model = model if architecture == "llama" else critic(architecture)
    records = [Rollout(r.prompt, r.completion[: 60 - len(r.prompt)], id=r.id) for r in records if len(r.prompt) < 55]
    scorer = Scorer(model, batch_invariant=True)
    assert set(distinct_results(scorer, records, compositions(records))) == {1}
    assert worst(model, records, scorer.score(records, FIELDS)) < TOLERANCE


def test_without_it_the_company_shows(model, records):
    scorer = Scorer(model)
    assert max(distinct_results(scorer, records, compositions(records))) > 1


def test_the_stream_s_chunks_do_not_show(model, records):
    small = Scorer(model, batch_invariant=True, token_budget=20, chunk_tokens=70)
    large = Scorer(model, batch_invariant=True)
    for one, other in zip(small.stream(records, FIELDS), large.stream(records, FIELDS), strict=True):
        assert bits(one) == bits(other)


def test_a_prompt_is_computed_once_for_its_completions(model):
    shapes = []
    scorer = Scorer(model, batch_invariant=True)
    handle = model.pretrained_model.model.embed_tokens.register_forward_hook(
        lambda _m, args, _o: shapes.append(tuple(args[0].shape))
    )
    try:
        scorer.score([Rollout([5] * 9, [6] * length) for length in (2, 3, 4)], FIELDS)
    finally:
        handle.remove()
    assert shapes == [(1, 9), (1, 2), (1, 3), (1, 4)]


def test_a_prompt_counts_once_among_the_computed_tokens(model):
    records = [Rollout([5] * 20, [7, index]) for index in range(8, 13)]
    counted = []
    scorer = Scorer(model, batch_invariant=True)
    list(scorer.chunks(records, ["values"], on_batch=lambda *counts: counted.append(counts)))
    assert counted == [(1, 22, 22), *[(1, 22, 2)] * 4]


def test_new_weights_count_at_once(model):
    own = critic("llama", **settings_that_change_rounding())
    scorer = Scorer(own, batch_invariant=True)
    records = [Rollout([5] * 9, [6, 7, 8])]
    scorer.score(records, FIELDS)
    with torch.no_grad():
        own.pretrained_model.model.embed_tokens.weight.mul_(-0.5)
    assert worst(own, records, scorer.score(records, FIELDS)) < TOLERANCE


def test_the_plan_says_so(model):
    assert "batch-invariant" in str(Scorer(model, batch_invariant=True).plan)
    assert Scorer(critic("mamba"), batch_invariant=True).plan.strategy == "one sequence at a time"


def test_duplicates_share_nothing_but_their_numbers(model):
    scores = Scorer(model, batch_invariant=True).score([Rollout([5] * 9, [6, 7], id=at) for at in range(3)], FIELDS)
    assert len({tuple(bits(score)) for score in scores}) == 1
    assert np.isfinite(scores.values).all()
