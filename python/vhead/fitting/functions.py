"""`vhead.fit`: from rollouts in a program to a head."""

import tempfile
from collections.abc import Iterable, Sequence, Sized
from pathlib import Path
from typing import Any

from torch import nn

from vhead.errors import FitError
from vhead.fitting.examples import Target, given_examples
from vhead.fitting.fitted import FittedHead
from vhead.fitting.fitting import (
    DEFAULT_CACHE_BYTES,
    DEFAULT_FOLDS,
    DEFAULT_ITERATIONS,
    ErrorHandler,
    FitOptions,
    few_prompts,
)
from vhead.fitting.reading import Reading
from vhead.fitting.two_layer import Loss
from vhead.rollouts.rollout import Rollout
from vhead.scoring.progress import ScoringProgress
from vhead.scoring.scorer import Scorer


def fit(
    scorer_or_model: Scorer | nn.Module,
    rollouts: Iterable[Rollout | tuple[Rollout, Rollout]],
    targets: Iterable[Any] | None = None,
    *,
    target: Target = "returns",
    weights: Iterable[Any] | None = None,
    gamma: float = 1.0,
    loss: Loss | None = None,
    strengths: float | Sequence[float] | None = None,
    folds: int = DEFAULT_FOLDS,
    intermediate_size: int | None = None,
    max_iterations: int = DEFAULT_ITERATIONS,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
    on_error: ErrorHandler | None = None,
    progress: bool = False,
) -> FittedHead:
    """Fits a head to rollouts on a frozen language model, in one pass of the model that keeps no gradients.

    The model is left as it is. A linear head for squared errors is ridge regression in closed form, from sums that take
    the same memory for any number of rollouts. The logistic loss and heads of two projections go over the hidden states
    several times, and keep them in a temporary folder.

    Figures are of held-out prompts: the rollouts of each fold of prompts are judged by heads that were fitted to the
    other folds. The strength that does best there is chosen, and the head is then fitted to all folds.

    Args:
        scorer_or_model: A scorer, whose batches, tokenizer and conventions are used and whose head is not; or a
            language model, with or without a head, which takes rollouts of token ids.
        rollouts: Those to fit to. For pairs, tuples of the chosen and the rejected one, or one after the other.
        targets: One for each rollout; none for pairs. For returns: `[C]` or `[C, K]`, a return for each completion
            token, of which those at tokens of the model's are read; or a number, the rollout's reward, which makes
            returns by `vhead.returns.discounted`. For reward: a number, or `[K]`.
        target: `"returns"`: values of tokens, read where the scorer reads values. `"reward"`: a number for each
            rollout, read where the scorer reads rewards. `"pairs"`: chosen rollouts are to have more reward.
        weights: How much each rollout or pair counts, 0 or more; or for returns, each completion token. None: 1.
        gamma: Discount of one token, for returns that are made of rewards.
        loss: `"squared"` or `"logistic"`, whose head gives log-odds. None: logistic for pairs, and for rewards that are
            all 0 or 1; squared for all others.
        strengths: What to choose the penalty on squared weights from, in the unit of scikit-learn's `alpha` for squared
            errors and of its `1 / C` for the logistic loss. None: a wide range.
        folds: How many parts prompts are divided into.
        intermediate_size: Elements between two projections, with a ReLU; None: one projection.
        max_iterations: Of L-BFGS, for two projections.
        cache_bytes: The most bytes of hidden states that are kept on the disk.
        on_error: Told of each rollout that cannot be used, which is then left out; None: the first one is raised.
        progress: Whether to show progress on standard error when that is a terminal.

    Raises:
        FieldError: A rollout cannot be scored, or its target or weight is missing, not finite, or of another length.
        FitError: There are no rollouts, fewer prompts than folds, or more or fewer targets than rollouts; targets that
            do not vary; a pair without a partner; no room for the sums of so many folds; or states for which there is
            no room or no solution.
        HeadError: `scorer_or_model` is neither.
        ValueError: An argument is out of range, or does not go with another one.
    """
    chosen = (strengths,) if isinstance(strengths, int | float) else None if strengths is None else tuple(strengths)
    options = FitOptions(target, gamma, loss, chosen, folds, intermediate_size, max_iterations, cache_bytes)
    if target == "pairs" and targets is not None:
        raise FitError("targets: expected none for pairs, whose first side is the better one, got some")
    if target != "pairs" and targets is None:
        raise FitError(f"targets: expected one for each rollout with target={target!r}, got none")
    # Whether items are pairs, or sides that follow each other, is known when they are read.
    if target != "pairs" and isinstance(rollouts, Sized) and 0 < len(rollouts) < folds:
        raise FitError(few_prompts(folds, f"at most {len(rollouts):,}"))
    examples = given_examples(rollouts, targets, weights, target)
    with tempfile.TemporaryDirectory(prefix="vhead-fit-") as folder, ScoringProgress(shown=progress) as display:
        reading = Reading(scorer_or_model)
        fitting = reading.fitting(options, Path(folder))
        for chunk in reading.chunks(examples, options, on_error=on_error, on_batch=display.advance):
            fitting.add(chunk.sources, chunk.scores, on_error)
        return fitting.result("vhead.fit")
