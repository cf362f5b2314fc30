"""What has been read off the rollouts so far, and the head that comes of it."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vhead import returns
from vhead.errors import FieldError, FitError, RecordError
from vhead.fitting.examples import FINITE, LARGEST, TARGETS, Example, Target
from vhead.fitting.fitted import FittedHead, Solution
from vhead.fitting.folds import Folds
from vhead.fitting.logistic import fit_logistic
from vhead.fitting.metrics import bounds
from vhead.fitting.moments import FoldMoments, bytes_of_sums
from vhead.fitting.ridge import fit_ridge
from vhead.fitting.store import StateStore
from vhead.fitting.two_layer import Loss, fit_two_layer
from vhead.scoring.scores import Scores

DEFAULT_FOLDS = 5
DEFAULT_CACHE_BYTES = 16 * 2**30
DEFAULT_ITERATIONS = 100
LOSSES: tuple[Loss, ...] = ("squared", "logistic")

ErrorHandler = Callable[[RecordError], None]


@dataclass(frozen=True)
class FitOptions:
    """How a head is fitted; the attributes are the arguments of `vhead.fit`.

    Raises:
        ValueError: One of them is out of range, or does not go with another one.
    """

    target: Target = "returns"
    gamma: float = 1.0
    loss: Loss | None = None
    strengths: tuple[float, ...] | None = None
    folds: int = DEFAULT_FOLDS
    intermediate_size: int | None = None
    max_iterations: int = DEFAULT_ITERATIONS
    cache_bytes: int = DEFAULT_CACHE_BYTES

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ValueError(f"target: expected one of {', '.join(TARGETS)}, got {self.target!r}")
        if not 0.0 <= self.gamma <= 1.0:
            raise ValueError(f"gamma: expected a number in [0, 1], got {self.gamma!r}")
        if self.target != "returns" and self.gamma != 1.0:
            expected = f"none with target={self.target!r}, as only returns are discounted"
            raise ValueError(f"gamma: expected {expected}, got {self.gamma!r}")
        if self.loss not in (None, *LOSSES):
            raise ValueError(f"loss: expected None, {' or '.join(LOSSES)}, got {self.loss!r}")
        allowed = {"returns": (None, "squared"), "reward": (None, *LOSSES), "pairs": (None, "logistic")}[self.target]
        if self.loss not in allowed:
            raise ValueError(f"loss: expected {allowed[-1]} for target={self.target!r}, got {self.loss}")
        for name, least in (("folds", 2), ("intermediate_size", 1), ("max_iterations", 1), ("cache_bytes", 1)):
            number = getattr(self, name)
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < least):
                raise ValueError(f"{name}: expected a whole number from {least} on, got {number!r}")
        if self.strengths is not None and not (
            self.strengths and all(0.0 <= each < float("inf") for each in self.strengths)
        ):
            raise ValueError(f"strengths: expected finite numbers, 0 or more, got {self.strengths!r}")

    @property
    def reads(self) -> str:
        """The column of the scores that has the hidden states: at every token, or at the last one alone."""
        return "values" if self.target == "returns" else "reward"


@dataclass(slots=True, eq=False)
class _Rows:
    """States `[N, H]`, targets `[N, K]`, weights `[N]` and folds `[N]` of a chunk."""

    states: NDArray[np.float32]
    targets: NDArray[np.float64]
    weights: NDArray[np.float64]
    folds: NDArray[np.int64]


class Fitting:
    """Adds up what comes of the rollouts, and solves for the head at the end.

    Args:
        options: How.
        hidden_size: H.
        device: Where sums are added up.
        folder: Where states are kept that are needed more than once.
        dtype: Gives the dtype of the model's states, once there are some.

    Attributes:
        rollouts: How many rollouts have been added.
        tokens: How many of their states.

    Raises:
        FitError: There is no room for the sums of so many folds.
    """

    def __init__(
        self, options: FitOptions, hidden_size: int, device: torch.device, folder: Path, dtype: Callable[[], str]
    ) -> None:
        self._options = options
        self._hidden_size = hidden_size
        self._device = device
        _check_room(options.folds, hidden_size if self._needs_moments else 1, device)
        self._folder = folder
        self._dtype = dtype
        self._folds = Folds(options.folds)
        self._moments: FoldMoments | None = None
        self._store: StateStore | None = None
        self._bounds: NDArray[np.float64] | None = None
        self._weights = np.zeros(options.folds)
        self._is_binary = options.target == "reward" and options.loss != "squared"
        self.rollouts = 0
        self.tokens = 0

    def add(self, examples: Sequence[Example], scores: Scores, on_error: ErrorHandler | None) -> None:
        """Adds examples and the hidden states at their tokens.

        Args:
            examples: Checked.
            scores: Of their rollouts, with states in place of values or rewards.
            on_error: Told of each example whose target does not fit its tokens; None: the first one is raised.

        Raises:
            FieldError: A target or a weight has another length than the completion, or is not finite; and `on_error` is
                None.
            FitError: The states take too much room on the disk, or an outcome is neither 0 nor 1.
        """
        if self._options.reads == "values":
            rows = self._token_rows(examples, scores, on_error)
        else:
            rows = self._rollout_rows(examples, scores)
        if not len(rows.states):
            return
        self._weights += np.bincount(rows.folds, rows.weights, len(self._weights))
        self._widen(rows.targets[rows.weights > 0])
        self._heed_outcomes(rows.targets)
        if self._needs_moments:
            self._own_moments(rows.targets.shape[1]).add(rows.states, rows.targets, rows.weights, rows.folds)
        if self._needs_store:
            self._own_store(rows.targets.shape[1]).append(rows.states, rows.targets, rows.weights, rows.folds)
        self.tokens += len(rows.states)

    def _widen(self, targets: NDArray[np.float64]) -> None:
        before = [] if self._bounds is None else [self._bounds]
        if len(targets):
            self._bounds = bounds(np.concatenate([*before, targets]))

    @property
    def _needs_store(self) -> bool:
        options = self._options
        return options.intermediate_size is not None or options.target == "pairs" or self._is_binary

    @property
    def _needs_moments(self) -> bool:
        options = self._options
        return options.intermediate_size is None and options.target != "pairs" and options.loss != "logistic"

    def _own_moments(self, outputs: int) -> FoldMoments:
        if self._moments is None:
            self._moments = FoldMoments(self._options.folds, self._hidden_size, outputs, self._device)
        return self._moments

    def _own_store(self, outputs: int) -> StateStore:
        if self._store is None:
            budget = self._options.cache_bytes
            self._store = StateStore(self._folder, self._hidden_size, outputs, self._dtype(), budget)
            self._store.cut(0)
        return self._store

    def _heed_outcomes(self, targets: NDArray[np.float64]) -> None:
        """Rewards that are not all 0 or 1 are no outcomes, and what was kept for these is given up."""
        if not self._is_binary or ((targets == 0) | (targets == 1)).all():
            return
        other = targets[(targets != 0) & (targets != 1)][0]
        if self._options.loss == "logistic":
            raise FitError(f"targets: expected 0 and 1 for the logistic loss, got {other:g}")
        self._is_binary = False
        if self._store is not None and not self._needs_store:
            self._store.cut(0)
            self._store = None

    def _rollout_rows(self, examples: Sequence[Example], scores: Scores) -> _Rows:
        states = scores.reward.reshape(len(scores), -1)
        each = len(states) // max(len(examples), 1)
        self.rollouts += len(states)
        outputs = len(examples[0].target) if examples else 1
        targets = np.stack([example.target for example in examples]) if examples else np.empty((0, outputs))
        weights = np.array([float(example.weight) for example in examples])
        folds = np.array([self._folds.fold(example.prompt) for example in examples], np.int64)
        return _Rows(states, *(np.repeat(array, each, axis=0) for array in (targets, weights, folds)))

    def _token_rows(self, examples: Sequence[Example], scores: Scores, on_error: ErrorHandler | None) -> _Rows:
        kept, targets, weights, folds = [], [], [], []
        for place, example in enumerate(examples):
            mask = scores.mask[scores.offsets[place] : scores.offsets[place + 1]]
            is_cut = scores.truncated is not None and bool(scores.truncated[place])
            try:
                own = _per_token(example, mask, self._options.gamma, is_cut=is_cut)
            except FieldError as error:
                if on_error is None:
                    raise
                on_error(error)
                kept.append(np.zeros_like(mask))
                continue
            self.rollouts += 1
            kept.append(mask)
            targets.append(own[0])
            weights.append(own[1])
            folds.append(np.full(len(own[1]), self._folds.fold(example.prompt)))
        if not targets:
            return _Rows(np.empty((0, self._hidden_size), np.float32), np.empty((0, 1)), np.empty(0), np.empty(0, int))
        mask = np.concatenate(kept)
        states = scores.values.reshape(len(mask), -1)
        states = states if mask.all() else states[mask]
        return _Rows(states, np.concatenate(targets), np.concatenate(weights), np.concatenate(folds))

    def result(self, source: str) -> FittedHead:
        """The head, with figures on held-out prompts.

        Raises:
            FitError: There are no rollouts, fewer prompts than folds, constant targets, or no solution.
        """
        if not self.rollouts:
            raise FitError("rollouts: expected at least one to fit to, got none")
        if len(self._folds.first) < self._options.folds:
            raise FitError(few_prompts(self._options.folds, f"{len(self._folds.first):,}"))
        if self._bounds is None or (self._weights == 0).any():
            raise FitError("weights: expected some above 0 in each fold of prompts, got a fold without any")
        lowest, highest = self._bounds
        if self._options.target != "pairs" and (lowest == highest).any():
            output = int((lowest == highest).argmax())
            which = "" if len(lowest) == 1 else f" in output {output}"
            raise FitError(f"targets: expected numbers that vary, got {lowest[output]:g} everywhere{which}")
        loss: Loss = "logistic" if self._options.target == "pairs" or self._is_binary else "squared"
        fitted = self._solved(loss, len(lowest)).fitted(
            source=source, loss=loss, rollouts=self.rollouts, tokens=self.tokens
        )
        if not all(
            layer.weight.isfinite().all() and layer.bias_or_zeros.isfinite().all() for layer in fitted.head.layers
        ):
            raise FitError("strengths: expected larger ones, with which the weights are finite, got these")
        return fitted

    def _solved(self, loss: Loss, outputs: int) -> Solution:
        options = self._options
        if options.intermediate_size is None and loss == "squared":
            return fit_ridge(self._own_moments(outputs), options.strengths)
        store = self._own_store(outputs)
        is_pairs = options.target == "pairs"
        common: dict[str, Any] = {"is_pairs": is_pairs, "folds": options.folds, "strengths": options.strengths}
        if options.intermediate_size is None:
            return fit_logistic(store, **common)
        return fit_two_layer(
            store,
            loss=loss,
            intermediate_size=options.intermediate_size,
            max_iterations=options.max_iterations,
            **common,
        )

    def notes(self) -> dict[str, Any]:
        """All that has been found so far but the sums and the stored states, as JSON has it."""
        return {
            "rollouts": self.rollouts,
            "tokens": self.tokens,
            "prompts": self._folds.first,
            "bounds": None if self._bounds is None else self._bounds.tolist(),
            "weights": self._weights.tolist(),
            "is_binary": self._is_binary,
            "stored": None if self._store is None else [self._store.rows, self._store.dtype, self._store.outputs],
        }

    def tensors(self) -> dict[str, Tensor]:
        """The sums so far, by name."""
        return {} if self._moments is None else self._moments.tensors()

    def restore(self, notes: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
        """Continues from what `notes` and `tensors` gave; False where stored states are missing."""
        self.rollouts, self.tokens = notes["rollouts"], notes["tokens"]
        self._folds = Folds(self._options.folds, notes["prompts"])
        self._bounds = None if notes["bounds"] is None else np.array(notes["bounds"])
        self._weights = np.array(notes["weights"])
        self._is_binary = notes["is_binary"]
        if tensors:
            self._own_moments(tensors["y"].shape[1]).restore(tensors)
        if notes["stored"] is None:
            return True
        rows, dtype, outputs = notes["stored"]
        self._store = StateStore(self._folder, self._hidden_size, outputs, dtype, self._options.cache_bytes)
        return self._store.cut(rows)


def few_prompts(folds: int, got: str) -> str:
    """What is said where there are fewer prompts than folds."""
    return (
        f"folds: expected rollouts of at least {folds:,} prompts, one for each fold, got {got} different "
        f"{'prompt' if got == '1' else 'prompts'}; give more prompts, or ask for fewer folds"
    )


def _check_room(folds: int, hidden_size: int, device: torch.device) -> None:
    """Refuses more folds than there is memory for, before anything is read or made."""
    room = _memory(device)
    if room is None or bytes_of_sums(folds, hidden_size) <= room:
        return
    each, least = bytes_of_sums(1, hidden_size) - bytes_of_sums(0, hidden_size), bytes_of_sums(0, hidden_size)
    raise FitError(
        f"folds: expected at most {max(0, room - least) // each:,}, for whose sums of {each:,} bytes each the "
        f"{room / 2**30:.0f} GiB of memory have room, got {folds:,}"
    )


def _memory(device: torch.device) -> int | None:
    """All bytes of the main memory; None for sums that are elsewhere, and where the system does not say."""
    if device.type != "cpu":
        return None
    names = getattr(os, "sysconf_names", {})
    known = "SC_PHYS_PAGES" in names and "SC_PAGE_SIZE" in names
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else None


def _per_token(
    example: Example, mask: NDArray[np.bool_], gamma: float, *, is_cut: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Targets `[T, K]` and weights `[T]` of the T tokens of the model's."""
    weight = example.weight if example.weight.ndim else np.full(len(mask), float(example.weight))
    weight = _fitting(weight, mask, example, "weights", is_cut=is_cut)
    if example.target.ndim == 2:
        found = _fitting(example.target, mask, example, example.field, is_cut=is_cut)
        wrong = np.argwhere(~(np.abs(found) <= LARGEST))
        if len(wrong):
            token = int(np.flatnonzero(mask)[wrong[0][0]])
            got = f"{found[tuple(wrong[0])]} at completion token {token}"
            raise FieldError(example.where, example.field, expected=f"{FINITE} where the model wrote", got=got)
        return found, weight
    columns = []
    for reward in example.target:
        rewards = returns.token_rewards(np.array([reward], np.float32), mask=mask[None])
        columns.append(returns.discounted(rewards, gamma=gamma, mask=mask[None])[0][mask])
    return np.stack(columns, axis=-1).astype(np.float64), weight


def _fitting(
    array: NDArray[np.float64], mask: NDArray[np.bool_], example: Example, field: str, *, is_cut: bool
) -> NDArray[np.float64]:
    """What is said of the tokens of the model's; a truncated completion has more said of it than is left."""
    if len(array) != len(mask) and not (is_cut and len(array) > len(mask)):
        expected = f"one number for each of the completion's {len(mask)} tokens"
        raise FieldError(example.where, field, expected=expected, got=str(len(array)))
    return array[: len(mask)][mask]
