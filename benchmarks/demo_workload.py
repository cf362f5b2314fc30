"""Rollouts for the demo model, as many as asked for: groups that share a prompt, as text or as token ids."""

import random
from collections.abc import Iterator

import numpy as np

from vhead import Rollout
from vhead.demo.rollouts import read_demo_rollouts

# ByT5's ids of bytes begin after its three special tokens.
BYTE_SHIFT = 3
BYTES = 256


def texts(prompts: int, completions: int, seed: int = 0) -> list[Rollout]:
    """Prompts of 40 to 80 characters, each with completions of 30 to 120, all cut from the demo's passages."""
    passages = [rollout.prompt + rollout.completion for rollout in read_demo_rollouts()]
    source, draw = " ".join(passages), random.Random(seed)  # noqa: S311, not a secret

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


def short(count: int, completions: int, prompt: int, completion: int, seed: int = 0) -> Iterator[Rollout]:
    """Random token ids, made one group at a time: prompts of `prompt` tokens with completions of 2 to `completion`."""
    rng = np.random.default_rng(seed)
    for start in range(0, count, completions):
        group = min(completions, count - start)
        head = rng.integers(BYTE_SHIFT, BYTE_SHIFT + BYTES, prompt)
        tails = rng.integers(BYTE_SHIFT, BYTE_SHIFT + BYTES, (group, completion))
        lengths = rng.integers(2, completion + 1, group)
        for at in range(group):
            yield Rollout(head, tails[at, : lengths[at]], id=start + at)
