"""Rollouts with targets that hidden states say something about, and those states in the plainest way."""

import numpy as np
import torch

from tests.scoring.scoring_models import VOCABULARY
from vhead import Rollout


def grouped(prompts=14, completions=4, seed=0, masked=False):
    """Prompts with several completions each; with `masked`, some tokens are observations."""
    rng = np.random.default_rng(seed)
    rollouts = []
    for _ in range(prompts):
        prompt = rng.integers(3, VOCABULARY, int(rng.integers(4, 20)))
        for _ in range(completions):
            completion = rng.integers(3, VOCABULARY, int(rng.integers(2, 24)))
            mask = rng.random(len(completion)) < 0.7 if masked else None
            if masked:
                mask[rng.integers(len(completion))] = True
            rollouts.append(Rollout(prompt, completion, mask=mask))
    order = rng.permutation(len(rollouts))
    return [rollouts[at] for at in order]


def paired(count=40, seed=0):
    """Pairs whose sides have one prompt."""
    rng = np.random.default_rng(seed)
    firsts = grouped(count, 1, seed)
    return [(first, Rollout(first.prompt, rng.integers(3, VOCABULARY, int(rng.integers(2, 24))))) for first in firsts]


@torch.no_grad()
def all_states(model, rollout):
    """The last hidden states `[P + C, H]` of one rollout alone, float64."""
    tokens = torch.from_numpy(np.concatenate([rollout.prompt, rollout.completion]))
    output = model.pretrained_model(tokens[None], output_hidden_states=True)
    return output.hidden_states[-1][0].double().numpy()


def token_states(model, rollout):
    """Those at the places that predict the tokens of the model's."""
    states = all_states(model, rollout)[len(rollout.prompt) - 1 : -1]
    return states if rollout.mask is None else states[rollout.mask]


def last_state(model, rollout):
    """That of the last token of the model's."""
    written = np.ones(len(rollout.completion), bool) if rollout.mask is None else rollout.mask
    return all_states(model, rollout)[len(rollout.prompt) + np.flatnonzero(written)[-1]]


def relative(found, expected):
    """The relative difference of two arrays in norm."""
    found, expected = np.asarray(found, np.float64).ravel(), np.asarray(expected, np.float64).ravel()
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)
