"""Which strategy a language model can take, found by trying each on a few tokens, and never assumed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from vhead.backbone.padding import Padding
from vhead.errors import VheadError
from vhead.packing import limits
from vhead.packing.caching import PrefixCache, PromptThenCompletion
from vhead.packing.self_check import LONG, SelfCheck, probes
from vhead.packing.strategies import Body, OneByOne, PaddedBatches, Strategy
from vhead.packing.tree_packing import FlashTreePacking, FlexTreePacking, MaskedTreePacking, TreePacking

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
        rejected: The faster strategies that this model cannot take, each with the reason.
        longest_shared: Rollouts with more tokens than this go by `long_strategy`; None: there is no such limit.
        long_strategy: How those are batched.
        logits: How log-probabilities and entropies are reached.
        batches: How many tokens a batch has, and why.
        matrix_unit: What the processor's matrix unit computes by kernels of this package; empty: nothing.
        products: How half precisions are multiplied; empty: as torch does.
        fused: How many of the modules that look alike are computed by this package; empty: there are none.
        last_layer: Which rows the last layer computes; empty: all.
        adapters: Which adapter computes what; empty: the active one computes everything, or there are none.
    """

    architecture: str
    strategy: str
    attention: str | None
    attention_reason: str | None
    rejected: dict[str, str]
    longest_shared: int | None
    long_strategy: str
    logits: str = ""
    batches: str = ""
    matrix_unit: str = ""
    products: str = ""
    fused: str = ""
    last_layer: str = ""
    adapters: str = ""

    def __str__(self) -> str:
        lines = [f"{self.architecture}: {self.strategy}"]
        if self.attention is not None:
            lines.append(f"  attention: {self.attention}, {self.attention_reason}")
        lines += [f"  not {name}: {reason}" for name, reason in self.rejected.items()]
        if self.longest_shared is not None:
            lines.append(f"  more than {self.longest_shared} tokens: {self.long_strategy}")
        lines.append(f"  logits: {self.logits}")
        parts = {
            "batches": self.batches,
            "matrix unit": self.matrix_unit,
            "products": self.products,
            "own kernels": self.fused,
            "last layer": self.last_layer,
            "adapters": self.adapters,
        }
        return "\n".join([*lines, *(f"  {what}: {which}" for what, which in parts.items() if which)])


@dataclass(frozen=True)
class Ways:
    """The strategies that passed.

    Attributes:
        plan: The same to be printed; how logits are reached is not known here.
        usual: For sequences of at most `plan.longest_shared` tokens.
        padded: For longer ones, up to `longest_padded` tokens.
        longest_padded: None: there is no such limit.
        alone: For the longest.
        own_logits: For what needs the model's own logits, like `padded`.
    """

    plan: ScorerPlan
    usual: Strategy[Any]
    padded: PaddedBatches
    longest_padded: int | None
    alone: OneByOne
    own_logits: PaddedBatches

    def groups(self, lengths: Sequence[int]) -> list[tuple[Strategy[Any], list[int]]]:
        """Groups sequences by the strategy that they take; each place is in one group."""
        places: dict[Strategy[Any], list[int]] = {}
        for place, length in enumerate(lengths):
            places.setdefault(self._strategy(length), []).append(place)
        return list(places.items())

    def without_sharing(self, lengths: Sequence[int]) -> list[tuple[Strategy[Any], list[int]]]:
        """Groups as `groups` does, for when the model's own logits are needed."""
        return replace(self, usual=self.own_logits, padded=self.own_logits).groups(lengths)

    def _strategy(self, length: int) -> Strategy[Any]:
        if self.longest_padded is not None and length > self.longest_padded:
            return self.alone
        longest = self.plan.longest_shared
        within = longest is None or length <= longest
        return self.usual if within else self.padded


# A further trial that a strategy has to pass: why it does not, or None.
Trial = Callable[[Strategy[Any]], str | None]


