"""What scoring gives: flat arrays with offsets, one entry per completion token, and one number per rollout."""

import importlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from vhead.errors import MissingExtraError, MissingFieldError, MissingPackageError
from vhead.rollouts.wording import Id
from vhead.scoring.notebook import table

if TYPE_CHECKING:
    import pyarrow

PER_TOKEN = ("values", "logprobs", "entropy")
PER_ROLLOUT = ("reward",)
# What the model computes.
FIELDS = (*PER_TOKEN, *PER_ROLLOUT)
# What `"tokens"` among the returns stands for: the columns that line the fields up with the text.
TOKENS = "tokens"
TOKEN_COLUMNS = ("token_ids", "token_offsets")
RETURNS = (*FIELDS, TOKENS)
DEFAULT_RETURNS = ("values", "logprobs", "reward")
# A column beside the fields, where rollouts may be truncated.
TRUNCATED = "truncated"

Ids = tuple[Id, ...]
Computed = Mapping[str, NDArray[Any]]
_ARROW_LIST_LIMIT = 2**31 - 1
_ROWS_SHOWN = 10


class _Fields:
    """What was asked for, each an array; reading anything else is an error that says so."""

    __slots__ = ()

    computed: Computed

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the computed fields that were asked for."""
        return tuple(name for name in FIELDS if name in self.computed)

    @property
    def values(self) -> NDArray[np.float32]:
        """The head's output at the position that predicts each completion token, float32."""
        return self._field("values")

    @property
    def logprobs(self) -> NDArray[np.float32]:
        """Log-probability of each completion token, in nats, float32."""
        return self._field("logprobs")

    @property
    def entropy(self) -> NDArray[np.float32]:
        """Entropy of the distribution that predicts each completion token, in nats, float32."""
        return self._field("entropy")

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """The tokens that the per-token fields are about, int64."""
        return self._field("token_ids")

    @property
    def token_offsets(self) -> NDArray[np.int64]:
        """First and one-past-last character of each token in the completion's text, int64 `[..., 2]`."""
        return self._field("token_offsets")

    def _field(self, name: str) -> NDArray[Any]:
        try:
            return self.computed[name]
        except KeyError:
            raise MissingFieldError(name, tuple(self.computed)) from None


