"""What scoring gives: flat arrays with offsets, one entry per completion token, and one number per rollout."""

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from vhead.errors import MissingExtraError

if TYPE_CHECKING:
    import pyarrow

PER_TOKEN = ("values", "logprobs", "entropy")
PER_ROLLOUT = ("reward",)
FIELDS = (*PER_TOKEN, *PER_ROLLOUT)
# A column beside the fields, where rollouts may be truncated.
TRUNCATED = "truncated"

Ids = tuple[str | int | None, ...]
_ARROW_LIST_LIMIT = 2**31 - 1


@dataclass(frozen=True, slots=True, eq=False)
class Score:
    """The scores of one rollout with C completion tokens; fields that were not asked for are None.

    Attributes:
        index: The rollout's position in the input.
        id: The rollout's id.
        prompt_length: Tokens of the prompt.
        values: The head's output at the position that predicts completion token t, float32 `[C]`.
        logprobs: Log-probability of completion token t, in nats, float32 `[C]`.
        entropy: Entropy of the distribution that predicts completion token t, in nats, float32 `[C]`.
        reward: The head's output at the last completion token.
        truncated: Whether the rollout lost tokens, as it had too many.
    """

    index: int
    id: str | int | None
    prompt_length: int
    values: NDArray[np.float32] | None
    logprobs: NDArray[np.float32] | None
    entropy: NDArray[np.float32] | None
    reward: float | None
    truncated: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Scores(Sequence[Score]):
    """The scores of N rollouts with T completion tokens in all.

    Rollout i owns the entries `offsets[i]:offsets[i + 1]` of the flat arrays. Indexing gives a `Score` whose arrays are
    views; a slice with step 1 gives `Scores` whose arrays are views.

    Attributes:
        ids: The rollouts' ids.
        indices: The rollouts' positions in the input, int64 `[N]`.
        prompt_lengths: Tokens of each prompt, int64 `[N]`.
        offsets: int64 `[N + 1]`, from 0 to T.
        values: float32 `[T]`, or None when not asked for.
        logprobs: float32 `[T]`, or None when not asked for.
        entropy: float32 `[T]`, or None when not asked for.
        reward: float32 `[N]`, or None when not asked for.
        truncated: Which rollouts lost tokens, as they had too many, bool `[N]`; None: the scorer truncates none.

    Raises:
        ValueError: An array has another dtype or length than this.
    """

    ids: Ids
    indices: NDArray[np.int64]
    prompt_lengths: NDArray[np.int64]
    offsets: NDArray[np.int64]
    values: NDArray[np.float32] | None = None
    logprobs: NDArray[np.float32] | None = None
    entropy: NDArray[np.float32] | None = None
    reward: NDArray[np.float32] | None = None
    truncated: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        count = len(self.ids)
        _check("indices", self.indices, np.int64, count)
        _check("prompt_lengths", self.prompt_lengths, np.int64, count)
        _check("offsets", self.offsets, np.int64, count + 1)
        if self.offsets[0] != 0 or (np.diff(self.offsets) < 0).any():
            raise ValueError("offsets: expected a rising sequence from 0")
        for name in self.fields:
            _check(name, getattr(self, name), np.float32, self.token_count if name in PER_TOKEN else count)
        if self.truncated is not None:
            _check(TRUNCATED, self.truncated, np.bool_, count)

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the fields that were asked for."""
        return tuple(name for name in FIELDS if getattr(self, name) is not None)

    @property
    def columns(self) -> tuple[str, ...]:
        """What is written of them: the fields, and `truncated` where the scorer truncates."""
        return self.fields if self.truncated is None else (*self.fields, TRUNCATED)

    @property
    def token_count(self) -> int:
        """Completion tokens of all rollouts together."""
        return int(self.offsets[-1])

    @property
    def token_counts(self) -> NDArray[np.int64]:
        """Entries of each rollout in the per-token fields: its completion tokens by default, int64 `[N]`."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, key: int) -> Score: ...
    @overload
    def __getitem__(self, key: slice) -> "Scores": ...
    def __getitem__(self, key: int | slice) -> "Score | Scores":
        if isinstance(key, slice):
            return self._slice(key)
        position = range(len(self))[key]
        tokens = slice(int(self.offsets[position]), int(self.offsets[position + 1]))
        return Score(
            index=int(self.indices[position]),
            id=self.ids[position],
            prompt_length=int(self.prompt_lengths[position]),
            values=None if self.values is None else self.values[tokens],
            logprobs=None if self.logprobs is None else self.logprobs[tokens],
            entropy=None if self.entropy is None else self.entropy[tokens],
            reward=None if self.reward is None else float(self.reward[position]),
            truncated=self.truncated is not None and bool(self.truncated[position]),
        )

    def __iter__(self) -> Iterator[Score]:
        return (self[position] for position in range(len(self)))

    def __repr__(self) -> str:
        return f"Scores({len(self)} rollouts, {self.token_count} completion tokens, fields={list(self.fields)})"

    def _slice(self, key: slice) -> "Scores":
        start, stop, step = key.indices(len(self))
        if step != 1:
            return Scores.concat([self[at : at + 1] for at in range(start, stop, step)] or [self[:0]])
        stop = max(start, stop)
        tokens = slice(int(self.offsets[start]), int(self.offsets[stop]))
        rollouts = slice(start, stop)
        flat = {name: getattr(self, name)[tokens if name in PER_TOKEN else rollouts] for name in self.columns}
        return Scores(
            ids=self.ids[rollouts],
            indices=self.indices[rollouts],
            prompt_lengths=self.prompt_lengths[rollouts],
            offsets=self.offsets[start : stop + 1] - self.offsets[start],
            **flat,
        )

    @classmethod
    def concat(cls, parts: Sequence["Scores"]) -> "Scores":
        """All rollouts of `parts`, in order, in one set of arrays.

        Raises:
            ValueError: There are no parts, or they hold different fields.
        """
        if not parts:
            raise ValueError("parts: expected at least one Scores, got none")
        if len(parts) == 1:
            return parts[0]
        names = parts[0].columns
        for part in parts:
            if part.columns != names:
                raise ValueError(f"parts: expected the fields {list(names)} in each, got {list(part.columns)}")
        lengths = np.concatenate([part.token_counts for part in parts])
        return cls(
            ids=tuple(name for part in parts for name in part.ids),
            indices=np.concatenate([part.indices for part in parts]),
            prompt_lengths=np.concatenate([part.prompt_lengths for part in parts]),
            offsets=offsets_of(lengths),
            **{name: np.concatenate([getattr(part, name) for part in parts]) for name in names},
        )

    def to_arrow(self) -> "pyarrow.Table":
        """A table: `id`, the fields (`list<float32>` per token, `float32` per rollout), and `truncated` if it is there.

        The columns share the flat arrays' memory.

        Raises:
            MissingExtraError: pyarrow is not installed.
        """
        try:
            import pyarrow as pa  # noqa: PLC0415, an optional dependency
        except ImportError as error:
            raise MissingExtraError("pyarrow", "data") from error
        columns: dict[str, Any] = {"id": pa.array(_one_type(self.ids))}
        for name in self.columns:
            array = getattr(self, name)
            columns[name] = self._list_column(pa, array) if name in PER_TOKEN else pa.array(array)
        return pa.table(columns)

    def _list_column(self, pa: Any, flat: NDArray[np.float32]) -> "pyarrow.ChunkedArray":  # noqa: ANN401, a module
        """Arrow's list offsets have 32 bits, so that a longer column is cut into chunks between rollouts."""
        start = 0
        chunks: list[pyarrow.ListArray] = []
        while start < len(self) or not chunks:
            fitting = int(np.searchsorted(self.offsets, self.offsets[start] + _ARROW_LIST_LIMIT, side="right")) - 1
            stop = min(max(fitting, start + 1), len(self))
            offsets = self.offsets[start : stop + 1] - self.offsets[start]
            values = pa.array(flat[self.offsets[start] : self.offsets[stop]])
            chunks.append(pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values))
            start = stop
        return pa.chunked_array(chunks)

    def to_pandas(self) -> Any:  # noqa: ANN401, pandas is optional and brings no types
        """A `pandas.DataFrame` with the columns of `to_arrow`; per-token fields hold array views.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        try:
            pd: Any = importlib.import_module("pandas")
        except ImportError as error:
            raise MissingExtraError("pandas", "data") from error
        columns: dict[str, Any] = {"id": pd.Series(list(self.ids), dtype=object)}
        for name in self.columns:
            array = getattr(self, name)
            columns[name] = pd.Series(self._views(array), dtype=object) if name in PER_TOKEN else array
        return pd.DataFrame(columns)

    def _views(self, flat: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        bounds = self.offsets.tolist()
        return [flat[start:stop] for start, stop in pairwise(bounds)]


def offsets_of(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 `[N + 1]` offsets of N consecutive pieces with these lengths."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def check_fields(names: Sequence[str]) -> tuple[str, ...]:
    """The fields to compute, in the order of `Scores`.

    Raises:
        ValueError: A name is unknown, or there is none.
    """
    asked = (names,) if isinstance(names, str) else tuple(names)
    unknown = [name for name in asked if name not in FIELDS]
    if unknown or not asked:
        raise ValueError(f"returns: expected some of {', '.join(FIELDS)}, got {', '.join(map(repr, asked)) or 'none'}")
    return tuple(name for name in FIELDS if name in asked)


def _check(name: str, array: NDArray[Any], dtype: type, length: int) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != (length,):
        got = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"{name}: expected {np.dtype(dtype)} [{length}], got {got}")


def _one_type(ids: Ids) -> list[str | int | None] | list[str | None]:
    """Arrow columns have one type: integers stay integers unless there is text among them."""
    if not any(isinstance(name, str) for name in ids):
        return list(ids)
    return [None if name is None else str(name) for name in ids]
