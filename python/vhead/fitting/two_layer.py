"""Heads of two projections with a ReLU between them, fitted by L-BFGS on stored states."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from vhead.errors import FitError
from vhead.fitting.fitted import Solution
from vhead.fitting.metrics import Agreement, Verdicts
from vhead.fitting.store import Block, StateStore

Loss = Literal["squared", "logistic"]

# Of the mean loss in units of the targets' variance; the states have variance 1.
_STRENGTHS = (1e-4, 1e-3, 1e-2)
_NOBODY = -1
_HISTORY = 10


@dataclass(frozen=True, slots=True, eq=False)
class _Scale:
    """What makes states and targets ones of mean 0 and variance 1.

    Attributes:
        mean: Of the states, `[H]`, float32.
        std: Likewise.
        centre: Of the targets, `[K]`, float64; zeros for outcomes.
        spread: Likewise; ones for outcomes.
    """

    mean: Tensor
    std: Tensor
    centre: Tensor
    spread: Tensor

    @classmethod
    def of(cls, store: StateStore, loss: Loss) -> "_Scale":
        first = next(store.blocks())
        shift, centre = first.states[0].double(), first.targets[0]
        sums = [torch.zeros_like(each) for each in (shift, shift, centre, centre)]
        total = 0.0
        for block in store.blocks():
            x, y, w = block.states.double() - shift, block.targets - centre, block.weights
            for place, added in enumerate((w @ x, w @ x**2, w @ y, w @ y**2)):
                sums[place] += added
            total += w.sum().item()
        x, xx, y, yy = (each / total for each in sums)
        std, spread = (xx - x**2).clamp(min=0).sqrt(), (yy - y**2).clamp(min=0).sqrt()
        # A state that never varies says nothing, and is not to be blown up.
        std = torch.where(std > 0, std, 1.0)
        if loss == "logistic":
            return cls((x + shift).float(), std.float(), torch.zeros_like(y), torch.ones_like(y))
        return cls((x + shift).float(), std.float(), y + centre, spread)


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    """What is fitted."""

    store: StateStore
    scale: _Scale
    loss: Loss
    is_pairs: bool
    intermediate_size: int
    max_iterations: int

    def drawn(self) -> "_Head":
        """A new head for scaled states, the same each time."""
        generator = torch.Generator().manual_seed(0)
        width, outputs = len(self.scale.mean), len(self.scale.centre)
        first = torch.randn(self.intermediate_size, width, generator=generator) * (2 / width) ** 0.5
        second = torch.randn(outputs, self.intermediate_size, generator=generator) * self.intermediate_size**-0.5
        return _Head(first, torch.zeros(self.intermediate_size), second, torch.zeros(outputs))

    def outputs(self, head: "_Head", block: Block) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Outputs and scaled targets `[N, K]`, weights and folds `[N]`; of pairs, the difference of both sides."""
        found = head((block.states - self.scale.mean) / self.scale.std)
        targets = ((block.targets - self.scale.centre) / self.scale.spread).float()
        if self.is_pairs:
            return found[::2] - found[1::2], targets[::2], block.weights[::2], block.folds[::2]
        return found, targets, block.weights, block.folds

    def blocks(self) -> Iterator[Block]:
        """All rows, some at a time."""
        return self.store.blocks(multiple=2 if self.is_pairs else 1)


@dataclass(frozen=True, slots=True, eq=False)
class _Head:
    """Two projections, float32; the weights are `[I, H]` and `[K, I]`."""

    first: Tensor
    first_bias: Tensor
    second: Tensor
    second_bias: Tensor

    def __call__(self, states: Tensor) -> Tensor:
        hidden = functional.linear(states, self.first, self.first_bias).relu()
        return functional.linear(hidden, self.second, self.second_bias)

    def trainable(self, *, is_pairs: bool) -> list[Tensor]:
        """What is trained; both sides of a pair have the last bias, so that nothing can be learnt about it."""
        tensors = [self.first, self.first_bias, self.second, *([] if is_pairs else [self.second_bias])]
        return [tensor.requires_grad_() for tensor in tensors]


