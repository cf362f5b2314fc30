"""A sample of architectures that packing, padding or the rule for logits could get wrong; by hand, all were tried."""

import numpy as np
import pytest

from tests.architectures.tiny import build
from tests.library_versions import need_architecture
from tests.scoring.scoring_models import largest_difference
from vhead import AutoModelForCausalLMWithValueHead, Rollout, Scorer
from vhead.scoring.fields import FIELDS

TOLERANCE = 1e-4
# With the width of the windows where a model has some: the tiny ones see four tokens, which rules sharing out where
# attention is not told of them.
SAMPLE = [
    ("codegen", {}),
    ("cpmant", {}),
    ("deepseek_v3", {}),
    ("falcon", {}),
    ("gemma3_text", {"sliding_window": 64}),
    ("glm_moe_dsa", {}),
    ("gpt_neox", {}),
    ("gpt_oss", {"sliding_window": 64}),
    ("mistral", {}),
    ("modernbert-decoder", {}),
    ("mpt", {}),
    ("olmo3", {}),
    ("prophetnet", {}),
    ("qwen3_moe", {}),
    ("qwen3_next", {}),
    ("reformer", {}),
    ("rwkv", {}),
]


def records():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(2):
        prompt = rng.integers(3, 90, int(rng.integers(9, 20)))
        tails = [rng.integers(3, 90, int(rng.integers(1, 15))) for _ in range(3)]
        found += [Rollout(prompt, tail) for tail in (*tails[:2], np.concatenate(tails))]
    return [Rollout(found[at].prompt, found[at].completion, id=int(at)) for at in rng.permutation(len(found))]


@pytest.mark.parametrize(("model_type", "overrides"), SAMPLE, ids=[name for name, _ in SAMPLE])
def test_every_field_equals_one_rollout_at_a_time(model_type, overrides):
    need_architecture(model_type)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(build(model_type, **overrides)).eval()
    for batch_invariant in (False, True):
        scores = Scorer(model, batch_invariant=batch_invariant).score(records(), FIELDS)
        assert len(scores) == len(records())
        for record, score in zip(records(), scores, strict=True):
            assert largest_difference(model, record, score) < TOLERANCE, str(Scorer(model).plan)
