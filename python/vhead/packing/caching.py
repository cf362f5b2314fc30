"""Strategies that compute the keys and values of shared tokens first, and keep them for what follows."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vhead.packing.strategies import Batch, Body, Padded, Strategy, as_row, padded, padded_tokens, token_budget_batches
from vhead.packing.trees import Tokens, shared_prefixes
from vhead.upstream import empty_cache


@dataclass(frozen=True, slots=True, eq=False)
class SharedPrefix:
    """A prefix, and what follows it in each sequence, padded on the right."""

    prefix: Tokens
    tokens: Tensor
    mask: Tensor


# A batch without a shared prefix is padded as others are.
Prefixed = SharedPrefix | Padded


class PrefixCache(Strategy[Prefixed]):
    """What sequences begin with goes through the model once, and its keys and values serve them all."""

    name = "prefix cache"
    is_differentiable = False  # Models keep no cache while gradient checkpointing is on.

    def __init__(self, body: Body) -> None:
        self._body = body

    def batches(self, sequences: Sequence[Tokens], prompts: Sequence[int], budget: int) -> Iterator[Batch[Prefixed]]:
        """Groups sequences by the prefix that they share; those that share none are padded."""
        del prompts
        single: list[int] = []
        for places, shared in shared_prefixes(sequences):
            if not shared:
                single += places
                continue
            rests = [len(sequences[place]) - shared for place in places]
            for group in token_budget_batches(rests, max(1, budget - shared)):
                yield _with_prefix([places[at] for at in group], sequences, shared)
        for chosen in token_budget_batches([len(sequences[place]) for place in single], budget):
            yield padded([single[at] for at in chosen], sequences)

    def states(self, batch: Batch[Prefixed]) -> Tensor:
        """The prefix's states first, then those of the padded rest."""
        shared = batch.content
        if not isinstance(shared, SharedPrefix):
            tokens, mask = shared
            return self._body.states(tokens, attention_mask=mask)
        cache = empty_cache(self._body.model)
        first = self._body.states(as_row(shared.prefix), cache=cache, use_cache=True)
        cache.batch_repeat_interleave(shared.tokens.shape[0])
        seen = shared.mask.new_ones(shared.mask.shape[0], len(shared.prefix))
        rest = self._body.states(
            shared.tokens,
            attention_mask=torch.cat([seen, shared.mask], dim=1),
            cache=cache,
            use_cache=True,
        )
        return torch.cat([first, rest])

    def spoilt(self, content: Prefixed) -> Prefixed:
        """Turns the prefix around, so that what follows it sees the wrong tokens."""
        return replace(content, prefix=content.prefix[::-1].copy()) if isinstance(content, SharedPrefix) else content


@dataclass(frozen=True, slots=True, eq=False)
class PromptAndCompletion:
    """A rollout, cut where its completion begins."""

    prompt: Tokens
    completion: Tokens


class PromptThenCompletion(Strategy[PromptAndCompletion]):
    """Each rollout's completion by itself, after the keys and values of its prompt, which are computed by themselves.

    Every shape is one of the rollout's own, and so are the numbers: whatever else is scored, they are the same bit for
    bit. The prompt's keys and values depend on the prompt alone, so that they may serve the next rollout as well.

    Args:
        body: The language model.
    """

    name = "batch-invariant: prompt, then completion"
    is_differentiable = False
    heeds_budget = False

    def __init__(self, body: Body) -> None:
        self._body = body
        self._kept: tuple[bytes, Any, Tensor] | None = None

    def batches(
        self, sequences: Sequence[Tokens], prompts: Sequence[int], budget: int
    ) -> Iterator[Batch[PromptAndCompletion]]:
        """Batches of one rollout each; those with the same prompt follow one another."""
        del budget
        keys = [tokens[:length].tobytes() for tokens, length in zip(sequences, prompts, strict=True)]
        before: bytes | None = None
        for place in sorted(range(len(keys)), key=keys.__getitem__):
            tokens, length = sequences[place], prompts[place]
            computed = len(tokens) - (length if keys[place] == before else 0)
            before = keys[place]
            content = PromptAndCompletion(tokens[:length], tokens[length:])
            yield Batch((place,), (np.arange(len(tokens)),), computed, content)

    def states(self, batch: Batch[PromptAndCompletion]) -> Tensor:
        """The prompt's states, then the completion's."""
        prompt, completion = batch.content.prompt, batch.content.completion
        key = prompt.tobytes()
        if self._kept is None or self._kept[0] != key:
            cache = empty_cache(self._body.model)
            self._kept = key, cache, self._body.states(as_row(prompt), cache=cache, use_cache=True)
        _, cache, first = self._kept
        # A copy, as the model appends to the cache.
        own, mask = copy.deepcopy(cache), torch.ones(1, len(prompt) + len(completion), dtype=torch.long)
        rest = self._body.states(as_row(completion), attention_mask=mask, cache=own, use_cache=True)
        return torch.cat([first, rest])

    def spoilt(self, content: PromptAndCompletion) -> PromptAndCompletion:
        """Turns the prompt around, so that the completion sees the wrong tokens."""
        return replace(content, prompt=content.prompt[::-1].copy())

    def forget(self) -> None:
        """Drops the prompt that is kept."""
        self._kept = None


def _with_prefix(places: Sequence[int], sequences: Sequence[Tokens], shared: int) -> Batch[Prefixed]:
    tokens, mask = padded_tokens([sequences[place][shared:] for place in places])
    width = tokens.shape[1]
    first = np.arange(shared)
    rows = tuple(
        np.concatenate([first, shared + at * width + np.arange(len(sequences[place]) - shared)])
        for at, place in enumerate(places)
    )
    content = SharedPrefix(sequences[places[0]][:shared], tokens, mask)
    return Batch(tuple(places), rows, shared + tokens.numel(), content)
