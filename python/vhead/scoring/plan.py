"""Which way of batching a language model can take, found by trying each on a few tokens, and never assumed.

What a batch gives is compared with what each sequence gives alone. A check that cannot fail proves nothing, so each
tree is also attended wrongly on purpose: a way is used only where that would have been noticed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from vhead.scoring import attention, limits
from vhead.scoring.caching import PrefixCache, PromptAndCompletion, PromptThenCompletion, SharedPrefix
from vhead.scoring.gates import is_gated
from vhead.scoring.packing import MaskedTreePacking, TreePacking
from vhead.scoring.strategies import Batch, Body, OneByOne, PaddedBatches, Strategy
from vhead.scoring.trees import Pack, Segment, Tokens

# Differences from a sequence alone that count as rounding, as a part of the largest state.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}
_HALF_TOLERANCE = 3e-2
# Half-precision states may differ from a sequence alone by this times what padded batches differ.
_NOISE_FACTOR = 3.0
# What an error on purpose has to exceed.
_CONTROL_FACTOR = 4.0

_UNLIMITED = 10**6
_PROMPT, _FIRST, _SECOND, _FORK, _THIRD, _OTHER = 10, 5, 7, 3, 4, 9


@dataclass(frozen=True)
class ScorerPlan:
    """How a scorer takes rollouts through one model; plain data, so that it can be printed, copied and sent.

    Attributes:
        architecture: The language model's class.
        strategy: How rollouts of usual length are batched.
        rejected: The faster ways that this model cannot take, each with the reason.
        longest_shared: Rollouts with more tokens than this go by `long_strategy`; None: there is no such limit.
        long_strategy: How those are batched.
        logits: How log-probabilities and entropies are reached.
    """

    architecture: str
    strategy: str
    rejected: dict[str, str]
    longest_shared: int | None
    long_strategy: str
    logits: str

    def __str__(self) -> str:
        lines = [f"{self.architecture}: {self.strategy}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.rejected.items()]
        if self.longest_shared is not None:
            lines.append(f"  more than {self.longest_shared} tokens: {self.long_strategy}")
        return "\n".join([*lines, f"  logits: {self.logits}"])


@dataclass(frozen=True)
class Ways:
    """The strategies that passed.

    Attributes:
        usual: For sequences of at most `longest_usual` tokens.
        longest_usual: None: there is no such limit.
        padded: For longer ones, up to `longest_padded` tokens.
        longest_padded: None: there is no such limit.
        alone: For the longest.
        own_logits: For what needs the model's own logits, like `padded`.
        rejected: The faster ways that did not pass, and why.
    """

    usual: Strategy
    longest_usual: int | None
    padded: PaddedBatches
    longest_padded: int | None
    alone: OneByOne
    own_logits: PaddedBatches
    rejected: dict[str, str]

    def groups(self, lengths: Sequence[int]) -> list[tuple[Strategy, list[int]]]:
        """Which of these sequences go which way: each place once."""
        places: dict[Strategy, list[int]] = {}
        for place, length in enumerate(lengths):
            places.setdefault(self._way(length), []).append(place)
        return list(places.items())

    def without_sharing(self, lengths: Sequence[int]) -> list[tuple[Strategy, list[int]]]:
        """The same where the model's own logits are needed."""
        return replace(self, usual=self.own_logits, padded=self.own_logits).groups(lengths)

    def _way(self, length: int) -> Strategy:
        if self.longest_padded is not None and length > self.longest_padded:
            return self.alone
        within = self.longest_usual is None or length <= self.longest_usual
        return self.usual if within else self.padded


def find_ways(body: Body, *, batch_invariant: bool = False, own_logits: bool = False) -> Ways:
    """Tries the ways of batching from the fastest on; the model has to be in evaluation mode.

    Args:
        body: The language model.
        batch_invariant: Whether only ways will do in which no rollout's numbers depend on another rollout.
        own_logits: Whether logits of padded batches will be needed.
    """
    config = body.model.config
    window, rotary = limits.attention_window(config), limits.stable_rotary_length(config)
    context = limits.context_length(config)
    batched = _least(rotary, limits.selected_tokens(config))
    shared = _least(window, batched)
    check = SelfCheck(body, probes(body.model, context))
    body.in_place = check.in_place_agrees()
    alone = OneByOne(body, forgets=rotary is not None)
    padded: PaddedBatches = alone if batch_invariant else PaddedBatches(body)
    rejected: dict[str, str] = {}
    if (reason := check.padding(padded)) is not None:
        padded, rejected = alone, {PaddedBatches.name: reason}
    candidates: list[Strategy] = [
        TreePacking(body),
        MaskedTreePacking(body, _least(shared, context)),
        PrefixCache(body),
    ]
    usual, reasons = _first([PromptThenCompletion(body)] if batch_invariant else candidates, check, shared)
    logits = alone if own_logits and not check.logits_agree(padded) else padded
    return Ways(usual or padded, shared, padded, batched, alone, logits, reasons | rejected)


def _first(
    candidates: Sequence[Strategy], check: "SelfCheck", limit: int | None
) -> tuple[Strategy | None, dict[str, str]]:
    """The first way that passes, and why those before it did not."""
    rejected: dict[str, str] = {}
    for candidate in candidates:
        reason = check.shortness(limit) or check.sharing(candidate)
        if reason is None:
            return candidate, rejected
        rejected[candidate.name] = reason
    return None, rejected


