"""Tiny critics with random weights, and their scores computed in the plainest way."""

import dataclasses

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.library_versions import DTYPE, need_architecture
from vhead import AutoModelForCausalLMWithValueHead, Rollout, Score, Scorer, Scores
from vhead.packing import caching, strategies, tree_packing

VOCABULARY = 97
CONTEXT = 64

WAYS = {**vars(strategies), **vars(tree_packing), **vars(caching)}

_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
_END = {"bos_token_id": 1, "eos_token_id": 2}
ARCHITECTURES = {
    "llama": _LLAMA,
    "gpt2": _GPT2 | _END,
    "qwen2": _LLAMA,
    "mistral": _LLAMA | {"head_dim": 8},
    "gpt_neo": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 60,
        "max_position_embeddings": CONTEXT,
    }
    | _END,
    "gemma2": _LLAMA | {"head_dim": 8, "final_logit_softcapping": 5.0, "attn_implementation": "eager"},
    "opt": _LLAMA | {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "cohere": _LLAMA | {"logit_scale": 0.25},
    "falcon_h1": _LLAMA
    | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "lm_head_multiplier": 0.3},
    "granite": _LLAMA | {"logits_scaling": 4.0},
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4} | _END,
    "mamba": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8} | _END,
}


def critic(architecture: str = "llama", **settings: object) -> AutoModelForCausalLMWithValueHead:
    """A model in evaluation mode whose logits differ by several units, so that caps and scales matter."""
    need_architecture(architecture)
    config = AutoConfig.for_model(architecture, **ARCHITECTURES[architecture] | settings)
    body = AutoModelForCausalLM.from_config(config, **{DTYPE: torch.float32})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in body.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.25 * noise if parameter.dim() > 1 else parameter + 0.2 * noise)
        model = AutoModelForCausalLMWithValueHead.from_pretrained(body, v_head_init_strategy="normal")
        model.v_head.summary.bias.fill_(0.37)
    return model.eval()


def rollouts(count: int = 12, seed: int = 0, longest: int = 30) -> list[Rollout]:
    """Token ids of many lengths, one token included."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest, (count, 2))
    lengths[0] = (1, 1)
    return [
        Rollout(rng.integers(3, VOCABULARY, p), rng.integers(3, VOCABULARY, c), id=f"r{index}")
        for index, (p, c) in enumerate(lengths)
    ]


def trees(prompts: int = 3, completions: int = 4, seed: int = 0) -> list[Rollout]:
    """Prompts with several completions each, some of which begin alike, in an order that mixes the prompts."""
    rng = np.random.default_rng(seed)
    records = []
    for _ in range(prompts):
        prompt = rng.integers(3, VOCABULARY, int(rng.integers(9, 25)))
        tails = [rng.integers(3, VOCABULARY, int(rng.integers(1, 20))) for _ in range(completions)]
        tails[1] = np.concatenate([tails[0], tails[1]])[:30]
        records += [Rollout(prompt, tail) for tail in tails]
    order = rng.permutation(len(records))
    return [Rollout(records[at].prompt, records[at].completion, id=f"t{at}") for at in order]


def by_way(scorer: Scorer, name: str) -> Scorer:
    """The scorer, made to batch in the way of this class."""
    engine = scorer._engine
    body = engine._body
    arguments = (body, CONTEXT) if name == "MaskedTreePacking" else (body,)
    plan = dataclasses.replace(engine._ways.plan, longest_shared=None)
    engine._ways = dataclasses.replace(engine._ways, usual=WAYS[name](*arguments), plan=plan)
    return scorer


@torch.no_grad()
def reference(model: torch.nn.Module, rollout: Rollout, temperature: float = 1.0) -> dict[str, np.ndarray]:
    """One rollout alone, unpadded, through the model's own forward; the statistics in float64."""
    tokens = torch.from_numpy(np.concatenate([rollout.prompt, rollout.completion]))
    output = model(tokens[None])
    start = len(rollout.prompt)
    distribution = torch.log_softmax(output.logits[0, start - 1 : -1].double() / temperature, dim=-1)
    return {
        "values": output.value[0, start - 1 : -1].numpy(),
        "logprobs": distribution.gather(-1, tokens[start:, None]).squeeze(-1).numpy(),
        "entropy": -(distribution.exp() * distribution).sum(-1).numpy(),
        "reward": output.value[0, -1].numpy(),
        "prompt_value": output.value[0, start - 1].numpy(),
        "bootstrap": output.value[0, -1].numpy(),
        "steps": output.value[0, -1:, None].numpy(),
    }


def largest_difference(model: torch.nn.Module, rollout: Rollout, score: Score, temperature: float = 1.0) -> float:
    """Over all fields that the score has."""
    expected = reference(model, rollout, temperature)
    present = [name for name in expected if name in score.computed]
    assert present
    assert all(np.shape(getattr(score, name)) == expected[name].shape for name in present)
    return max(float(np.abs(getattr(score, name) - expected[name]).max()) for name in present)


def worst(model: torch.nn.Module, records: list[Rollout], scores: Scores, temperature: float = 1.0) -> float:
    """The largest difference of any record."""
    assert len(scores) == len(records)
    return max(largest_difference(model, r, s, temperature) for r, s in zip(records, scores, strict=True))