def find_ways(
    body: Body,
    *,
    batch_invariant: bool = False,
    own_logits: bool = False,
    attention: Attention | None = None,
    gradients: Trial | None = None,
) -> Ways:
    """Tries the strategies from the fastest on; the model has to be in evaluation mode.

    Args:
        body: The language model.
        batch_invariant: Whether a sequence's states may not depend on what else is in the batch.
        own_logits: Whether the model's own logits will be needed.
        attention: The only way of attending in packed trees that will do; None: the fastest that passes.
        gradients: What a strategy has to pass besides to be trained with; those that cannot be are then left out.

    Raises:
        VheadError: The model cannot take the asked-for attention.
        ValueError: There is no such attention, or it is asked for together with batch invariance.
    """
    if attention is not None and (batch_invariant or attention not in ATTENTIONS):
        expected = "None with batch_invariant" if batch_invariant else f"one of {', '.join(ATTENTIONS)}"
        raise ValueError(f"attention: expected {expected}, got {attention!r}")
    bounds = _Bounds.of(body)
    check = SelfCheck(body, probes(body.model, bounds.context))
    body.fused = check.fused()
    alone = OneByOne(body, forgets=bounds.rotary is not None)
    padded: PaddedBatches = alone if batch_invariant else PaddedBatches(body)
    rejected: dict[str, str] = {}
    reads_padding = body.plan.padding is Padding.LEFT_OUT
    reason = "the model reads padding" if reads_padding else check.padding(padded)
    reason = reason or (gradients(padded) if gradients else None)
    if reason is not None:
        padded, rejected = alone, {PaddedBatches.name: reason}
    candidates = _candidates(body, bounds, attention, batch_invariant=batch_invariant)
    if gradients is not None:
        candidates = [each for each in candidates if each.is_differentiable]
    usual, longest, reasons = _first(candidates, check, bounds, padded, gradients)
    architecture = type(body.model).__name__
    if attention is not None and usual is None:
        reason = next(iter(reasons.values()), f"no gradients flow through it on {body.device.type}")
        raise VheadError(
            f"attention: expected one that the {architecture} can take, got {attention!r}: {reason}; leave it at None "
            "to have the fastest one that the model can take"
        )
    chosen = usual or padded
    body.fused = check.selecting(chosen)
    plan = ScorerPlan(
        architecture=architecture,
        strategy=chosen.name,
        attention=chosen.attention,
        attention_reason=_why(chosen.attention, body.device.type, asked_for=attention is not None),
        rejected=reasons | rejected,
        longest_shared=longest,
        long_strategy=padded.name,
        products=body.fused.products,
        fused=body.fused.described(body.model),
        last_layer="" if body.fused.last is None else "where few rows are read, of those alone",
    )
    logits = alone if own_logits and not check.logits_agree(padded) else padded
    return Ways(plan, chosen, padded, bounds.batched, alone, logits)


def _candidates(
    body: Body, bounds: "_Bounds", attention: Attention | None, *, batch_invariant: bool
) -> Sequence[Strategy[Any]]:
    if batch_invariant:
        return [PromptThenCompletion(body)]
    if attention is not None:
        return [_packing(attention, body, bounds)]
    order = _ORDER.get(body.device.type, _ORDER["cpu"])
    return [*(_packing(name, body, bounds) for name in order), PrefixCache(body)]


@dataclass(frozen=True)
class _Bounds:
    """What a configuration says about lengths, None where it states no limit.

    Attributes:
        context: Tokens that the model takes.
        rotary: The length up to which rotary embeddings do not depend on the batch.
        batched: The length up to which a batch gives what each sequence gives alone.
        sliding: Whether there is a sliding window of the kind that attention is told of.
        other_window: How many tokens all other limits let a token see.
        window: How many tokens all limits together let a token see.
    """

    context: int | None
    rotary: int | None
    batched: int | None
    sliding: bool
    other_window: int | None
    window: int | None

    @classmethod
    def of(cls, body: Body) -> "_Bounds":
        """Reads them from a model and its configuration."""
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


def _packing(attention: Attention, body: Body, bounds: _Bounds) -> Strategy[Any]:
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
    candidates: Sequence[Strategy[Any]],
    check: SelfCheck,
    bounds: _Bounds,
    padded: PaddedBatches,
    gradients: Trial | None,
) -> tuple[Strategy[Any] | None, int | None, dict[str, str]]:
    """The first strategy that passes, the most tokens that it may be used for, and why those before it did not."""
    rejected: dict[str, str] = {}
    for candidate in candidates:
        windows = bounds.sliding and candidate.heeds_windows and check.windows(candidate) is None
        limit = _least(bounds.other_window if windows else bounds.window, bounds.batched)
        reason = check.shortness(limit) or check.sharing(candidate, last=None if windows else 1)
        reason = reason or _in_blocks(candidate, check, bounds, padded)
        reason = reason or (gradients(candidate) if gradients else None)
        if reason is None:
            return candidate, limit, rejected
        rejected[candidate.name] = reason
    return None, _least(bounds.window, bounds.batched), rejected


def _in_blocks(candidate: Strategy[Any], check: SelfCheck, bounds: _Bounds, padded: PaddedBatches) -> str | None:
    """The same check on several blocks of rows, where the strategy's kernel works in blocks."""
    if not candidate.works_in_blocks:
        return None
    body = check.body
    long = SelfCheck(body, probes(body.model, bounds.context, LONG))
    long.padding(padded)
    return long.sharing(candidate, last=None)


def _why(chosen: str | None, kind: str, *, asked_for: bool) -> str | None:
    if chosen is None:
        return None
    if asked_for:
        return "as asked for"
    first = _ORDER.get(kind, _ORDER["cpu"])[0]
    if chosen != first:
        return "the next one that passed its trial"
    return "the fastest measured on a CPU" if first == "segments" else "expected to be the fastest on CUDA"


def _least(*numbers: int | None) -> int | None:
    return min((number for number in numbers if number is not None), default=None)