def probes(model: nn.Module, context: int | None) -> list[Tokens]:
    """Short sequences of ordinary tokens: three with a common beginning, two of which share more, and one other."""
    special = limits.special_tokens(model.config)
    vocabulary = limits.vocabulary_size(model)
    usable = np.array([token for token in range(min(vocabulary, 4096)) if token not in special] or [0])
    rng = np.random.default_rng(0)

    def draw(count: int) -> Tokens:
        return rng.choice(usable, count)

    prompt, second = draw(_PROMPT), draw(_SECOND)
    sequences = [
        np.concatenate([prompt, draw(_FIRST)]),
        np.concatenate([prompt, second]),
        np.concatenate([prompt, second[:_FORK], draw(_THIRD)]),
        draw(_OTHER),
    ]
    return [sequence[:context] for sequence in sequences]


class SelfCheck:
    """Compares batches of a few short sequences with the same sequences alone.

    Args:
        body: The language model.
        sequences: The sequences.
    """

    def __init__(self, body: Body, sequences: Sequence[Tokens]) -> None:
        self._body, self._sequences = body, sequences
        way = OneByOne(body)
        batches = list(way.batches(sequences, [], 1))
        states = [way.states(batch).float() for batch in batches]
        self._alone = states
        self._scale = max(float(state.abs().max()) for state in states)
        self._tolerance = _TOLERANCE.get(body.dtype, _HALF_TOLERANCE) * self._scale
        self._half = body.dtype not in _TOLERANCE

    def shortness(self, limit: int | None) -> str | None:
        """Why sequences as short as these are too long for sharing, or None."""
        longest = max(map(len, self._sequences))
        if limit is not None and limit < longest:
            return f"its layers look back {limit} tokens only"
        return None

    def in_place_agrees(self) -> bool:
        """Whether gated layers may work in place, found on the sequences alone."""
        if self._body.device.type != "cpu" or not any(is_gated(module) for module in self._body.model.modules()):
            return False
        self._body.in_place = True
        try:
            alone = OneByOne(self._body)
            return self._difference(alone, self._batches(alone)) <= self._tolerance
        finally:
            self._body.in_place = False

    def padding(self, way: PaddedBatches) -> str | None:
        """Why padded batches cannot be used, or None."""
        try:
            difference = self._difference(way, self._batches(way))
        except Exception as error:  # Whatever a model raises means that it cannot.
            return _said(error)
        if not difference <= self._tolerance:
            return f"differs from one sequence alone by {difference / self._scale:.1e} of the largest state"
        if self._half:
            self._tolerance = max(_NOISE_FACTOR * difference, 2**-8 * self._scale)
        return None

    def logits_agree(self, way: PaddedBatches) -> bool:
        """Whether the model's own logits are in padded batches what they are alone."""
        alone = OneByOne(self._body)
        expected = [alone.states_and_logits(batch)[1].float() for batch in self._batches(alone)]
        for batch in self._batches(way):
            logits = way.states_and_logits(batch)[1].float()
            for place, rows in zip(batch.places, batch.rows, strict=True):
                difference = logits[torch.from_numpy(rows).to(logits.device)] - expected[place]
                if not _largest(difference) <= self._tolerance / self._scale * float(expected[place].abs().max()):
                    return False
        return True

    def sharing(self, way: Strategy) -> str | None:
        """Why this way of sharing tokens cannot be used, or None."""
        try:
            if isinstance(way, TreePacking):
                attention.register()
            batches = self._batches(way)
            difference = self._difference(way, batches)
            if not difference <= self._tolerance:
                return f"differs from one sequence alone by {difference / self._scale:.1e} of the largest state"
            wrong = self._difference(way, [_spoilt(batch) for batch in batches], last=1)
        except Exception as error:  # Whatever a model raises means that it cannot.
            return _said(error)
        if not wrong > _CONTROL_FACTOR * self._tolerance:
            return "a wrong result would not be noticed"
        return None

    def _batches(self, way: Strategy) -> list[Batch]:
        return list(way.batches(self._sequences, [min(_PROMPT, len(s) - 1) for s in self._sequences], _UNLIMITED))

    def _difference(self, way: Strategy, batches: Sequence[Batch], last: int | None = None) -> float:
        """The largest difference over all tokens, or over the last so many of each sequence."""
        worst = 0.0
        for batch in batches:
            states = way.states(batch).float()
            for place, rows in zip(batch.places, batch.rows, strict=True):
                chosen = states[torch.from_numpy(rows).to(states.device)]
                difference = chosen - self._alone[place]
                worst = max(worst, _largest(difference if last is None else difference[-last:]))
        return worst


def _spoilt(batch: Batch) -> Batch:
    """The batch as a way that mixes sequences up, or that loses what they share, would run it."""
    content = batch.content
    if isinstance(content, Pack):
        content = replace(content, segments=(Segment(0, len(content.tokens), ()),))
    elif isinstance(content, SharedPrefix):
        content = replace(content, prefix=content.prefix[::-1].copy())
    elif isinstance(content, PromptAndCompletion):
        content = replace(content, prompt=content.prompt[::-1].copy())
    return replace(batch, content=content)


def _largest(difference: Tensor) -> float:
    largest = float(difference.abs().max())
    return math.inf if math.isnan(largest) else largest


def _least(*numbers: int | None) -> int | None:
    return min((number for number in numbers if number is not None), default=None)


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
