"""Batches of a training pass: which tokens they hold, and how arrays get into their order and back."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vhead.backbone.placement import to_device
from vhead.errors import FieldError
from vhead.packing.strategies import Batch, Strategy
from vhead.rollouts.encoding import Encoded
from vhead.training.totals import Totals

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """All rollouts of one call of `batches`, by the place in which they came.

    Attributes:
        names: What errors call them.
        lengths: Tokens of each completion, int64 `[N]`.
        candidates: How many candidates there are for each token, here or in other processes; None: none.
    """

    names: tuple[str, ...]
    lengths: Ints
    candidates: int | None = None

    @classmethod
    def of(cls, rollouts: Sequence[Encoded]) -> Self:
        """Those of these rollouts."""
        lengths = np.array([rollout.completion_length for rollout in rollouts], np.int64)
        found = rollouts[0].candidates if rollouts else None
        return cls(tuple(rollout.name for rollout in rollouts), lengths, None if found is None else found.shape[1])


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """Where a batch's tokens are among its hidden states `[N, H]`; T completion tokens, W of them the model's.

    Attributes:
        predicting: The row that predicts each completion token, int64 `[T]`.
        written: Which of the T tokens the model wrote, int64 `[W]`; None: all.
        targets: Those W tokens, int64 `[W]`.
        candidates: What else is asked about there, int64 `[W, M]`; None: nothing.
    """

    predicting: Tensor
    written: Tensor | None
    targets: Tensor
    candidates: Tensor | None

    @classmethod
    def of(cls, rollouts: Sequence[Encoded], rows: Sequence[Ints], count: int | None) -> Self:
        """Finds them, from each rollout's rows, and so many candidates for each token; None: none."""
        prompts = [rollout.prompt_length for rollout in rollouts]
        predicting = _joined([own[count - 1 : -1] for own, count in zip(rows, prompts, strict=True)])
        targets = _joined([rollout.tokens[count:] for rollout, count in zip(rollouts, prompts, strict=True)])
        mask = mask_of(rollouts)
        written = None if mask.all() else np.flatnonzero(mask)
        chosen = slice(None) if written is None else written
        candidates = None
        if count is not None:
            given = [rollout.candidates for rollout in rollouts if rollout.candidates is not None]
            candidates = torch.from_numpy(np.concatenate([np.empty((0, count), np.int64), *given])[chosen])
        return cls(
            torch.from_numpy(predicting),
            None if written is None else torch.from_numpy(written),
            torch.from_numpy(targets[chosen]),
            candidates,
        )

    def to(self, device: torch.device) -> Self:
        """The same numbers where the hidden states are."""
        parts = (self.predicting, self.written, self.targets, self.candidates)
        return type(self)(*(None if part is None else to_device(part, device) for part in parts))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class TrainingBatch:
    """Rollouts that go through the model together, once: n of those that were given, with T completion tokens.

    Everything a training pass gives for it is flat: tokens `offsets[i]:offsets[i + 1]` are the completion tokens of
    the rollout that was given at `places[i]`. Where several processes train together, a batch can be empty.

    Attributes:
        places: Which of the given rollouts these are, int64 `[n]`.
        offsets: Where each one's tokens are, int64 `[n + 1]`, from 0 to T.
        mask: True where the model wrote the token, bool `[T]`, on the model's device.
        tokens: Tokens that go through the model, prompts and padding included.
        totals: What all batches hold together, by which losses are means over the whole step.
    """

    places: Ints
    offsets: Ints
    mask: Tensor
    tokens: int
    totals: Totals
    given: Given = field(repr=False)
    strategy: Strategy[Any] = field(repr=False)
    content: Batch[Any] = field(repr=False)
    read: Read = field(repr=False)

    def __len__(self) -> int:
        """How many rollouts it holds."""
        return len(self.places)

    def flat(self, per_rollout: Any) -> Tensor:
        """Puts numbers of all given rollouts into this batch's order.

        Args:
            per_rollout: One array `[completion tokens, ...]` for each of the given rollouts, in their order, or all of
                these one after the other, as the fields of `Scores` are; numpy, torch or lists.

        Returns:
            `[T, ...]`, on the model's device; floating numbers are float32, others keep their dtype.

        Raises:
            FieldError: An array is not as long as its rollout's completion; the error names it.
            ValueError: There are more or fewer arrays than rollouts, or a flat array has another length.
        """
        lengths = self.given.lengths
        if _is_array(per_rollout):
            flat = _tensor(per_rollout)
            if flat.dim() == 0 or len(flat) != lengths.sum():
                raise ValueError(
                    f"per_rollout: expected {lengths.sum()} numbers, one for each completion token, or a list with an "
                    f"array for each of the {len(lengths)} rollouts, got the shape {list(flat.shape)}"
                )
            ends = np.cumsum(lengths)
            chosen = [flat[ends[place] - lengths[place] : ends[place]] for place in self.places]
            return self._joined(chosen, like=flat)
        arrays = list(per_rollout)
        if len(arrays) != len(lengths):
            expected = f"one array for each of the {len(lengths)} rollouts that were given to batches()"
            raise ValueError(f"per_rollout: expected {expected}, got {len(arrays)}")
        for array, length, name in zip(arrays, lengths, self.given.names, strict=True):
            if np.shape(array)[:1] != (length,):
                got = f"an array of shape {list(np.shape(array))}"
                raise FieldError(name, "per_rollout", expected=f"{length} numbers, one a completion token", got=got)
        like = _tensor(arrays[0]) if arrays else torch.empty(0)
        return self._joined([_tensor(arrays[place]) for place in self.places], like=like)

    def split(self, flat: Tensor) -> list[Tensor]:
        """The way back: what each of this batch's rollouts has of `[T, ...]`, as views, in the order of `places`."""
        return list(torch.split(flat, np.diff(self.offsets).tolist()))

    def _joined(self, chosen: Sequence[Tensor], *, like: Tensor) -> Tensor:
        joined = torch.cat(list(chosen)) if chosen else like[:0]
        return to_device(joined.float() if joined.is_floating_point() else joined, self.mask.device)


def mask_of(rollouts: Sequence[Encoded]) -> NDArray[np.bool_]:
    """Which completion tokens the model wrote, one rollout after the other."""
    masks = [np.ones(r.completion_length, np.bool_) if r.mask is None else r.mask for r in rollouts]
    return np.concatenate(masks) if masks else np.empty(0, np.bool_)


def _joined(parts: Sequence[Ints]) -> Ints:
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _tensor(array: Any) -> Tensor:
    """A tensor of the same numbers; arrays that may not be written to, such as a rollout's, are copied."""
    is_read_only = isinstance(array, np.ndarray) and not array.flags.writeable
    return torch.as_tensor(array.copy() if is_read_only else array)


def _is_array(per_rollout: object) -> bool:
    """Whether this is one array and no list of arrays."""
    return isinstance(per_rollout, Tensor) or (isinstance(per_rollout, np.ndarray) and per_rollout.dtype != object)
