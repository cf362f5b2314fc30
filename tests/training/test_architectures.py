"""Thirty architectures: the gradients of a pass are those of one rollout at a time, for every parameter."""

import copy

import pytest
import torch

from tests.architectures.tiny import build
from tests.library_versions import need_architecture
from tests.training.padded_loop import difference, of_loop, of_pass, rollouts, weights_of
from vhead import AutoModelForCausalLMWithValueHead, TrainingPass

# What transformers' own models warn about.
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]

# With wider windows than the tiny models', which would rule sharing out.
WINDOWS = {"gemma3_text": {"sliding_window": 64}, "gpt_oss": {"sliding_window": 64}}
PACKED = [
    *("arcee", "codegen", "cohere", "cohere2", "deepseek_v3", "falcon", "gemma", "gemma2", "gemma3_text", "glm"),
    *("glm4", "gpt2", "gpt_neox", "gpt_oss", "gptj", "granite", "helium", "llama", "mistral", "mixtral", "olmo"),
    *("olmo2", "olmo3", "opt", "persimmon", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3"),
    *("stablelm", "starcoder2"),
]
# Nothing is shared there, and the gradients are right all the same.
ALONE = ["bloom", "mamba", "mpt", "qwen3_next"]


@pytest.mark.parametrize("model_type", [*PACKED, *ALONE])
def test_gradients_of_every_parameter(model_type):
    need_architecture(model_type)
    torch.manual_seed(3)
    body = build(model_type, **WINDOWS.get(model_type, {}))
    model = AutoModelForCausalLMWithValueHead(body, summary_dropout_prob=0.0).eval()
    given = rollouts(prompts=2, completions=2, longest=10)
    weights = weights_of(given)
    training_pass = TrainingPass(model)
    loss, truth = of_loop(copy.deepcopy(model), given, weights)
    found_loss, found = of_pass(training_pass, given, weights)
    assert found_loss == pytest.approx(loss, rel=1e-3, abs=1e-2), str(training_pass.plan)
    assert max(difference(found, truth).values()) < 2e-3, str(training_pass.plan)
    if model_type in PACKED:
        assert training_pass.plan.packing.attention is not None, str(training_pass.plan)
