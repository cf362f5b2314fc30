"""Language models of random weights, and rollouts to score with them."""

import random
from collections.abc import Callable, Iterator
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
SMALL_VOCABULARY = 8192


def qwen2(layers: int) -> PreTrainedModel:
    """Qwen2-0.5B's shape with fewer layers, float32."""
    return _drawn(Qwen2Config, layers, heads=14, hidden_size=896, intermediate_size=4864, vocab_size=QWEN2_VOCABULARY)


def small_qwen2(layers: int) -> PreTrainedModel:
    """A quarter of that width and a small vocabulary, for completions so long that a larger one would take minutes."""
    sizes = {"hidden_size": 256, "intermediate_size": 768, "vocab_size": SMALL_VOCABULARY}
    return _drawn(Qwen2Config, layers, heads=4, **sizes)


def small_llama(vocabulary: int) -> PreTrainedModel:
    """Four layers of hidden size 256, float32."""
    return _drawn(LlamaConfig, 4, heads=4, hidden_size=256, intermediate_size=688, vocab_size=vocabulary)


def _drawn(kind: type[PretrainedConfig], layers: int, heads: int, **sizes: int) -> PreTrainedModel:
    heads_of = {"num_attention_heads": heads, "num_key_value_heads": 2}
    config = kind(
        num_hidden_layers=layers, max_position_embeddings=16_384, tie_word_embeddings=True, **heads_of, **sizes
    )
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


def agent_traces(prompts: int, completions: int) -> list[Rollout]:
    """Traces of 20 turns that share their task and the first turns; 30% of the tokens after it are the model's.

    Half of a task's traces go on from the fifth turn of the one before, as a search over actions does.
    """
    rng = np.random.default_rng(2)
    rollouts = []
    for _ in range(prompts):
        task, turns = rng.integers(0, QWEN2_VOCABULARY, int(rng.integers(150, 400))), []
        for number in range(completions):
            turns = [*(turns[:5] if number % 2 else []), *(_turn(rng) for _ in range(15 if number % 2 else 20))]
            completion, mask = (np.concatenate([turn[at] for turn in turns]) for at in (0, 1))
            rollouts.append(Rollout(task, completion, mask=mask))
    return rollouts


def _turn(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of an action and of what the environment answers, and which are the model's."""
    written, observed = int(rng.integers(6, 18)), int(rng.integers(14, 42))
    return rng.integers(0, QWEN2_VOCABULARY, written + observed), np.arange(written + observed) < written


def long_reasoning(prompts: int, completions: int) -> list[Rollout]:
    """Prompts of 100 to 300 tokens, each with completions of 2,048 to 8,192."""
    rng = np.random.default_rng(3)
    heads = [rng.integers(0, SMALL_VOCABULARY, int(rng.integers(100, 300))) for _ in range(prompts)]
    lengths = [[int(rng.integers(2048, 8193)) for _ in range(completions)] for _ in heads]
    return [
        Rollout(head, rng.integers(0, SMALL_VOCABULARY, length))
        for head, own in zip(heads, lengths, strict=True)
        for length in own
    ]


def unrelated(prompts: int, completions: int) -> list[Rollout]:
    """Rollouts of equal length that share nothing: prompts of 64 tokens, completions of 128."""
    rng = np.random.default_rng(4)
    drawn = rng.integers(0, QWEN2_VOCABULARY, (prompts * completions, 192))
    return [Rollout(tokens[:64], tokens[64:]) for tokens in drawn]


@dataclass(frozen=True)
class Workload:
    """Rollouts of one kind, and the language model that they go through; the counts are the usual ones."""

    rollouts: Callable[[int, int], list[Rollout]]
    prompts: int
    completions: int
    layers: int = 12
    model: Callable[[int], PreTrainedModel] = qwen2
    described: str = "Qwen2-0.5B's shape"
    # As many padded rows as leave room for the logits of all their tokens.
    padded_rows: int = 8


# By what `scoring.py --workload` calls them.
WORKLOADS = {
    "group": Workload(log_normal, prompts=4, completions=8),
    "traces": Workload(agent_traces, prompts=1, completions=8, padded_rows=4),
    "long": Workload(
        long_reasoning,
        prompts=8,
        completions=4,
        layers=2,
        model=small_qwen2,
        described="A Qwen2 of hidden size 256 and a vocabulary of 8,192",
        padded_rows=2,
    ),
    "unrelated": Workload(unrelated, prompts=16, completions=1),
}


def sizes(rollouts: list[Rollout]) -> dict[str, int]:
    """How many tokens there are, how many different prefixes, and how many completion tokens of the model."""
    whole = [(*rollout.prompt.tolist(), *rollout.completion.tolist()) for rollout in rollouts]
    masks = [np.asarray(rollout.mask) for rollout in rollouts if rollout.mask is not None]
    observed = sum(len(mask) - int(mask.sum()) for mask in masks)
    return {
        "rollouts": len(rollouts),
        "tokens": sum(map(len, whole)),
        "unique_tokens": _unique(whole),
        "completion_tokens": sum(len(rollout.completion) for rollout in rollouts) - observed,
    }


def _unique(sequences: list[tuple[int, ...]]) -> int:
    """How many different prefixes there are: in sorted order, what each sequence does not share with the one before."""
    ordered, count = sorted(sequences), 0
    for before, own in zip([(), *ordered], ordered, strict=False):
        shared = next(
            (at for at, (a, b) in enumerate(zip(before, own, strict=False)) if a != b), min(map(len, (before, own)))
        )
        count += len(own) - shared
    return count


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
