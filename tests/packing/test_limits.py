"""The lengths that a model really takes: the longest rollout is scored, and one with one more token is refused."""

import dataclasses

import numpy as np
import pytest
import torch

from tests.architectures.tiny import build
from tests.library_versions import need_architecture
from tests.scoring.scoring_models import CONTEXT, critic, largest_difference
from vhead import AutoModelForCausalLMWithValueHead, Rollout, Scorer
from vhead.errors import FieldError
from vhead.packing import limits
from vhead.scoring.fields import FIELDS

TOLERANCE = 1e-4

# Tiny models whose stated length is 64, and what they take: positions begin behind the padding's, at 2 where it is 1.
TAKEN = {
    "camembert": 62,
    "data2vec-text": 62,
    "roberta": 62,
    "roberta-prelayernorm": 62,
    "xlm-roberta": 62,
    "xlm-roberta-xl": 62,
    "xmod": 62,
    # Its second stream reads the position after each token's.
    "prophetnet": 61,
    "bert": 64,
    "mpt": 64,
    "opt": 64,
    "whisper": 64,
}
SCALED = {"rope_theta": 10000.0, "factor": 4.0}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def rollout_of(length: int) -> Rollout:
    tokens = np.random.default_rng(length).integers(3, 90, length)
    return Rollout(tokens[: length // 2], tokens[length // 2 :])


def scaled(kind: str, **settings: object):
    """A Llama of the scoring tests with scaled rotary embeddings, as older and newer transformers name them."""
    rotary = SCALED | {"rope_type": kind} | (LLAMA3 if kind == "llama3" else {})
    rotary |= {name: settings.pop(name) for name in list(settings) if name not in ("max_position_embeddings",)}
    return critic("llama", rope_parameters=dict(rotary), rope_scaling=dict(rotary), **settings)


@pytest.mark.parametrize("model_type", TAKEN)
def test_the_longest_rollout_of_a_model_with_a_table_of_positions_is_scored_and_a_longer_one_refused(model_type):
    need_architecture(model_type)
    padding = {} if model_type in ("mpt", "whisper") else {"pad_token_id": 1}
    model = AutoModelForCausalLMWithValueHead.from_pretrained(build(model_type, **padding)).eval()
    taken = TAKEN[model_type]
    scorer = Scorer(model)
    (score,) = scorer.score([rollout_of(taken)], FIELDS)
    assert largest_difference(model, rollout_of(taken), score) < TOLERANCE
    with pytest.raises(FieldError, match=f"at most the model's {taken} tokens"):
        scorer.score([rollout_of(taken + 1)])
    with pytest.raises((IndexError, RuntimeError)), torch.no_grad():
        model(torch.from_numpy(rollout_of(taken + 1).prompt.repeat(3)[None, : taken + 1]))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("yarn", {"original_max_position_embeddings": CONTEXT}),
        ("yarn", {"original_max_position_embeddings": CONTEXT, "max_position_embeddings": 80}),
        ("yarn", {"original_max_position_embeddings": CONTEXT, "max_position_embeddings": 256}),
        ("linear", {}),
        ("dynamic", {}),
        ("dynamic", {"original_max_position_embeddings": CONTEXT}),
        ("llama3", {"original_max_position_embeddings": CONTEXT, "max_position_embeddings": 80}),
        ("llama3", {"original_max_position_embeddings": 32, "max_position_embeddings": 256}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(f"{v}" for v in value.values()) or "bare",
)
def test_scaled_rotary_embeddings_reach_beyond_the_original_context(kind, settings):
    model = scaled(kind, **settings)
    scorer = Scorer(model)
    assert limits.context_length(model.pretrained_model) == 256
    records = [dataclasses.replace(rollout_of(length), id=str(length)) for length in (256, 20, 130, 66)]
    for record, score in zip(records, scorer.score(records, FIELDS), strict=True):
        model(torch.tensor([[5]]))  # A short sequence resets what the longest one so far left behind.
        assert largest_difference(model, record, score) < TOLERANCE
    with pytest.raises(FieldError, match="at most the model's 256 tokens"):
        scorer.score([rollout_of(257)])


def test_the_length_up_to_which_a_batch_changes_nothing_stays_the_original_one():
    assert limits.stable_rotary_length(scaled("dynamic").config) == CONTEXT
    assert limits.stable_rotary_length(scaled("linear").config) is None
    assert limits.stable_rotary_length(scaled("yarn", original_max_position_embeddings=CONTEXT).config) is None


def test_a_stated_length_stands_where_only_some_layers_are_scaled():
    need_architecture("gemma3_text")
    linear = {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}
    kinds = {"full_attention": linear, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    lengths = set()
    for settings in ({"rope_parameters": kinds}, {"rope_scaling": linear}):
        try:
            body = build("gemma3_text", **settings)
        except (KeyError, TypeError, ValueError):
            continue  # Older and newer releases take one of them each.
        lengths.add(limits.context_length(body))
    assert lengths == {CONTEXT}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "falcon_mamba"])
def test_a_half_precision_model_with_float32_states_is_scored(model_type, dtype):
    need_architecture(model_type)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(build(model_type, dtype=dtype)).eval()
    records = [rollout_of(9), rollout_of(14)]
    for record, score in zip(records, Scorer(model).score(records, FIELDS), strict=True):
        # Half of a unit in the last place of logits of this size.
        assert largest_difference(model, record, score) < (0.05 if dtype is torch.bfloat16 else 0.01)
