"""Which way of batching a language model can take, found by trying each on a few tokens, and never assumed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from vhead.backbone.padding import Padding
from vhead.errors import VheadError
from vhead.packing import limits
from vhead.packing.caching import PrefixCache, PromptThenCompletion
from vhead.packing.packing import FlashTreePacking, FlexTreePacking, MaskedTreePacking, TreePacking
from vhead.packing.self_check import LONG, SelfCheck, probes
from vhead.packing.strategies import Body, OneByOne, PaddedBatches, Strategy

Attention = Literal["segments", "flex", "flash", "mask"]
ATTENTIONS: tuple[Attention, ...] = ("segments", "flex", "flash", "mask")

# From the fastest on: measured on a CPU; on CUDA expected from the number of launches, and not measured.
_ORDER: dict[str, tuple[Attention, ...]] = {"cpu": ("segments", "mask"), "cuda": ("flex", "flash", "segments", "mask")}


@dataclass(frozen=True)
class ScorerPlan:
    """How a scorer takes rollouts through one model; plain data, so that it can be printed, copied and sent.

    Attributes:
        architecture: The language model's class.
        strategy: How rollouts of usual length are batched.
        attention: The way of attending in packed trees; None where there are none.
        attention_reason: Why it is this one.
        rejected: The faster ways that this model cannot take, each with the reason.
        longest_shared: Rollouts with more tokens than this go by `long_strategy`; None: there is no such limit.
        long_strategy: How those are batched.
        logits: How log-probabilities and entropies are reached.
    """

    architecture: str
    strategy: str
    attention: Attention | None
    attention_reason: str | None
    rejected: dict[str, str]
    longest_shared: int | None
    long_strategy: str
    logits: str

    def __str__(self) -> str:
        lines = [f"{self.architecture}: {self.strategy}"]
        if self.attention is not None:
            lines.append(f"  attention: {self.attention}, {self.attention_reason}")
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
        attention: How the usual strategy attends in packed trees; None where there are none.
        attention_reason: Why in this way.
    """

    usual: Strategy
    longest_usual: int | None
    padded: PaddedBatches
    longest_padded: int | None
    alone: OneByOne
    own_logits: PaddedBatches
    rejected: dict[str, str]
    attention: Attention | None = None
    attention_reason: str | None = None

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


def find_ways(
    body: Body, *, batch_invariant: bool = False, own_logits: bool = False, attention: Attention | None = None
) -> Ways:
    """Tries the ways of batching from the fastest on; the model has to be in evaluation mode.

    Args:
        body: The language model.
        batch_invariant: Whether only ways will do in which no rollout's numbers depend on another rollout.
        own_logits: Whether logits of padded batches will be needed.
        attention: The only way of attending in packed trees that will do; None: the fastest that passes.

    Raises:
        VheadError: The model cannot take the asked-for attention.
    """
    bounds = _Bounds.of(body)
    check = SelfCheck(body, probes(body.model, bounds.context))
    body.in_place = check.in_place_agrees()
    alone = OneByOne(body, forgets=bounds.rotary is not None)
    padded: PaddedBatches = alone if batch_invariant else PaddedBatches(body)
    rejected: dict[str, str] = {}
    reads_padding = body.plan.padding is Padding.LEFT_OUT
    reason = "the model reads padding" if reads_padding else check.padding(padded)
    if reason is not None:
        padded, rejected = alone, {PaddedBatches.name: reason}
    kind = body.device.type
    if batch_invariant:
        candidates: list[Strategy] = [PromptThenCompletion(body)]
    elif attention is not None:
        candidates = [_packing(attention, body, bounds)]
    else:
        order = _ORDER.get(kind, _ORDER["cpu"])
        candidates = [*(_packing(name, body, bounds) for name in order), PrefixCache(body)]
    usual, longest, reasons = _first(candidates, check, bounds, padded)
    if attention is not None and usual is None:
        (reason,) = reasons.values()
        raise VheadError(
            f"attention: expected one that the {type(body.model).__name__} can take, got {attention!r}: {reason}"
        )
    logits = alone if own_logits and not check.logits_agree(padded) else padded
    ways = Ways(usual or padded, longest, padded, bounds.batched, alone, logits, reasons | rejected)
    chosen: Attention | None = getattr(usual, "attention", None)
    return replace(ways, attention=chosen, attention_reason=_why(chosen, kind, asked_for=attention is not None))


@dataclass(frozen=True)
class _Bounds:
    """What a configuration says about lengths, None where it states no limit.

    Attributes:
        context: Tokens that the model takes.
        rotary: Up to which rotary embeddings do not depend on the batch.
        batched: Up to which a batch gives what each sequence gives alone.
        sliding: Whether there is a sliding window of the kind that attention is told of.
        other_window: What other limits let a token see.
        window: What all limits let a token see.
    """

    context: int | None
    rotary: int | None
    batched: int | None
    sliding: bool
    other_window: int | None
    window: int | None

    @classmethod
    def of(cls, body: Body) -> "_Bounds":
        """Of a model's configuration."""
        config = body.model.config
        rotary, window = limits.stable_rotary_length(config), limits.attention_window(config)
        return cls(
            context=limits.context_length(body.model),
            rotary=rotary,
            batched=_least(rotary, limits.selected_tokens(config)),
            sliding=limits.sliding_window(config) is not None,
            other_window=limits.attention_window(config, sliding=False),
            window=window,
        )


def _packing(attention: Attention, body: Body, bounds: _Bounds) -> Strategy:
    match attention:
        case "segments":
            return TreePacking(body)
        case "flex":
            return FlexTreePacking(body)
        case "flash":
            return FlashTreePacking(body)
        case "mask":
            return MaskedTreePacking(body, _least(bounds.window, bounds.batched, bounds.context))


def _first(
    candidates: Sequence[Strategy], check: SelfCheck, bounds: _Bounds, padded: PaddedBatches
) -> tuple[Strategy | None, int | None, dict[str, str]]:
    """The first way that passes, the most tokens that it may be used for, and why those before it did not pass."""
    rejected: dict[str, str] = {}
    for candidate in candidates:
        windows = bounds.sliding and isinstance(candidate, TreePacking) and check.windows(candidate) is None
        limit = _least(bounds.other_window if windows else bounds.window, bounds.batched)
        reason = check.shortness(limit) or check.sharing(candidate, last=None if windows else 1)
        reason = reason or _in_blocks(candidate, check, bounds, padded)
        if reason is None:
            return candidate, limit, rejected
        rejected[candidate.name] = reason
    return None, _least(bounds.window, bounds.batched), rejected


def _in_blocks(candidate: Strategy, check: SelfCheck, bounds: _Bounds, padded: PaddedBatches) -> str | None:
    """The same check on several blocks of rows, where the way's kernel works in blocks."""
    if not isinstance(candidate, FlexTreePacking | FlashTreePacking):
        return None
    body = check.body
    long = SelfCheck(body, probes(body.model, bounds.context, LONG))
    long.padding(padded)
    return long.sharing(candidate, last=None)


def _why(chosen: Attention | None, kind: str, *, asked_for: bool) -> str | None:
    if chosen is None:
        return None
    if asked_for:
        return "as asked for"
    first = _ORDER.get(kind, _ORDER["cpu"])[0]
    if chosen != first:
        return "the next that passed"
    return "the fastest measured on a CPU" if first == "segments" else "expected to be the fastest on CUDA"


def _least(*numbers: int | None) -> int | None:
    return min((number for number in numbers if number is not None), default=None)
