"""Scores of a bfloat16 model are as close to float32's as those of its own padded forward, field by field."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from tests.scoring.scoring_models import critic, reference
from vhead import Rollout, Scorer

SHAPES = {
    # Heads of 64 and 1,024 tokens in a batch are what the matrix unit is asked with.
    "qwen2": {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 352},
    "gpt2": {"n_embd": 64, "n_head": 2, "n_positions": 256},
}
# How far the errors of two equally good ways of rounding are apart by chance; of rewards there are only a few.
CHANCE = {"values": 1.1, "logprobs": 1.1, "entropy": 1.1, "reward": 1.25}
FIELDS = tuple(CHANCE)
PADDED_ROWS = 8


def groups(prompts: int = 4, completions: int = 16) -> list[Rollout]:
    rng = np.random.default_rng(3)
    heads = [rng.integers(3, 97, int(rng.integers(60, 120))) for _ in range(prompts)]
    return [Rollout(head, rng.integers(3, 97, int(rng.integers(20, 90)))) for head in heads for _ in range(completions)]


def half_precision_critic(architecture: str) -> nn.Module:
    torch.manual_seed(0)
    model = critic(architecture, **SHAPES[architecture], max_position_embeddings=256)
    with torch.no_grad():
        for parameter in model.pretrained_model.parameters():
            # Attention that looks at many tokens, as a trained model's does.
            parameter.copy_(0.4 * parameter if parameter.dim() > 1 else parameter)
    model.pretrained_model.bfloat16()
    return model


@torch.no_grad()
def padded(model: nn.Module, records: list[Rollout]) -> list[dict[str, np.ndarray]]:
    """Every field by the model's own forward on right-padded rows, from its bfloat16 logits on in float32."""
    found = []
    for start in range(0, len(records), PADDED_ROWS):
        batch = records[start : start + PADDED_ROWS]
        rows = [torch.from_numpy(np.concatenate([r.prompt, r.completion])) for r in batch]
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        output = model(pad_sequence(rows, batch_first=True), attention_mask=mask)
        for number, (rollout, row) in enumerate(zip(batch, rows, strict=True)):
            first, last = len(rollout.prompt) - 1, len(row) - 1
            distribution = output.logits[number, first:last].float().log_softmax(-1)
            targets = row[first + 1 :, None]
            found.append(
                {
                    "values": output.value[number, first:last].float().numpy(),
                    "logprobs": distribution.gather(-1, targets).squeeze(-1).numpy(),
                    "entropy": -(distribution.exp() * distribution).sum(-1).numpy(),
                    "reward": output.value[number, last].float().numpy(),
                }
            )
    return found


def errors(found: list[dict[str, np.ndarray]], expected: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """The root mean square of each field's difference, over all records."""

    def joined(scores: list[dict[str, np.ndarray]], name: str) -> np.ndarray:
        return np.concatenate([np.atleast_1d(score[name]).astype(np.float64) for score in scores])

    return {name: float(np.sqrt(np.mean((joined(found, name) - joined(expected, name)) ** 2))) for name in FIELDS}


@pytest.fixture(scope="module", params=SHAPES)
def judged(request):
    """A bfloat16 critic, its rollouts, their scores by the same weights in float32, and the padded forward's errors."""
    model, records = half_precision_critic(request.param), groups()
    exact = copy.deepcopy(model).float()
    expected = [reference(exact, rollout) for rollout in records]
    return model, records, expected, errors(padded(model, records), expected)


def scored(scorer: Scorer, records: list[Rollout]) -> list[dict[str, np.ndarray]]:
    return [{name: getattr(score, name) for name in FIELDS} for score in scorer.score(records, FIELDS)]


def test_every_field_is_as_close_to_float32_as_by_the_padded_forward(judged):
    model, records, expected, of_padded = judged
    own = errors(scored(Scorer(model), records), expected)
    assert all(own[name] <= CHANCE[name] * of_padded[name] for name in FIELDS), (own, of_padded)
    assert all(own[name] > 0 for name in FIELDS), "in bfloat16 nothing is exact"


def test_three_bits_less_in_the_states_is_noticed_in_every_field(judged):
    model, records, expected, of_padded = judged
    rough = copy.deepcopy(model)
    last_norm = [module for module in rough.pretrained_model.modules() if "Norm" in type(module).__name__][-1]

    def rounded(_module, _arguments, states):
        return (states.contiguous().view(torch.int16) & ~0x7).view(torch.bfloat16)

    last_norm.register_forward_hook(rounded)
    own = errors(scored(Scorer(rough), records), expected)
    assert all(own[name] > CHANCE[name] * of_padded[name] for name in FIELDS), (own, of_padded)
