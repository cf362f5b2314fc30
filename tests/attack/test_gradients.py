"""Gradients of a training pass beside float64, over the architectures of the compatibility table."""

import copy

import pytest
import torch

from tests.architectures.tiny import build
from tests.attack.scale import scaled
from tests.library_versions import need_architecture
from tests.training.padded_loop import difference, of_loop, of_pass, rollouts, weights_of
from tests.training.test_architectures import PACKED, WINDOWS
from vhead import AutoModelForCausalLMWithValueHead, TrainingPass

# What transformers' own models warn about.
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]

# Positions of two kinds, biases of keys, and soft caps come first; the long form has all of them.
FIRST = ("opt", "gemma2", "qwen2", "gpt_neox")
# Of two roundings of one number neither is always the nearer one.
NOISE, LEAST = 2.0, 3e-6


@pytest.mark.parametrize(
    "model_type", [*FIRST, *(each for each in PACKED if each not in FIRST)][: scaled(4, len(PACKED))]
)
def test_every_parameter_s_gradient_is_no_further_from_float64_than_a_padded_loop_s(model_type):
    need_architecture(model_type)
    torch.manual_seed(3)
    body = build(model_type, **WINDOWS.get(model_type, {}))
    model = AutoModelForCausalLMWithValueHead(body, summary_dropout_prob=0.0).eval()
    given = rollouts(prompts=2, completions=2, longest=10)
    weights = weights_of(given)
    doubled = copy.deepcopy(model).double()
    # Newer transformers multiply by all experts at once, which torch does not do in float64.
    doubled.pretrained_model.config._experts_implementation = "eager"
    _, truth = of_loop(doubled, given, weights)
    far = difference(of_pass(TrainingPass(model), given, weights)[1], truth)
    padded = difference(of_loop(model, given, weights, 4)[1], truth)
    worse = {name: (far[name], padded[name]) for name in far if far[name] > max(NOISE * padded[name], LEAST)}
    assert not worse
    # Without one of the rollouts every comparison would be far off.
    assert max(difference(of_pass(TrainingPass(model), given[1:], weights[1:])[1], truth).values()) > 1e-2
