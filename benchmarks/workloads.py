"""Language models of random weights, and rollouts to score with them."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen2Config

from vhead import Rollout
from vhead.demo.rollouts import read_demo_rollouts

# ByT5's ids of bytes, which the demo model reads, begin after its three special tokens.
BYTE_SHIFT = 3
BYTES = 256
QWEN2_VOCABULARY = 151_936


def qwen2(layers: int) -> PreTrainedModel:
    """Qwen2-0.5B's shape with fewer layers, float32."""
    return _drawn(Qwen2Config, layers, heads=14, hidden_size=896, intermediate_size=4864, vocab_size=QWEN2_VOCABULARY)


def small_llama(vocabulary: int) -> PreTrainedModel:
    """Four layers of hidden size 256, float32."""
    return _drawn(LlamaConfig, 4, heads=4, hidden_size=256, intermediate_size=688, vocab_size=vocabulary)


def _drawn(kind: type[PretrainedConfig], layers: int, heads: int, **sizes: int) -> PreTrainedModel:
    heads_of = {"num_attention_heads": heads, "num_key_value_heads": 2}
    config = kind(num_hidden_layers=layers, max_position_embeddings=4096, tie_word_embeddings=True, **heads_of, **sizes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).float().eval()


def log_normal(prompts: int, completions: int) -> list[Rollout]:
    """Prompts of 64 to 199 random tokens, each with log-normally long completions of 8 to 256 random tokens."""
    generator = torch.Generator().manual_seed(1)

    def draw(count: int) -> torch.Tensor:
        return torch.randint(0, QWEN2_VOCABULARY, (count,), generator=generator)

    lengths = torch.randint(64, 200, (prompts,), generator=generator)
    rollouts = []
    for prompt in [draw(int(length)) for length in lengths]:
        for _ in range(completions):
            length = int(torch.empty(1).log_normal_(4.0, 0.7, generator=generator).clamp(8, 256))
            rollouts.append(Rollout(prompt, draw(length)))
    return rollouts


def sizes(rollouts: list[Rollout]) -> dict[str, int]:
    """How many tokens there are, how many different prefixes, and how many completion tokens."""
    whole = [(*rollout.prompt.tolist(), *rollout.completion.tolist()) for rollout in rollouts]
    return {
        "rollouts": len(rollouts),
        "tokens": sum(map(len, whole)),
        "unique_tokens": len({tokens[:end] for tokens in whole for end in range(1, len(tokens) + 1)}),
        "completion_tokens": sum(len(rollout.completion) for rollout in rollouts),
    }


def texts(prompts: int, completions: int) -> list[Rollout]:
    """Prompts of 40 to 80 characters, each with completions of 30 to 120, all cut from the demo's passages."""
    passages = [rollout.prompt + rollout.completion for rollout in read_demo_rollouts()]
    source, draw = " ".join(passages), random.Random(0)

    def cut(least: int, most: int) -> str:
        length = draw.randint(least, most)
        start = draw.randrange(len(source) - length)
        return source[start : start + length]

    heads = [cut(40, 80) for _ in range(prompts)]
    return [Rollout(head, cut(30, 120)) for head in heads for _ in range(completions)]


def as_ids(rollout: Rollout) -> Rollout:
    """The same rollout as the demo's tokenizer reads it."""
    prompt, completion = (np.frombuffer(part.encode(), np.uint8) for part in (rollout.prompt, rollout.completion))
    return Rollout(prompt.astype(np.int64) + BYTE_SHIFT, completion.astype(np.int64) + BYTE_SHIFT)


def short(count: int, completions: int, prompt: int, completion: int) -> Iterator[Rollout]:
    """Random bytes, made one group at a time: prompts of `prompt` tokens with completions of 2 to `completion`."""
    rng = np.random.default_rng(0)
    for start in range(0, count, completions):
        group = min(completions, count - start)
        head = rng.integers(BYTE_SHIFT, BYTE_SHIFT + BYTES, prompt)
        tails = rng.integers(BYTE_SHIFT, BYTE_SHIFT + BYTES, (group, completion))
        lengths = rng.integers(2, completion + 1, group)
        for at in range(group):
            yield Rollout(head, tails[at, : lengths[at]], id=start + at)


@dataclass(frozen=True)
class Grid:
    """So many prompts, so many completions of each, and how many tokens one has, for a model of this vocabulary."""

    vocabulary: int = 32_768
    prompts: int = 8
    completions: int = 8
    prompt: int = 64
    completion: int = 64

    @property
    def tokens(self) -> int:
        """Of all rollouts, prompts counted as often as they come."""
        return self.prompts * self.completions * (self.prompt + self.completion)

    def rollouts(self) -> list[Rollout]:
        """Random token ids."""
        generator = torch.Generator().manual_seed(0)

        def draw(count: int) -> torch.Tensor:
            return torch.randint(3, self.vocabulary, (count,), generator=generator)

        heads = [draw(self.prompt) for _ in range(self.prompts)]
        return [Rollout(head, draw(self.completion)) for head in heads for _ in range(self.completions)]


BASE = Grid()
# What grows on each axis, in the order of the picture's panels. Tokens stay the same where they can.
AXES: dict[str, dict[int, Grid]] = {
    "rollouts": {count: replace(BASE, prompts=count // 8) for count in (8, 16, 32, 64, 128, 256)},
    "vocabulary": {size: replace(BASE, vocabulary=size) for size in (1024, 4096, 16_384, 65_536, 262_144)},
    "completions per prompt": {
        count: replace(BASE, prompts=64 // count, completions=count, prompt=192, completion=32)
        for count in (1, 2, 4, 8, 16, 32, 64)
    },
    "completion length": {
        length: replace(BASE, prompts=max(1, 512 // length), completion=length) for length in (8, 32, 128, 512, 1024)
    },
}
