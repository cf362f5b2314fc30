"""The comparison that decides which strategy a language model can take.

What a batch gives is compared with what each sequence gives alone. A check that cannot fail proves nothing, so each
tree is also attended wrongly on purpose: a strategy is used only where that would have been noticed.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vhead.packing import layers, limits
from vhead.packing.attention.interface import AttentionInterface
from vhead.packing.gates import Fused
from vhead.packing.strategies import Batch, Body, OneByOne, PaddedBatches, Strategy
from vhead.packing.tree_packing import TreePacking
from vhead.packing.trees import Tokens
from vhead.upstream import warn_once

# Differences from a sequence alone that count as rounding, as a part of the largest state.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}
_HALF_TOLERANCE = 3e-2
# Half-precision states may differ from a sequence alone by this times what padded batches differ.
_NOISE_FACTOR = 3.0
# How many times the tolerance an error on purpose has to exceed; of half precisions the tolerance is wide already.
_CONTROL_FACTOR, _HALF_CONTROL_FACTOR = 4.0, 2.0

_UNLIMITED = 10**6
_PROMPT, _FIRST, _SECOND, _FORK, _THIRD, _OTHER = 10, 5, 7, 3, 4, 9
# A window that ends within the shortest sequence, and that is never the model's own.
_SHORT_WINDOW = 6
# Of the rows of a trial, every third is chosen.
_EVERY = 3
# Kernels that work in blocks of 128 rows are tried on sequences of several blocks too.
LONG = 16


def probes(model: nn.Module, context: int | None, times: int = 1) -> list[Tokens]:
    """Short sequences of ordinary tokens: three with a common beginning, two of which share more, and one other.

    Args:
        model: The model, whose vocabulary the tokens are from.
        context: The most tokens of a sequence; None: there is no limit.
        times: How many times longer the sequences are than they need be.
    """
    special = limits.special_tokens(model.config)
    vocabulary = limits.vocabulary_size(model)
    usable = np.array([token for token in range(min(vocabulary, 4096)) if token not in special] or [0])
    rng = np.random.default_rng(0)

    def draw(count: int) -> Tokens:
        return rng.choice(usable, count * times)

    prompt, second = draw(_PROMPT), draw(_SECOND)
    sequences = [
        np.concatenate([prompt, draw(_FIRST)]),
        np.concatenate([prompt, second]),
        np.concatenate([prompt, second[: _FORK * times], draw(_THIRD)]),
        draw(_OTHER),
    ]
    return [sequence[:context] for sequence in sequences]


# What `Fused` has beside decoder layers, which are tried along packed rows.
_KINDS = ("gates", "norms", "linears")


class SelfCheck:
    """Compares batches of a few short sequences with the same sequences alone.

    Args:
        body: The language model.
        sequences: The sequences, as `probes` makes them.
    """

    def __init__(self, body: Body, sequences: Sequence[Tokens]) -> None:
        self.body, self._sequences = body, sequences
        self._prompt = _PROMPT * max(1, max(map(len, sequences)) // (_PROMPT + _SECOND))
        strategy = OneByOne(body)
        batches = list(strategy.batches(sequences, [], 1))
        states = [strategy.states(batch).float() for batch in batches]
        self._alone = states
        self._scale = max(float(state.abs().max()) for state in states)
        self._tolerance = _TOLERANCE.get(body.dtype, _HALF_TOLERANCE) * self._scale
        self._half = body.dtype not in _TOLERANCE
        self._control = _HALF_CONTROL_FACTOR if self._half else _CONTROL_FACTOR

    def shortness(self, limit: int | None) -> str | None:
        """Why sequences as short as these are too long for sharing, or None."""
        longest = max(map(len, self._sequences))
        if limit is not None and limit < longest:
            return f"its layers look back only {limit} tokens"
        return None

    def windows(self, strategy: Strategy[Any]) -> str | None:
        """Why this strategy, which shares tokens, cannot be used beyond the model's sliding windows, or None.

        The comparison is made with windows so short that these sequences are longer, and first it is made sure that
        the model itself heeds what was shortened.
        """
        with short_windows(self.body.model):
            short = SelfCheck(self.body, self._sequences)
            if not short._difference_of(self._alone) > self._control * self._tolerance:
                return "its attention windows cannot be tried on short sequences"
            short._tolerance = max(short._tolerance, self._tolerance)
            return short.sharing(strategy, last=None)

    def fused(self) -> Fused:
        """The modules that may be computed by kernels of this package, found on the sequences alone."""
        found = Fused.of(self.body.model)
        if self.body.device.type != "cpu":
            return self._in_place(Fused(), found.layers)
        if found and not self._fused_agrees(replace(found, layers=())):
            # One kind that differs does not cost the others.
            fewer = (replace(found, linears=()), *(Fused(**{kind: getattr(found, kind)}) for kind in _KINDS))
            agreeing = (
                kind for kind in fewer if kind and kind != found and self._fused_agrees(replace(kind, layers=()))
            )
            return self._in_place(next(agreeing, Fused()), found.layers)
        return self._in_place(found, found.layers)

    def _in_place(self, fused: Fused, found: tuple[nn.Module, ...]) -> Fused:
        """The same, with those decoder layers if they give what the model's own give along packed rows, bit for bit."""
        without = replace(fused, layers=())
        if not found:
            return without
        strategy = TreePacking(self.body)
        with _noted(found[0]) as kinds:
            expected = self._tried(strategy, without)
        fused = replace(fused, layers=found, gives_tuples=tuple in kinds)
        states = self._tried(strategy, fused)
        same = len(states) == len(expected) > 0 and all(map(torch.equal, states, expected))
        return fused if same else without

    def selecting(self, strategy: Strategy[Any]) -> Fused:
        """The modules with the last layer among them, if it may compute chosen rows alone in this strategy."""
        usual = self.body.fused
        last = layers.last_of(self.body.model, usual.layers)
        if last is None or strategy.attention is None:
            return usual
        selecting, most = replace(usual, last=last), self.body.most_selected
        # Filled up to whole kernels, a trial's few rows would be all that there are.
        self.body.fused, self.body.most_selected = selecting, math.inf
        try:
            agrees = all(self._selects(strategy, batch) for batch in self._batches(strategy))
        except Exception as error:  # Whatever a model raises means that it cannot.
            self._refused(strategy, error)
            agrees = False
        finally:
            self.body.fused, self.body.most_selected = usual, most
        return selecting if agrees else usual

    def _selects(self, strategy: Strategy[Any], batch: Batch[Any]) -> bool:
        """Whether chosen rows of a batch are what they are alone, and the rows beside them are not."""
        expected = torch.cat([self._alone[place] for place in batch.places])
        rows = np.concatenate(batch.rows)
        chosen = np.arange(len(rows) - 1)[::_EVERY]
        found = strategy.states_of(batch, rows[chosen]).float()
        if found.shape != expected[chosen].shape:
            return False
        beside = _largest(found - expected[chosen + 1])
        return _largest(found - expected[chosen]) <= self._tolerance and beside > self._control * self._tolerance

    def _tried(self, strategy: Strategy[Any], fused: Fused) -> list[Tensor]:
        """The states of a strategy's batches with these modules; none where the model cannot take that."""
        before, self.body.fused = self.body.fused, fused
        try:
            return [strategy.states(batch) for batch in self._batches(strategy)]
        except Exception:  # Whatever a model raises means that it cannot; the strategy's own trial says so.
            return []
        finally:
            self.body.fused = before

    def _fused_agrees(self, fused: Fused) -> bool:
        usual = self.body.unit_rows
        self.body.fused, self.body.unit_rows = fused, 1
        try:
            alone = OneByOne(self.body)
            return self._difference(alone, self._batches(alone)) <= self._tolerance
        finally:
            self.body.fused, self.body.unit_rows = Fused(), usual

    def padding(self, strategy: PaddedBatches) -> str | None:
        """Why padded batches cannot be used, or None."""
        try:
            difference = self._difference(strategy, self._batches(strategy))
        except Exception as error:  # Whatever a model raises means that it cannot.
            return self._refused(strategy, error)
        if not difference <= self._tolerance:
            return f"differs from one sequence alone by {difference / self._scale:.1e} of the largest state"
        if self._half:
            # How much two right results differ on this model, which no fixed tolerance tells for half precisions.
            noise = max(difference, self._between_kernels())
            self._tolerance = max(_NOISE_FACTOR * noise, 2**-8 * self._scale)
        return None

    def _between_kernels(self) -> float:
        """What the model's own attention and transformers' plain one differ by, which are both right."""
        strategy = OneByOne(self.body)
        with AttentionInterface(self.body.model).plain():
            return self._difference(strategy, self._batches(strategy))

    def logits_agree(self, strategy: PaddedBatches) -> bool:
        """Whether the model's own logits are in padded batches what they are alone."""
        alone = OneByOne(self.body)
        expected = [alone.states_and_logits(batch)[1].float() for batch in self._batches(alone)]
        for batch in self._batches(strategy):
            logits = strategy.states_and_logits(batch)[1].float()
            for place, rows in zip(batch.places, batch.rows, strict=True):
                difference = logits[torch.from_numpy(rows).to(logits.device)] - expected[place]
                if not _largest(difference) <= self._tolerance / self._scale * float(expected[place].abs().max()):
                    return False
        return True

    def sharing(self, strategy: Strategy[Any], *, last: int | None = 1) -> str | None:
        """Why this strategy, which shares tokens, cannot be used, or None.

        Args:
            strategy: The strategy, made as it would be used.
            last: Among how many of each sequence's last tokens an error on purpose has to be seen, None for all. A
                window may be shorter than the distance from a long sequence's last token to where an error is.
        """
        try:
            batches = self._batches(strategy)
            difference = self._difference(strategy, batches)
            if not difference <= self._tolerance:
                return f"differs from one sequence alone by {difference / self._scale:.1e} of the largest state"
            wrong = self._difference(
                strategy, [replace(batch, content=strategy.spoilt(batch.content)) for batch in batches], last
            )
        except Exception as error:  # Whatever a model raises means that it cannot.
            return self._refused(strategy, error)
        if not wrong > self._control * self._tolerance:
            return "cannot be tried, because a wrong result would look like a right one"
        return None

    def _refused(self, strategy: Strategy[Any], error: Exception) -> str:
        """What was raised. The log says so too: a release that broke this strategy must not pass for a slow model."""
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        # This one is raised on purpose, where it is known that something cannot be.
        if not isinstance(error, NotImplementedError):
            architecture = type(self.body.model).__name__
            warn_once(f"{architecture} is not scored by {strategy.name}, which failed when it was tried: {reason}")
        return reason

    def _difference_of(self, alone: Sequence[Tensor]) -> float:
        """How much other states of the same sequences differ at most."""
        return max(_largest(other - own) for other, own in zip(alone, self._alone, strict=True))

    def _batches(self, strategy: Strategy[Any]) -> list[Batch[Any]]:
        prompts = [min(self._prompt, len(sequence) - 1) for sequence in self._sequences]
        return list(strategy.batches(self._sequences, prompts, _UNLIMITED))

    def _difference(self, strategy: Strategy[Any], batches: Sequence[Batch[Any]], last: int | None = None) -> float:
        """The largest difference over all tokens, or over the last so many of each sequence."""
        worst = 0.0
        for batch in batches:
            states = strategy.states(batch).float()
            for place, rows in zip(batch.places, batch.rows, strict=True):
                chosen = states[torch.from_numpy(rows).to(states.device)]
                difference = chosen - self._alone[place]
                worst = max(worst, _largest(difference if last is None else difference[-last:]))
        return worst


@contextmanager
def _noted(module: nn.Module) -> Iterator[set[type]]:
    """Notes of what kind a module's results are while the block runs."""
    kinds: set[type] = set()
    handle = module.register_forward_hook(lambda _module, _inputs, output: kinds.add(type(output)))
    try:
        yield kinds
    finally:
        handle.remove()


@contextmanager
def short_windows(model: Any) -> Iterator[None]:
    """Shortens a model's sliding windows while the block runs: where its configuration and its layers state them."""
    config = limits.text_config(model.config)
    window = config.sliding_window
    holders = [holder for holder in (config, *model.modules()) if getattr(holder, "sliding_window", None) == window]
    try:
        for holder in holders:
            holder.sliding_window = min(max(1, window // 2), _SHORT_WINDOW)
        yield
    finally:
        for holder in holders:
            holder.sliding_window = window


def _largest(difference: Tensor) -> float:
    largest = float(difference.abs().max())
    return math.inf if math.isnan(largest) else largest
