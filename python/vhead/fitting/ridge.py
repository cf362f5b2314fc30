"""Ridge regression in closed form, with a strength that held-out folds choose from the same sums."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vhead.errors import FitError
from vhead.fitting.fitted import Solution
from vhead.fitting.metrics import Agreement
from vhead.fitting.moments import FoldMoments, Moments

# Times the mean of the eigenvalues of the centred sums.
_RELATIVE = tuple(10.0**exponent for exponent in range(-9, 3))
# Of these, every third is tried first, from the second on.
_COARSE = slice(1, None, 3)

EXPECTED_STATES = "expected hidden states that vary, as a head has nothing else to tell rollouts apart by"


def fit_ridge(moments: FoldMoments, strengths: Sequence[float] | None) -> Solution:
    """The linear map that minimises the weighted squared error plus `strength` times the squared weights.

    The intercept is not penalised. Each output has the strength with which the maps of the other folds do best on each
    fold; the map itself is of all folds.

    Args:
        moments: The sums.
        strengths: What to choose from; None: powers of ten from 1e-9 to 1e2 times the mean sum of squares.

    Raises:
        FitError: The states do not vary; or they are linearly dependent, and no strength makes up for that.
    """
    total = moments.total()
    xx, xy = total.centred()
    scale = xx.diagonal().mean().item()
    if not scale > 0.0:
        raise FitError(f"rollouts: {EXPECTED_STATES}, got the same ones everywhere")
    candidates = tuple(strengths or (scale * factor for factor in _RELATIVE))
    if strengths:
        held_out = _held_out(moments, total, dict(enumerate(candidates)))
    else:
        held_out = _climbed(moments, total, candidates)
    chosen = _best(held_out)
    weight = torch.empty_like(xy.T)
    for output, place in enumerate(chosen):
        found = solved(xx, xy[:, output : output + 1], candidates[place])
        if found is None or not held_out[place].squared_error[output].isfinite():
            raise FitError(
                f"strengths: expected one that is large enough for hidden states that depend on each other linearly, "
                f"got {', '.join(f'{strength:g}' for strength in candidates)}"
            )
        weight[output] = found[:, 0]
    bias = (total.y - weight @ total.x) / total.weight + moments.shift_y - weight @ moments.shift_x
    figures = _of_outputs(held_out, chosen).figures(moments.shift_y)
    return Solution(((weight.cpu(), bias.cpu()),), tuple(candidates[place] for place in chosen), figures)


def solved(xx: Tensor, xy: Tensor, strength: float) -> Tensor | None:
    """The solution `[H, K]` of `(xx + strength) w = xy`, None where the matrix is singular."""
    # Changed and put back, as a copy of the whole matrix takes half as long again as its decomposition.
    diagonal = xx.diagonal()
    own = diagonal.clone()
    try:
        diagonal.add_(strength)
        factor, info = torch.linalg.cholesky_ex(xx)
    finally:
        diagonal.copy_(own)
    return None if info else torch.cholesky_solve(xy, factor)


def _climbed(moments: FoldMoments, total: Moments, candidates: Sequence[float]) -> dict[int, Agreement]:
    """How strengths do around those that do best: each trial of one costs a decomposition for each fold.

    The largest fold says from a few strengths where to begin. From there all folds go on to better neighbours, so that
    no strength is out of reach.
    """
    largest = int(torch.stack([moments[fold].weight for fold in range(len(moments))]).argmax())
    coarse = {place: candidates[place] for place in range(len(candidates))[_COARSE]}
    found = dict[int, Agreement]()
    best = _best(_held_out(moments, total, coarse, folds=(largest,)))
    while untried := _nearby(best, len(candidates)) - found.keys():
        found |= _held_out(moments, total, {place: candidates[place] for place in sorted(untried)})
        best = _best(found)
    return found


def _nearby(places: Sequence[int], count: int) -> set[int]:
    return {place + step for place in places for step in (-1, 0, 1)} & set(range(count))


def _best(held_out: Mapping[int, Agreement]) -> list[int]:
    """The place of the strength that does best, for each output."""
    places = sorted(held_out)
    errors = torch.stack([held_out[place].squared_error.nan_to_num(torch.inf) for place in places])
    return [places[at] for at in errors.argmin(0).tolist()]


def _held_out(
    moments: FoldMoments, total: Moments, strengths: Mapping[int, float], folds: Sequence[int] | None = None
) -> dict[int, Agreement]:
    """For each strength, how the maps of the other folds do on each of these folds (None: all), taken together."""
    sums: dict[int, Agreement] = {}
    for fold in range(len(moments)) if folds is None else folds:
        held = moments[fold]
        others = total - held
        xx, xy = others.centred()
        for place, strength in strengths.items():
            weight = solved(xx, xy, strength)
            found = _agreement(held, others, torch.full_like(xy, torch.nan) if weight is None else weight)
            sums[place] = sums[place] + found if place in sums else found
    return sums


def _agreement(held: Moments, others: Moments, weight: Tensor) -> Agreement:
    """How a map `[H, K]` of other folds does on a fold, from that fold's sums."""
    intercept = (others.y - others.x @ weight) / others.weight
    projected = held.x @ weight
    return Agreement(
        weight=held.weight.expand_as(intercept),
        p=held.weight * intercept + projected,
        y=held.y,
        pp=held.weight * intercept**2 + 2 * intercept * projected + (weight * (held.xx @ weight)).sum(0),
        py=intercept * held.y + (weight * held.xy).sum(0),
        yy=held.yy,
    )


def _of_outputs(held_out: Mapping[int, Agreement], chosen: Sequence[int]) -> Agreement:
    """Each output's sums at the strength that was chosen for it."""
    names = Agreement.__dataclass_fields__
    parts = {
        name: torch.stack([getattr(held_out[place], name)[output] for output, place in enumerate(chosen)])
        for name in names
    }
    return Agreement(**parts)
