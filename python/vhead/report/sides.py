"""The scores of one side: of each record by itself, and of all records field by field."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vhead.rollouts.ragged import offsets_of, positions_of
from vhead.rollouts.wording import Id, named

LOGPROBS, ENTROPY, MASK, TOKEN_IDS = "logprobs", "entropy", "completion_mask", "token_ids"
COMPLETION_IDS = "completion_ids"
# What is compared beside log-probabilities: a number, or K of them, for each token or each rollout.
OTHERS = ("values", "reward")
_DTYPES: dict[str, type[np.generic]] = {MASK: np.bool_, TOKEN_IDS: np.int64, COMPLETION_IDS: np.int64}


@dataclass(frozen=True, slots=True)
class Record:
    """The scores of one rollout on one side.

    Attributes:
        where: Its place, such as `a.jsonl: line 12`.
        id: Its id.
        arrays: What is known of it, by name: floats `[C]` for log-probabilities and entropy, `[C]` or `[C, K]` for
            values, `[]` or `[K]` for the reward, bool `[C]` for the mask, ints `[C]` for token ids, ints for the ids of
            the completion that came with the record.
        prompt_length: Tokens of its prompt, where known.
        count: Its place among the records of its file, from 1.
    """

    where: str
    id: Id
    arrays: Mapping[str, NDArray[Any]]
    prompt_length: int | None = None
    count: int = 0

    @property
    def name(self) -> str:
        """What errors call it."""
        return named(self.where, self.id)


@dataclass(frozen=True)
class Column:
    """One field of R records. A record has its numbers for C tokens, or for the rollout as if that were one token.

    Attributes:
        values: The numbers of all records, one after the other: float64, bool for a mask, int64 for token ids.
        offsets: Record i owns `values[offsets[i]:offsets[i + 1]]`; int64 `[R + 1]`.
        widths: Numbers a token, K; zero where the record lacks the field; int64 `[R]`.
    """

    values: NDArray[Any]
    offsets: NDArray[np.int64]
    widths: NDArray[np.int64]

    @classmethod
    def of(cls, name: str, arrays: Sequence[NDArray[Any] | None]) -> "Column":
        """The field of this name, from each record's array; None: the record lacks it."""
        dimensions = 0 if name == "reward" else 1
        sizes = np.array([0 if array is None else array.size for array in arrays], np.int64)
        widths = [0 if array is None else array.shape[dimensions] if array.ndim > dimensions else 1 for array in arrays]
        there = [array.reshape(-1) for array in arrays if array is not None]
        values = np.concatenate(there) if there else np.zeros(0)
        values = values.astype(_DTYPES.get(name, np.float64), copy=False)
        return cls(values, offsets_of(sizes), np.array(widths, np.int64))

    @cached_property
    def there(self) -> NDArray[np.bool_]:
        """Which records have the field."""
        return self.widths > 0

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each record; zero where it lacks the field."""
        return np.diff(self.offsets) // np.maximum(self.widths, 1)

    def owners(self, chosen: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which records have one of the chosen numbers."""
        owners = np.zeros(len(self.widths), np.bool_)
        # Mostly none are chosen.
        if chosen.any():
            owners[np.repeat(np.arange(len(owners)), np.diff(self.offsets))[chosen]] = True
        return owners

    def array(self, at: int, *, is_whole: bool) -> NDArray[Any]:
        """One record's own: `[C]` or `[C, K]`; of a field of whole rollouts `[]` or `[K]`."""
        width = int(self.widths[at])
        found = self.values[self.offsets[at] : self.offsets[at + 1]].reshape(-1, width)
        found = found[0] if is_whole else found
        return found[..., 0] if width == 1 else found

    def take(self, rows: NDArray[np.int64]) -> "Column":
        """Some records of it, in this order."""
        if _are_all(rows, len(self.widths)):
            return self
        sizes = np.diff(self.offsets)[rows]
        places = np.repeat(self.offsets[rows], sizes) + positions_of(sizes)
        return Column(self.values[places], offsets_of(sizes), self.widths[rows])

    def filled(self, lengths: NDArray[np.int64], *, default: float) -> NDArray[Any]:
        """The numbers of records of these lengths, with a default for all tokens of those that lack the field."""
        if self.there.all():
            return self.values
        full = np.full(int(lengths.sum()), default, self.values.dtype)
        full[np.repeat(self.there, lengths)] = self.values
        return full


@dataclass(frozen=True)
class Side:
    """The R records of one side.

    Attributes:
        places: Where each is, such as `a.jsonl: line 12`.
        ids: Their ids.
        counts: The place of each among the records of its file, from 1; int64 `[R]`.
        prompt_lengths: Tokens of each prompt, -1 where unknown; int64 `[R]`.
        columns: The fields that some record has.
    """

    places: Sequence[str]
    ids: Sequence[Id]
    counts: NDArray[np.int64]
    prompt_lengths: NDArray[np.int64]
    columns: Mapping[str, Column]

    @classmethod
    def of(cls, records: Sequence[Record]) -> "Side":
        """These records, in order."""
        names = {name: None for record in records for name in record.arrays}
        prompts = [-1 if record.prompt_length is None else record.prompt_length for record in records]
        return cls(
            places=[record.where for record in records],
            ids=[record.id for record in records],
            counts=np.array([record.count for record in records], np.int64),
            prompt_lengths=np.array(prompts, np.int64),
            columns={name: Column.of(name, [record.arrays.get(name) for record in records]) for name in names},
        )

    def __len__(self) -> int:
        return len(self.ids)

    def column(self, name: str) -> Column:
        """The field of this name; where no record has it, one that all lack."""
        return self.columns.get(name) or Column.of(name, [None] * len(self))

    def take(self, rows: NDArray[np.int64]) -> "Side":
        """Some records, in this order."""
        if _are_all(rows, len(self)):
            return self
        chosen = rows.tolist()
        return Side(
            [self.places[at] for at in chosen],
            [self.ids[at] for at in chosen],
            self.counts[rows],
            self.prompt_lengths[rows],
            {name: column.take(rows) for name, column in self.columns.items()},
        )

    def name(self, at: int) -> str:
        """What errors call a record."""
        return named(self.places[at], self.ids[at])

    def record(self, at: int) -> Record:
        """One record by itself."""
        arrays = {
            name: column.array(at, is_whole=name == "reward")
            for name, column in self.columns.items()
            if column.there[at]
        }
        return Record(self.places[at], self.ids[at], arrays)


def _are_all(rows: NDArray[np.int64], count: int) -> bool:
    """Whether these are all of so many, in order: then nothing need be copied."""
    return np.array_equal(rows, np.arange(count))
