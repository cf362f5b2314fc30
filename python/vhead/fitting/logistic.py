"""Logistic regression by Newton's method on stored states: binary rewards, and preference pairs."""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeVar

import torch
from torch import Tensor

from vhead.errors import FitError
from vhead.fitting.fitted import Solution
from vhead.fitting.metrics import Agreement, Verdicts
from vhead.fitting.moments import gram
from vhead.fitting.ridge import EXPECTED_STATES, solved
from vhead.fitting.store import Block, StateStore

# Times the mean of the eigenvalues of the loss's curvature where nothing is known yet.
_RELATIVE = tuple(10.0**exponent for exponent in range(-6, 2))
_MOST_STEPS = 60
_MOST_HALVINGS = 12
# How far a sum of losses may be off by rounding.
_ROUNDING = 1e-14
# Newton's decrement, per unit of weight, below which more steps change nothing that matters.
_CONVERGED = 1e-18
_NOBODY = -1

Sums = TypeVar("Sums", Verdicts, Agreement)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """What logistic regression is of: rows with outcomes 0 or 1, or differences between the two sides of pairs.

    Attributes:
        store: The states; of a pair, first the chosen side's and then the rejected one's.
        is_pairs: Which of the two.
        mean: What states are shifted by, `[H]`, float64; zeros for pairs.
    """

    store: StateStore
    is_pairs: bool
    mean: Tensor

    @classmethod
    def of(cls, store: StateStore, *, is_pairs: bool) -> "Rows":
        """Finds the mean in a pass over the states."""
        mean, count = torch.zeros(next(store.blocks()).states.shape[1], dtype=torch.float64), 0.0
        if not is_pairs:
            for block in store.blocks():
                mean += block.weights @ block.states.double()
                count += block.weights.sum().item()
            mean /= count
        return cls(store, is_pairs, mean)

    def blocks(self) -> Iterator[Block]:
        """The rows in order, with float64 states, shifted or subtracted."""
        for block in self.store.blocks(multiple=2 if self.is_pairs else 1):
            states = block.states.double()
            if self.is_pairs:
                yield Block(states[::2] - states[1::2], block.targets[::2], block.weights[::2], block.folds[::2])
            else:
                yield Block(states - self.mean, block.targets, block.weights, block.folds)

    def curvature(self) -> float:
        """The mean eigenvalue of the loss's second derivative where all odds are even."""
        total = sum((block.weights @ block.states.square()).sum().item() for block in self.blocks())
        return total / 4 / len(self.mean)


def fit_logistic(store: StateStore, *, is_pairs: bool, folds: int, strengths: Sequence[float] | None) -> Solution:
    """The linear map that minimises the weighted logistic loss plus `strength / 2` times the squared weights.

    Pairs have no intercept, and binary rewards have one that is not penalised. Each output has the strength with which
    the maps of the other folds do best on each fold; the map itself is of all folds.

    Args:
        store: The states, with outcomes 0 or 1.
        is_pairs: Whether each two rows are a pair.
        folds: How many folds there are.
        strengths: What to choose from; None: 8 of them, from 1e-6 to 10 times the mean curvature.

    Raises:
        FitError: The states do not vary, or no strength gives a solution.
    """
    rows = Rows.of(store, is_pairs=is_pairs)
    scale = rows.curvature()
    if not scale > 0.0:
        got = "both sides of each pair with the same ones" if is_pairs else "the same ones everywhere"
        raise FitError(f"rollouts: {EXPECTED_STATES}, got {got}")
    # From the strongest on, so that each solution is near the one before.
    candidates = sorted(strengths or (scale * factor for factor in _RELATIVE), reverse=True)
    outputs = next(store.blocks()).targets.shape[1]
    parts = [_fit_output(rows, output, folds, candidates) for output in range(outputs)]
    weight = torch.stack([part.map[:-1] for part in parts])
    bias = None if is_pairs else torch.stack([part.map[-1] for part in parts]) - weight @ rows.mean
    figures = {name: [part.figures[name][0] for part in parts] for name in parts[0].figures}
    return Solution(((weight, bias),), tuple(part.strength for part in parts), figures)


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """One output's map `[H + 1]`, with its strength and figures."""

    map: Tensor
    strength: float
    figures: dict[str, list[Any]]