def fit_two_layer(
    store: StateStore,
    *,
    loss: Loss,
    is_pairs: bool,
    folds: int,
    strengths: Sequence[float] | None,
    intermediate_size: int,
    max_iterations: int,
) -> Solution:
    """The head of two projections that minimises the mean loss plus `strength` times the mean squared weights' sum.

    The strength is the one with which the heads of the other folds do best on each fold; the head is of all folds.

    Args:
        store: The states.
        loss: Of scaled targets, or of outcomes 0 and 1.
        is_pairs: Whether each two rows are a pair.
        folds: How many folds there are.
        strengths: What to choose from; None: 1e-4, 1e-3 and 1e-2.
        intermediate_size: Elements between the projections.
        max_iterations: Of L-BFGS.

    Raises:
        FitError: No strength gives finite weights.
    """
    task = _Task(store, _Scale.of(store, loss), loss, is_pairs, intermediate_size, max_iterations)
    candidates = tuple(strengths or _STRENGTHS)
    judged = [_held_out(task, folds, strength) for strength in candidates]
    best = min(range(len(candidates)), key=lambda place: judged[place][0])
    if not torch.tensor(judged[best][0]).isfinite():
        raise FitError(f"strengths: expected larger ones, got {', '.join(f'{s:g}' for s in candidates)}")
    head = _trained(task, _NOBODY, candidates[best])
    outputs = len(task.scale.centre)
    return Solution(_unscaled(task.scale, head, is_pairs=is_pairs), (candidates[best],) * outputs, judged[best][1])


def _held_out(task: _Task, folds: int, strength: float) -> tuple[float, dict[str, list[Any]]]:
    """The loss of the heads of the other folds on each fold, and figures about it."""
    agreement: Agreement | None = None
    verdicts: Verdicts | None = None
    for fold in range(folds):
        head = _trained(task, fold, strength)
        for block in task.blocks():
            found, targets, weights, own = task.outputs(head, block)
            rows = own == fold
            found, targets, weights = found[rows], targets[rows], weights[rows]
            said = found.sigmoid() if task.loss == "logistic" else found * task.scale.spread
            one = Agreement.of(said, targets * task.scale.spread, weights)
            agreement = one if agreement is None else agreement + one
            if task.loss == "logistic":
                counted = Verdicts.of(found, targets, weights, is_pair=task.is_pairs)
                verdicts = counted if verdicts is None else verdicts + counted
    if agreement is None:
        raise FitError("rollouts: expected at least one, got none")
    if verdicts is None:
        error = (agreement.squared_error / agreement.weight / task.scale.spread**2).mean()
        return error.nan_to_num(torch.inf).item(), agreement.figures(task.scale.centre)
    figures: dict[str, list[Any]] = verdicts.figures()
    if not task.is_pairs:
        figures |= {"explained_variance": agreement.figures(task.scale.centre)["explained_variance"]}
    return (verdicts.loss / verdicts.weight).mean().nan_to_num(torch.inf).item(), figures


def _trained(task: _Task, left_out: int, strength: float) -> _Head:
    """The head of all folds but one."""
    head = task.drawn()
    trained = head.trainable(is_pairs=task.is_pairs)
    optimiser: Any = torch.optim.LBFGS(
        trained, max_iter=task.max_iterations, history_size=_HISTORY, line_search_fn="strong_wolfe"
    )
    with torch.enable_grad():
        optimiser.step(_objective(task, head, trained, left_out, strength))
    return _Head(*(getattr(head, f.name).detach() for f in fields(head)))


def _objective(
    task: _Task, head: _Head, trained: Sequence[Tensor], left_out: int, strength: float
) -> Callable[[], float]:
    """Computes the penalised mean loss, and leaves its gradients at what is trained."""
    total = sum(((block.weights * (block.folds != left_out)).sum().item() for block in task.blocks()), 0.0)
    # Both rows of a pair have its weight.
    total = total / 2 if task.is_pairs else total

    def evaluate() -> float:
        penalty = strength * (head.first.square().sum() + head.second.square().sum())
        value, gradients = penalty.item(), torch.autograd.grad(penalty, trained, allow_unused=True)
        for tensor, gradient in zip(trained, gradients, strict=True):
            tensor.grad = torch.zeros_like(tensor) if gradient is None else gradient
        for block in task.blocks():
            found, targets, weights, folds = task.outputs(head, block)
            w = (weights * (folds != left_out) / total).float()[:, None]
            loss = (w * _losses(task.loss, found, targets)).sum() / found.shape[1]
            value += loss.item()
            for tensor, gradient in zip(trained, torch.autograd.grad(loss, trained), strict=True):
                tensor.grad = gradient if tensor.grad is None else tensor.grad + gradient
        return value

    return evaluate


def _losses(loss: Loss, found: Tensor, targets: Tensor) -> Tensor:
    if loss == "logistic":
        return functional.softplus(found) - targets * found
    return (found - targets).square()


def _unscaled(scale: _Scale, head: _Head, *, is_pairs: bool) -> tuple[tuple[Tensor, Tensor | None], ...]:
    """The projections for states and targets as they are."""
    weight = head.first.double() / scale.std.double()
    bias = head.first_bias.double() - weight @ scale.mean.double()
    last = head.second.double() * scale.spread[:, None]
    shift = None if is_pairs else head.second_bias.double() * scale.spread + scale.centre
    return (weight, bias), (last, shift)