@dataclass(frozen=True, slots=True, eq=False)
class Score(_Fields):
    """The scores of one rollout with C completion tokens.

    The fields that were asked for are attributes: `values`, `logprobs` and `entropy`, float32 `[C]`; `reward`, a
    number; with `"tokens"`, `token_ids`, int64 `[C]`, and `offsets`, int64 `[C, 2]`.

    Attributes:
        index: The rollout's position in the input.
        id: The rollout's id.
        prompt_length: Tokens of the prompt.
        computed: The fields that were asked for, by name.
        truncated: Whether the rollout lost tokens, as it had too many.

    Raises:
        MissingFieldError: A field is read that was not asked for.
    """

    index: int
    id: Id
    prompt_length: int
    computed: Computed
    truncated: bool = False

    @property
    def reward(self) -> float:
        """The head's output at the last completion token."""
        return float(self._field("reward"))

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Which characters of the completion each token stands for: `completion[first:stop]`, int64 `[C, 2]`.

        A token that begins in the prompt starts at 0, a token of a chat template stands for no character, and both
        numbers are -1 where the rollout came as token ids.
        """
        return self._field("token_offsets")


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Scores(_Fields, Sequence[Score]):
    """The scores of N rollouts with T completion tokens in all.

    The fields that were asked for are attributes: `values`, `logprobs` and `entropy`, float32 `[T]`; `reward`, float32
    `[N]`; with `"tokens"`, `token_ids`, int64 `[T]`, and `token_offsets`, int64 `[T, 2]`, which a `Score` has as
    `offsets`. Rollout i owns the entries `offsets[i]:offsets[i + 1]` of the flat arrays. Indexing gives a `Score` whose
    arrays are views; a slice with step 1 gives `Scores` whose arrays are views.

    Attributes:
        ids: The rollouts' ids.
        indices: The rollouts' positions in the input, int64 `[N]`.
        prompt_lengths: Tokens of each prompt, int64 `[N]`.
        offsets: int64 `[N + 1]`, from 0 to T.
        computed: The fields that were asked for, by name.
        truncated: Which rollouts lost tokens, as they had too many, bool `[N]`; None: the scorer truncates none.

    Raises:
        ValueError: An array has another dtype or length than this, or `computed` holds something else.
        MissingFieldError: A field is read that was not asked for.
    """

    ids: Ids
    indices: NDArray[np.int64]
    prompt_lengths: NDArray[np.int64]
    offsets: NDArray[np.int64]
    computed: Computed
    truncated: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        count = len(self.ids)
        _check("indices", self.indices, np.int64, count)
        _check("prompt_lengths", self.prompt_lengths, np.int64, count)
        _check("offsets", self.offsets, np.int64, count + 1)
        if self.offsets[0] != 0 or (np.diff(self.offsets) < 0).any():
            raise ValueError("offsets: expected a rising sequence from 0")
        known = (*FIELDS, *TOKEN_COLUMNS)
        if unknown := self.computed.keys() - set(known):
            raise ValueError(f"computed: expected some of {', '.join(known)}, got {', '.join(sorted(unknown))}")
        for name, array in self.computed.items():
            length = count if name in PER_ROLLOUT else self.token_count
            dtype = np.int64 if name in TOKEN_COLUMNS else np.float32
            _check(name, array, dtype, length, *([2] if name == "token_offsets" else []))
        if self.truncated is not None:
            _check(TRUNCATED, self.truncated, np.bool_, count)

    @property
    def reward(self) -> NDArray[np.float32]:
        """The head's output at the last token of each completion, float32 `[N]`."""
        return self._field("reward")

    @property
    def columns(self) -> tuple[str, ...]:
        """What is written of them: the fields, the tokens' columns, and `truncated` where the scorer truncates."""
        names = (*self.fields, *(name for name in TOKEN_COLUMNS if name in self.computed))
        return names if self.truncated is None else (*names, TRUNCATED)

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
            computed=_taken(self.computed, position, tokens),
            truncated=self.truncated is not None and bool(self.truncated[position]),
        )

    def __iter__(self) -> Iterator[Score]:
        return (self[position] for position in range(len(self)))

    def __repr__(self) -> str:
        return f"Scores({len(self)} rollouts, {self.token_count} completion tokens, fields={list(self.computed)})"

    def _repr_html_(self) -> str:
        """What a notebook shows: the first rollouts, a row each, per-token fields by their mean."""
        per_token = [name for name in self.fields if name in PER_TOKEN]
        rewards = ["reward"] if "reward" in self.computed else []
        shown = self[:_ROWS_SHOWN]
        rows = [
            (
                score.index,
                score.id,
                count,
                *(float(np.mean(score.computed[name])) if count else None for name in per_token),
                *(float(score.computed[name]) for name in rewards),
            )
            for score, count in zip(shown, shown.token_counts.tolist(), strict=True)
        ]
        heads = ["", "id", "tokens", *(f"mean of {name}" for name in per_token), *rewards]
        return table(repr(self), heads, rows, f"and {len(self) - len(shown):,} more" if len(self) > len(shown) else "")

    def without(self, places: Collection[int]) -> "Scores":
        """The scores of all rollouts but those at these places, in order."""
        if not places:
            return self
        bounds = [-1, *sorted(places), len(self)]
        return Scores.concat([self[before + 1 : after] for before, after in pairwise(bounds)])

    def _slice(self, key: slice) -> "Scores":
        start, stop, step = key.indices(len(self))
        if step != 1:
            return Scores.concat([self[at : at + 1] for at in range(start, stop, step)] or [self[:0]])
        stop = max(start, stop)
        tokens = slice(int(self.offsets[start]), int(self.offsets[stop]))
        rollouts = slice(start, stop)
        return Scores(
            ids=self.ids[rollouts],
            indices=self.indices[rollouts],
            prompt_lengths=self.prompt_lengths[rollouts],
            offsets=self.offsets[start : stop + 1] - self.offsets[start],
            computed=_taken(self.computed, rollouts, tokens),
            truncated=None if self.truncated is None else self.truncated[rollouts],
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
            computed={name: np.concatenate([part.computed[name] for part in parts]) for name in parts[0].computed},
            truncated=_joined([part.truncated for part in parts]),
        )

    def to_arrow(self) -> "pyarrow.Table":
        """A table: `id`, the fields (`list<float32>` per token, `float32` per rollout), and `truncated` if it is there.

        With `"tokens"` also `token_ids` (`list<int64>`) and `token_offsets` (`list<fixed_size_list<int64>[2]>`).
        The columns share the flat arrays' memory.

        Raises:
            MissingExtraError: pyarrow is not installed.
        """
        try:
            import pyarrow as pa  # an optional dependency
        except ImportError as error:
            raise MissingExtraError("pyarrow", "data") from error
        columns: dict[str, Any] = {"id": pa.array(_one_type(self.ids))}
        for name in self.columns:
            array = getattr(self, name)
            columns[name] = self._list_column(pa, array) if _is_per_token(name) else pa.array(array)
        return pa.table(columns)

    def _list_column(self, pa: Any, flat: NDArray[Any]) -> "pyarrow.ChunkedArray":
        """Arrow's list offsets have 32 bits, so that a longer column is cut into chunks between rollouts."""
        start = 0
        chunks: list[pyarrow.ListArray] = []
        while start < len(self) or not chunks:
            fitting = int(np.searchsorted(self.offsets, self.offsets[start] + _ARROW_LIST_LIMIT, side="right")) - 1
            stop = min(max(fitting, start + 1), len(self))
            offsets = self.offsets[start : stop + 1] - self.offsets[start]
            part = flat[self.offsets[start] : self.offsets[stop]]
            values = pa.array(part.reshape(-1))
            if part.ndim > 1:
                values = pa.FixedSizeListArray.from_arrays(values, part.shape[1])
            chunks.append(pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values))
            start = stop
        return pa.chunked_array(chunks)

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with the columns of `to_arrow`; per-token fields hold array views.

        Raises:
            MissingPackageError: pandas is not installed; no extra brings it.
        """
        try:
            pd: Any = importlib.import_module("pandas")
        except ImportError as error:
            raise MissingPackageError("pandas is not installed; to_pandas needs it: pip install pandas") from error
        columns: dict[str, Any] = {"id": pd.Series(list(self.ids), dtype=object)}
        for name in self.columns:
            array = getattr(self, name)
            columns[name] = pd.Series(self._views(array), dtype=object) if _is_per_token(name) else array
        return pd.DataFrame(columns)

    def _views(self, flat: NDArray[Any]) -> list[NDArray[Any]]:
        bounds = self.offsets.tolist()
        return [flat[start:stop] for start, stop in pairwise(bounds)]


def offsets_of(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 `[N + 1]` offsets of N consecutive pieces with these lengths."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def check_returns(names: Sequence[str]) -> tuple[str, ...]:
    """What to compute, in the order of `RETURNS`.

    Raises:
        ValueError: A name is unknown, or there is none.
    """
    asked = (names,) if isinstance(names, str) else tuple(names)
    unknown = [name for name in asked if name not in RETURNS]
    if unknown or not asked:
        raise ValueError(f"returns: expected some of {', '.join(RETURNS)}, got {', '.join(map(repr, asked)) or 'none'}")
    return tuple(name for name in RETURNS if name in asked)


def computed_fields(returns: Sequence[str]) -> tuple[str, ...]:
    """The names among them that the model computes."""
    return tuple(name for name in returns if name in FIELDS)


def columns_of(returns: Sequence[str]) -> tuple[str, ...]:
    """The columns that these returns become, in the order of `Scores.columns`."""
    return tuple(column for name in returns for column in (TOKEN_COLUMNS if name == TOKENS else (name,)))


def _taken(computed: Computed, rollouts: int | slice, tokens: slice) -> dict[str, NDArray[Any]]:
    return {name: array[rollouts if name in PER_ROLLOUT else tokens] for name, array in computed.items()}


def _is_per_token(name: str) -> bool:
    return name in PER_TOKEN or name in TOKEN_COLUMNS


def _joined(parts: Sequence[NDArray[np.bool_] | None]) -> NDArray[np.bool_] | None:
    there = [part for part in parts if part is not None]
    return np.concatenate(there) if there else None


def _check(name: str, array: NDArray[Any], dtype: type, *shape: int) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != shape:
        got = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"{name}: expected {np.dtype(dtype)} {list(shape)}, got {got}")


def _one_type(ids: Ids) -> list[Id]:
    """Arrow columns have one type: ids of several become text, and so do integers that have more than 64 bits."""
    types = {type(name) for name in ids if name is not None}
    large = types == {int} and any(abs(name) >= 2**63 for name in ids if isinstance(name, int))
    if len(types) < 2 and not large:
        return list(ids)
    return [None if name is None else str(name) for name in ids]