def _fit_output(rows: Rows, output: int, folds: int, strengths: Sequence[float]) -> _Part:
    verdicts: list[list[Verdicts]] = [[] for _ in strengths]
    agreements: list[list[Agreement]] = [[] for _ in strengths]
    for fold in range(folds):
        found = None
        for place, strength in enumerate(strengths):
            found = _newton(rows, output, fold, strength, found)
            verdict, agreement = _judged(rows, output, fold, found)
            verdicts[place].append(verdict)
            agreements[place].append(agreement)
    sums = [_sum(each) for each in verdicts]
    losses = torch.stack([(each.loss / each.weight).nan_to_num(torch.inf)[0] for each in sums])
    best = int(losses.argmin())
    if not losses[best].isfinite():
        raise FitError(f"strengths: expected larger ones, got {', '.join(f'{s:g}' for s in strengths)}")
    figures = sums[best].figures()
    if not rows.is_pairs:
        # As probabilities against outcomes, for a figure that reads like the squared loss's.
        figures |= {"explained_variance": _sum(agreements[best]).figures(torch.zeros(1))["explained_variance"]}
    return _Part(_path(rows, output, strengths[: best + 1]), strengths[best], figures)


def _path(rows: Rows, output: int, strengths: Sequence[float]) -> Tensor:
    """The map of all folds, reached over the stronger penalties."""
    found = None
    for strength in strengths:
        found = _newton(rows, output, _NOBODY, strength, found)
    if found is None:
        raise FitError("strengths: expected at least one, got none")
    return found


def _sum(parts: Sequence[Sums]) -> Sums:
    return reduce(operator.add, parts)


def _newton(rows: Rows, output: int, left_out: int, strength: float, start: Tensor | None) -> Tensor:
    """The map `[H + 1]`, intercept last, of all folds but one."""
    zeros = torch.zeros(len(rows.mean) + 1, dtype=torch.float64)
    current = zeros if start is None or not start.isfinite().all() else start
    loss, gradient, curvature, weight = _derivatives(rows, output, left_out, strength, current)
    for _ in range(_MOST_STEPS):
        step = solved(curvature, gradient[:, None], 0.0)
        if step is None:
            return torch.full_like(current, torch.nan)
        direction = step[:, 0]
        if gradient @ direction <= _CONVERGED * weight:
            return current - direction
        size = 1.0
        for _ in range(_MOST_HALVINGS):
            moved = current - size * direction
            found = _derivatives(rows, output, left_out, strength, moved)
            if found[0] <= loss + _ROUNDING * abs(loss):
                break
            size /= 2
        else:
            return current
        current = moved
        loss, gradient, curvature, weight = found
    return current


def _derivatives(
    rows: Rows, output: int, left_out: int, strength: float, at: Tensor
) -> tuple[float, Tensor, Tensor, float]:
    """The penalised loss at a map, its two derivatives `[H + 1]` and `[H + 1, H + 1]`, and the weight of all rows."""
    width = len(at) - 1
    loss, total = strength / 2 * (at[:-1] @ at[:-1]).item(), 0.0
    gradient = torch.zeros_like(at)
    gradient[:-1] = strength * at[:-1]
    curvature = torch.zeros(width + 1, width + 1, dtype=torch.float64)
    curvature.diagonal()[:-1] = strength
    for block in rows.blocks():
        w = block.weights * (block.folds != left_out)
        z, y = block.states @ at[:-1] + at[-1], block.targets[:, output]
        p = z.sigmoid()
        loss += (w * (torch.nn.functional.softplus(z) - y * z)).sum().item()
        total += w.sum().item()
        error, spread = w * (p - y), w * p * (1 - p)
        gradient[:-1] += error @ block.states
        curvature[:-1, :-1] += gram(block.states * spread.sqrt()[:, None])
        if not rows.is_pairs:
            cross = spread @ block.states
            gradient[-1] += error.sum()
            curvature[-1, :-1] += cross
            curvature[:-1, -1] += cross
            curvature[-1, -1] += spread.sum()
    if rows.is_pairs:
        curvature[-1, -1] = 1.0
    return loss, gradient, curvature, total


def _judged(rows: Rows, output: int, fold: int, found: Tensor) -> tuple[Verdicts, Agreement]:
    """What a map says about one fold."""
    logits, outcomes, weights = [], [], []
    for block in rows.blocks():
        own = block.folds == fold
        logits.append(block.states[own] @ found[:-1] + found[-1])
        outcomes.append(block.targets[own, output])
        weights.append(block.weights[own])
    z, y, w = torch.cat(logits)[:, None], torch.cat(outcomes)[:, None], torch.cat(weights)
    return Verdicts.of(z, y, w, is_pair=rows.is_pairs), Agreement.of(z.sigmoid(), y, w)
