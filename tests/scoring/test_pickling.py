"""A scorer is sent to another process."""

import pickle

import numpy as np
import pytest

from tests.rollouts.tokenizers_for_tests import VOCABULARY, byte_level
from tests.scoring.scoring_models import critic, trees
from vhead import Rollout, Scorer
from vhead.scoring import Conventions
from vhead.scoring.fields import FIELDS


def sent(scorer):
    return pickle.loads(pickle.dumps(scorer))


@pytest.mark.parametrize("has_scored", [False, True], ids=["new", "used"])
@pytest.mark.parametrize("architecture", ["llama", "gpt_neo", "mamba"])
def test_the_copy_gives_the_same_scores(architecture, has_scored):
    """Patches of layers and attention that last as long as a batch must not go with it."""
    scorer = Scorer(critic(architecture))
    if has_scored:
        scorer.score(trees(), FIELDS)
    copy = sent(scorer)
    assert str(copy.plan) == str(scorer.plan)
    for name in FIELDS:
        np.testing.assert_array_equal(
            getattr(copy.score(trees(), FIELDS), name), getattr(scorer.score(trees(), FIELDS), name)
        )


def test_the_tokenizer_and_every_option_go_along():
    options = {
        "token_budget": 77,
        "chunk_tokens": 99,
        "num_threads": 1,
        "conventions": Conventions(reward_mean=0.5),
        "truncation": "completion",
        "max_length": 5,
        "append_eos": True,
    }
    scorer = Scorer(critic(vocab_size=VOCABULARY + 4), byte_level(), **options)
    copy = sent(scorer)
    assert copy._arguments.items() >= options.items()
    assert copy.token_budget == 77
    rollouts = [Rollout("hello ", "world"), Rollout("The value of ", "a state is what it is worth.")]
    returns = ("values", "reward", "tokens")
    for one, other in zip(copy.score(rollouts, returns), scorer.score(rollouts, returns), strict=True):
        assert one.truncated == other.truncated
        assert one.reward == other.reward
        np.testing.assert_array_equal(one.token_ids, other.token_ids)


def test_a_scorer_says_what_it_is():
    scorer = Scorer(critic(), token_budget=100)
    assert repr(scorer) == f"Scorer(LlamaForCausalLM on cpu, {scorer.plan.strategy}, token_budget=100)"


def test_a_head_that_was_put_in_goes_along():
    heads = [critic().v_head for _ in range(2)]
    heads[1].initialize("normal")
    scorer = Scorer(critic()).with_head(heads[1])
    copy = sent(scorer)
    np.testing.assert_array_equal(copy.score(trees(), ("values",)).values, scorer.score(trees(), ("values",)).values)
    assert not np.array_equal(
        copy.score(trees(), ("values",)).values, Scorer(critic()).score(trees(), ("values",)).values
    )
