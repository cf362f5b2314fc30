"""Whether a strategy gives the gradients that one sequence at a time gives, tried when a training pass is made."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vhead.packing.gates import Fused
from vhead.packing.plan import ScorerPlan
from vhead.packing.self_check import probes
from vhead.packing.strategies import Batch, Body, OneByOne, PaddedBatches, Strategy
from vhead.training.layers import keeping_less
from vhead.upstream import warn_once

# Differences that count as rounding, as a part of the largest gradient.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
_HALF_TOLERANCE = 3e-2
# Of half precisions, how many times what padded batches differ from a sequence alone another strategy may differ.
_NOISE_FACTOR = 3.0
# How many times the tolerance an error on purpose has to exceed.
_CONTROL_FACTOR, _HALF_CONTROL_FACTOR = 4.0, 2.0
_UNLIMITED = 10**6
_PROMPT = 10


@dataclass(frozen=True)
class TrainingPlan:
    """How a training pass takes rollouts through one model; plain data, so that it can be printed, copied and sent.

    Attributes:
        packing: How rollouts are batched, and which faster strategies the model cannot take.
        gradients: What the trial of the gradients found.
        notes: What else holds for this model.
    """

    packing: ScorerPlan
    gradients: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join([str(self.packing), f"  gradients: {self.gradients}", *(f"  note: {n}" for n in self.notes)])


class GradientCheck:
    """Compares gradients of batches of a few short sequences with those of the same sequences alone.

    Compared are the gradients of the embedded tokens, through which all layers are seen, and of the vectors that are
    trained, such as norms and biases; larger weights would take as much memory again.

    Args:
        body: The language model, in evaluation mode.
        context: The most tokens of a sequence; None: there is no limit.

    Attributes:
        failure: Why gradients cannot be tried at all, or None.
    """

    def __init__(self, body: Body, context: int | None) -> None:
        self._body, self._sequences = body, probes(body.model, context)
        self._vectors = [p for p in body.model.parameters() if p.requires_grad and p.dim() <= 1]
        self._half = body.dtype not in _TOLERANCE
        self._relative = _TOLERANCE.get(body.dtype, _HALF_TOLERANCE)
        self._findings: dict[str, str] = {}
        self._layers: Fused | None = None
        generator = torch.Generator().manual_seed(0)
        width = _width(body)
        self._directions = [torch.randn(len(tokens), width, generator=generator) for tokens in self._sequences]
        self.failure = self._try_alone()

    def _try_alone(self) -> str | None:
        alone = OneByOne(self._body)
        try:
            batches = list(alone.batches(self._sequences, [], 1))
            found = [self._gradients(alone, [batch]) for batch in batches]
        except Exception as error:  # Whatever a model raises means that it cannot.
            return f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"
        self._embedded = [embedded[0] for embedded, _ in found]
        self._of_vectors = [torch.stack(each).sum(0) for each in zip(*(vectors for _, vectors in found), strict=True)]
        if not all(bool(gradient.abs().max() > 0) for gradient in self._embedded):
            return "no gradient reaches the embedded tokens"
        return None

    @property
    def layers(self) -> Fused:
        """Of the modules with kernels of this package, those that give the gradients of the model's own ones."""
        if self._layers is None:
            self._layers = self._body.fused if self.failure is None and self._layers_agree() else Fused()
        return self._layers

    def _layers_agree(self) -> bool:
        self._layers, alone = self._body.fused, OneByOne(self._body)
        return bool(self._difference(alone, list(alone.batches(self._sequences, [], 1))) <= self._relative)

    def __call__(self, strategy: Strategy[Any]) -> str | None:
        """Why this strategy cannot be trained with, or None."""
        if self.failure is not None:
            return self.failure
        self._layers = self.layers
        try:
            reason = self._try(strategy)
        except Exception as error:  # Whatever a model raises means that it cannot.
            lines = str(error).strip().splitlines()
            reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        if reason is not None:
            self._say(strategy, reason)
        return reason

    def _try(self, strategy: Strategy[Any]) -> str | None:
        batches = self._batches(strategy)
        difference = self._difference(strategy, batches)
        if isinstance(strategy, PaddedBatches):
            if self._half:
                self._relative = max(self._relative, _NOISE_FACTOR * difference)
            elif not difference <= self._relative:
                return f"its gradients differ from one sequence alone by {difference:.1e} of the largest"
            self._findings[strategy.name] = f"as one sequence alone has them, but for {difference:.1e} of the largest"
            return None
        if not difference <= self._relative:
            return f"its gradients differ from one sequence alone by {difference:.1e} of the largest"
        wrong = self._difference(strategy, [replace(b, content=strategy.spoilt(b.content)) for b in batches])
        factor = _HALF_CONTROL_FACTOR if self._half else _CONTROL_FACTOR
        if not wrong > factor * self._relative:
            return "its gradients cannot be tried, because wrong ones would look like right ones"
        self._findings[strategy.name] = (
            f"as one sequence alone has them, but for {difference:.1e} of the largest "
            f"(an error on purpose makes it {wrong:.1e})"
        )
        return self._while_training(strategy, batches)

    def _while_training(self, strategy: Strategy[Any], batches: Sequence[Batch[Any]]) -> str | None:
        """Why the strategy does not run in training mode, or None: some models drop attention weights there."""
        with torch.random.fork_rng(devices=[]), torch.no_grad(), _training(self._body.model):
            try:
                strategy.states(batches[0])
            except NotImplementedError as error:
                return str(error)
        return None

    def _say(self, strategy: Strategy[Any], reason: str) -> None:
        architecture = type(self._body.model).__name__
        costs = (
            ""
            if isinstance(strategy, PaddedBatches)
            else "; without packing, a prompt is computed once for each completion"
        )
        warn_once(f"{architecture} is not trained by {strategy.name}: {reason}{costs}")

    def finding(self, strategy: Strategy[Any]) -> str:
        """What was found of this strategy, to be printed."""
        if self.failure is not None:
            return f"not tried, because one sequence alone gives none: {self.failure}"
        return self._findings.get(strategy.name, "those of one sequence at a time")

    def _batches(self, strategy: Strategy[Any]) -> list[Batch[Any]]:
        prompts = [min(_PROMPT, len(sequence) - 1) for sequence in self._sequences]
        return list(strategy.batches(self._sequences, prompts, _UNLIMITED))

    def _difference(self, strategy: Strategy[Any], batches: Sequence[Batch[Any]]) -> float:
        """The largest difference of any gradient, as a part of the largest one of its kind."""
        found, vectors = self._gradients(strategy, batches)
        worst = 0.0
        for batch, gradient in zip(batches, found, strict=True):
            expected = torch.zeros_like(gradient)
            for place, rows in zip(batch.places, batch.rows, strict=True):
                index = torch.from_numpy(rows).to(gradient.device)
                expected.index_add_(0, index, self._embedded[place][: len(rows)])
            worst = max(worst, _relative(gradient, expected))
        # All vectors as one: a bias of keys, which no softmax sees, has a gradient of rounding alone.
        return max(worst, _relative(_joined(vectors), _joined(self._of_vectors)))

    @torch.enable_grad()
    def _gradients(self, strategy: Strategy[Any], batches: Sequence[Batch[Any]]) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of the embedded tokens `[N, H]` of each batch, and of the vectors, summed over batches."""
        embedded, sums = [], [torch.zeros_like(vector, dtype=torch.float64) for vector in self._vectors]
        for batch in batches:
            layers = Fused() if self._layers is None else self._layers
            with _embedded_tokens(self._body.model) as seen, keeping_less(self._body.model, layers):
                states = strategy.states(batch)
            loss = states.new_zeros((), dtype=torch.float64)
            for place, rows in zip(batch.places, batch.rows, strict=True):
                chosen = states.index_select(0, torch.from_numpy(rows).to(states.device))
                loss = loss + (chosen * self._directions[place].to(chosen)).double().sum()
            tokens = seen[-1]
            first, *others = torch.autograd.grad(loss, [tokens, *self._vectors], allow_unused=True)
            first = torch.zeros_like(tokens) if first is None else first
            embedded.append(first.flatten(0, 1).double())
            for total, gradient in zip(sums, others, strict=True):
                if gradient is not None:
                    total.add_(gradient)
        return embedded, sums


def _relative(found: Tensor, expected: Tensor) -> float:
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    difference = float((found - expected).abs().max()) if expected.numel() else 0.0
    if math.isnan(difference) or math.isnan(largest):
        return math.inf
    return difference / largest if largest else difference


def _joined(vectors: Sequence[Tensor]) -> Tensor:
    """All numbers of vectors that may be on several devices."""
    return torch.cat([vector.flatten().cpu() for vector in vectors]) if vectors else torch.empty(0)


def _width(body: Body) -> int:
    """Elements of a hidden state."""
    with torch.no_grad():
        return body.states(torch.zeros(1, 1, dtype=torch.long)).shape[-1]


@contextmanager
def _embedded_tokens(model: nn.Module) -> Iterator[list[Tensor]]:
    """The embedded tokens of each run while the block lasts, as the leaves that gradients are taken of."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    handle = model.get_input_embeddings().register_forward_hook(keep)  # type: ignore[operator]
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Training mode while the block lasts; every module as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.train()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
