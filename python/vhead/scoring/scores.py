"""What scoring gives: flat arrays with offsets, one entry per completion token, step or rollout."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from vhead.errors import MissingFieldError
from vhead.rollouts.ragged import offsets_of
from vhead.rollouts.wording import Id
from vhead.scoring import views
from vhead.scoring.advantages import advantages, bootstrap_of
from vhead.scoring.fields import COLUMNS, WEIGHTS_STEP, Unit, is_per

if TYPE_CHECKING:
    import pyarrow

# A column beside the others, where rollouts may be truncated.
TRUNCATED = "truncated"

Ids = tuple[Id, ...]
Computed = Mapping[str, NDArray[Any]]


class _Fields:
    """What was asked for, each an array; reading anything else is an error that says so."""

    __slots__ = ()

    computed: Computed

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the fields that the model computed."""
        return tuple(
            name for name, column in COLUMNS.items() if name in self.computed and column.origin in ("head", "logits")
        )

    @property
    def values(self) -> NDArray[np.float32]:
        """The head's output at the position that predicts each completion token, float32."""
        return self._field("values")

    @property
    def logprobs(self) -> NDArray[np.float32]:
        """Log-probability of each completion token, in nats, float32; 0 where the model did not write the token."""
        return self._field("logprobs")

    @property
    def entropy(self) -> NDArray[np.float32]:
        """Entropy of the distribution that predicts each completion token, in nats, float32; 0 as above."""
        return self._field("entropy")

    @property
    def candidate_logprobs(self) -> NDArray[np.float32]:
        """Log-probability of each candidate at each completion token, in nats, float32 `[..., M]`; 0 as above."""
        return self._field("candidate_logprobs")

    @property
    def top_tokens(self) -> NDArray[np.int64]:
        """The likeliest tokens at each completion token, the likeliest first, int64 `[..., k]`; -1 where 0 above."""
        return self._field("top_tokens")

    @property
    def top_logprobs(self) -> NDArray[np.float32]:
        """Their log-probabilities, in nats, float32 `[..., k]`."""
        return self._field("top_logprobs")

    @property
    def steps(self) -> NDArray[np.float32]:
        """The head's outputs at each step's last token, float32 `[S, K]`; probabilities where it is a classifier."""
        return self._field("steps")

    @property
    def step_positions(self) -> NDArray[np.int64]:
        """Each step's last token, counted in its completion, int64 `[S]`."""
        return self._field("step_positions")

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """The tokens that the per-token fields are about, int64."""
        return self._field("token_ids")

    @property
    def token_offsets(self) -> NDArray[np.int64]:
        """First and one-past-last character of each token in the completion's text, int64 `[..., 2]`."""
        return self._field("token_offsets")

    @property
    def weights_step(self) -> Any:
        """The step of the weights that scored it, where the scorer follows a directory; -1 for those it was made with.

        A number for a `Score`, int64 `[N]` for `Scores`.
        """
        found = self._field(WEIGHTS_STEP)
        return found if found.ndim else int(found)

    def _field(self, name: str) -> NDArray[Any]:
        try:
            return self.computed[name]
        except KeyError:
            raise MissingFieldError(name, tuple(self.computed)) from None


@dataclass(frozen=True, slots=True, eq=False)
class Score(_Fields):
    """The scores of one rollout with C completion tokens, by a head with K outputs.

    The fields that were asked for are attributes: `values`, `logprobs` and `entropy`, float32 `[C]`, where K > 1
    `values` `[C, K]`; `candidate_logprobs` `[C, M]`; `top_tokens` and `top_logprobs` `[C, k]`; `steps` `[S, K]` and
    `step_positions` `[S]`; `reward`, `prompt_value` and `bootstrap`, numbers, where K > 1 float32 `[K]`; with
    `"tokens"`, `token_ids`, int64 `[C]`, and `offsets`, int64 `[C, 2]`.

    Attributes:
        index: The rollout's position in the input.
        id: The rollout's id.
        prompt_length: Tokens of the prompt.
        computed: The fields that were asked for, by name.
        truncated: Whether the rollout lost tokens, as it had too many.
        mask: True where the model wrote the completion's token, bool `[C]`; None: everywhere.

    Raises:
        MissingFieldError: A field is read that was not asked for.
    """

    index: int
    id: Id
    prompt_length: int
    computed: Computed
    truncated: bool = False
    mask: NDArray[np.bool_] = field(default=None)  # type: ignore[arg-type]  # made below

    def __post_init__(self) -> None:
        if self.mask is None:
            lengths = [len(array) for name, array in self.computed.items() if is_per("token", name)]
            object.__setattr__(self, "mask", np.ones(max(lengths, default=0), np.bool_))

    @property
    def reward(self) -> float:
        """The head's output at the last completion token that the model wrote; float32 `[K]` where K > 1."""
        return _number(self._field("reward"))

    @property
    def prompt_value(self) -> float:
        """The head's output at the prompt's last token; float32 `[K]` where K > 1."""
        return _number(self._field("prompt_value"))

    @property
    def bootstrap(self) -> float:
        """The head's output after the last token, for rollouts that were cut off; float32 `[K]` where K > 1."""
        return _number(self._field("bootstrap"))

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Which characters of the completion each token stands for: `completion[first:stop]`, int64 `[C, 2]`.

        A token that begins in the prompt starts at 0, a token of a chat template stands for no character, and both
        numbers are -1 where the rollout came as token ids.
        """
        return self._field("token_offsets")


def _number(number: NDArray[Any]) -> float:
    """A number; of a head with several outputs its K numbers, which no type tells apart."""
    return float(number) if np.ndim(number) == 0 else number  # type: ignore[return-value]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Scores(_Fields, Sequence[Score]):
    """The scores of N rollouts with T completion tokens in all, by a head with K outputs.

    The fields that were asked for are attributes: `values`, `logprobs` and `entropy`, float32 `[T]`, where K > 1
    `values` `[T, K]`; `candidate_logprobs` `[T, M]`; `top_tokens` and `top_logprobs` `[T, k]`; `reward`,
    `prompt_value` and `bootstrap`, float32 `[N]` or `[N, K]`; `steps`, float32 `[S, K]`, and `step_positions`; with
    `"tokens"`, `token_ids`, int64 `[T]`, and `token_offsets`, int64 `[T, 2]`, which a `Score` has as `offsets`.
    Rollout i owns the entries `offsets[i]:offsets[i + 1]` of the flat arrays, and of the steps
    `step_offsets[i]:step_offsets[i + 1]`. Indexing gives a `Score` whose arrays are views; a slice with step 1 gives
    `Scores` whose arrays are views.

    Attributes:
        ids: The rollouts' ids.
        indices: The rollouts' positions in the input, int64 `[N]`.
        prompt_lengths: Tokens of each prompt, int64 `[N]`.
        offsets: int64 `[N + 1]`, from 0 to T.
        computed: The fields that were asked for, by name.
        truncated: Which rollouts lost tokens, as they had too many, bool `[N]`; None: the scorer truncates none.
        mask: True where the model wrote the token that an entry is about, bool `[T]`; None: everywhere.
        step_offsets: int64 `[N + 1]`, from 0 to the number of steps; None: steps were not asked for.
        heads: The names of the K outputs, where several heads gave them.

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
    mask: NDArray[np.bool_] = field(default=None)  # type: ignore[arg-type]  # made below
    step_offsets: NDArray[np.int64] | None = None
    heads: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.ids)
        _check("indices", self.indices, np.int64, count)
        _check("prompt_lengths", self.prompt_lengths, np.int64, count)
        _check_offsets("offsets", self.offsets, count)
        if self.step_offsets is not None:
            _check_offsets("step_offsets", self.step_offsets, count)
        if self.mask is None:
            object.__setattr__(self, "mask", np.ones(self.token_count, np.bool_))
        _check("mask", self.mask, np.bool_, self.token_count)
        if unknown := self.computed.keys() - COLUMNS.keys():
            raise ValueError(f"computed: expected some of {', '.join(COLUMNS)}, got {', '.join(sorted(unknown))}")
        for name, array in self.computed.items():
            width = COLUMNS[name].width
            _check(
                name,
                array,
                COLUMNS[name].dtype,
                self._length(name),
                *(np.shape(array)[1:2] if width is None else width),
            )
        if self.truncated is not None:
            _check(TRUNCATED, self.truncated, np.bool_, count)

    def _length(self, name: str) -> int:
        if is_per("rollout", name):
            return len(self.ids)
        if is_per("step", name):
            return 0 if self.step_offsets is None else int(self.step_offsets[-1])
        return self.token_count

    @property
    def reward(self) -> NDArray[np.float32]:
        """The head's output at the last token of each completion that the model wrote, float32 `[N]`."""
        return self._field("reward")

    @property
    def prompt_value(self) -> NDArray[np.float32]:
        """The head's output at each prompt's last token, float32 `[N]`."""
        return self._field("prompt_value")

    @property
    def bootstrap(self) -> NDArray[np.float32]:
        """The head's output after each completion's last token, for rollouts that were cut off, float32 `[N]`."""
        return self._field("bootstrap")

    @property
    def columns(self) -> tuple[str, ...]:
        """What is written of them: the fields, the tokens' columns, and `truncated` where the scorer truncates."""
        names = tuple(name for name in COLUMNS if name in self.computed)
        return names if self.truncated is None else (*names, TRUNCATED)

    @property
    def token_count(self) -> int:
        """Completion tokens of all rollouts together."""
        return int(self.offsets[-1])

    @property
    def token_counts(self) -> NDArray[np.int64]:
        """Entries of each rollout in the per-token fields: its completion tokens by default, int64 `[N]`."""
        return np.diff(self.offsets)

    def flat(self, name: str) -> tuple[NDArray[Any], NDArray[np.int64] | None]:
        """One of `columns`, and where each rollout's entries are in it; None where every rollout has one.

        Raises:
            MissingFieldError: It was not asked for.
        """
        if name == TRUNCATED and self.truncated is not None:
            return self.truncated, None
        array = self._field(name)
        return array, {"token": self.offsets, "step": self.step_offsets, "rollout": None}[COLUMNS[name].unit]

    def padded(self, name: str) -> NDArray[Any]:
        """A field as one array `[N, longest]`, or `[N, longest, K]`, with zeros behind each rollout's entries.

        `"mask"` is one too; False stands there behind them.

        Raises:
            MissingFieldError: It was not asked for.
        """
        flat, offsets = (self.mask, self.offsets) if name == "mask" else self.flat(name)
        if offsets is None:
            return flat
        lengths = np.diff(offsets)
        padded = np.zeros((len(self), int(lengths.max(initial=0)), *flat.shape[1:]), flat.dtype)
        padded[np.arange(padded.shape[1]) < lengths[:, None]] = flat
        return padded

    def of(self, head: str) -> "Scores":
        """The same scores by one of several heads: its output alone.

        Raises:
            ValueError: There is no head of this name.
        """
        if head not in self.heads:
            raise ValueError(
                f"head: expected one of {', '.join(self.heads) or 'none, as there is one head'}, got {head!r}"
            )
        places = [at for at, name in enumerate(self.heads) if name == head]
        computed = {
            name: _outputs(array, places, alone=name != "steps") if COLUMNS[name].origin == "head" else array
            for name, array in self.computed.items()
        }
        return replace(self, computed=computed, heads=())

    def advantages(
        self,
        reward: Any = None,
        *,
        cut_off: Any = None,
        ref_logprobs: Any = None,
        kl_coef: float = 0.0,
        kl: Literal["k1", "k2", "k3", "abs"] = "k1",
        **options: Any,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Advantages and returns of every token, by `vhead.returns.gae` from these values, offsets and masks.

        Args:
            reward: A number for each rollout `[N]`, which stands at its last token of the model's, or one for each
                token `[T]`. None: the head's own rewards, which have to be among these scores.
            cut_off: A bool for each rollout `[N]`, true where it would have gone on: the value behind its last token
                counts, for which `bootstrap` has to be among these scores. None: no rollout was cut off.
            ref_logprobs: Log-probabilities of the tokens by a reference model, `[T]`, for a penalty on the divergence.
            kl_coef: The penalty's coefficient; with it, `logprobs` has to be among these scores.
            kl: Which estimate of the divergence it is.
            **options: `gamma`, `lam`, `value_lam`, `bootstrap` and `convention`, as `vhead.returns.gae` takes them.

        Returns:
            Float32 `[T]` each, where the offsets are these scores'.

        Raises:
            MissingFieldError: Values, rewards, bootstraps or log-probabilities that are needed were not asked for.
            VheadError: The head has several outputs.
            ValueError: An argument does not fit.
        """
        divergence: dict[str, Any] = {}
        if ref_logprobs is not None:
            divergence = {"logprobs": self.logprobs, "ref_logprobs": ref_logprobs, "kl_coef": kl_coef, "kl": kl}
        if cut_off is not None:
            if options.get("bootstrap") is not None:
                raise ValueError(
                    "cut_off: expected None beside bootstrap, which already says what counts behind the end"
                )
            options = {**options, "bootstrap": bootstrap_of(self, cut_off)}
        return advantages(self, reward, divergence, options)

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
            computed=self._taken(position, position, position + 1),
            mask=self.mask[tokens],
            truncated=self.truncated is not None and bool(self.truncated[position]),
        )

    def __iter__(self) -> Iterator[Score]:
        return (self[position] for position in range(len(self)))

    def __repr__(self) -> str:
        return f"Scores({len(self)} rollouts, {self.token_count} completion tokens, fields={list(self.computed)})"

    def _repr_html_(self) -> str:
        """What a notebook shows: the first rollouts, a row each, per-token fields by their mean."""
        return views.html_table(self)

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
        rollouts = slice(start, stop)
        steps = self.step_offsets
        return replace(
            self,
            ids=self.ids[rollouts],
            indices=self.indices[rollouts],
            prompt_lengths=self.prompt_lengths[rollouts],
            offsets=self.offsets[start : stop + 1] - self.offsets[start],
            computed=self._taken(rollouts, start, stop),
            truncated=None if self.truncated is None else self.truncated[rollouts],
            mask=self.mask[int(self.offsets[start]) : int(self.offsets[stop])],
            step_offsets=None if steps is None else steps[start : stop + 1] - steps[start],
        )

    def _taken(self, rollouts: int | slice, start: int, stop: int) -> dict[str, NDArray[Any]]:
        """What the rollouts from `start` to `stop` own of each field; of fields with one entry each, `rollouts`."""
        steps = self.step_offsets
        owned: dict[Unit, int | slice] = {
            "token": slice(int(self.offsets[start]), int(self.offsets[stop])),
            "step": slice(0, 0) if steps is None else slice(int(steps[start]), int(steps[stop])),
            "rollout": rollouts,
        }
        return {name: array[owned[COLUMNS[name].unit]] for name, array in self.computed.items()}

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
        steps = [np.diff(part.step_offsets) for part in parts if part.step_offsets is not None]
        return cls(
            ids=tuple(name for part in parts for name in part.ids),
            indices=np.concatenate([part.indices for part in parts]),
            prompt_lengths=np.concatenate([part.prompt_lengths for part in parts]),
            offsets=offsets_of(np.concatenate([part.token_counts for part in parts])),
            computed={name: np.concatenate([part.computed[name] for part in parts]) for name in parts[0].computed},
            truncated=_joined([part.truncated for part in parts]),
            mask=np.concatenate([part.mask for part in parts]),
            step_offsets=offsets_of(np.concatenate(steps)) if steps else None,
            heads=parts[0].heads,
        )

    def to_arrow(self) -> "pyarrow.Table":
        """A table: `id`, the fields (`list<float32>` per token, `float32` per rollout), and `truncated` if it is there.

        With `"tokens"` also `token_ids` (`list<int64>`) and `token_offsets` (`list<fixed_size_list<int64>[2]>`). What
        has K entries in one place is a `fixed_size_list<...>[K]` there. The columns share the flat arrays' memory.

        Raises:
            MissingExtraError: pyarrow is not installed.
        """
        return views.arrow_table(self)

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with the columns of `to_arrow`; per-token fields hold array views.

        Raises:
            MissingPackageError: pandas is not installed; no extra brings it.
        """
        return views.data_frame(self)

    def to_torch(self) -> dict[str, Any]:
        """The fields, `mask` and `offsets` as tensors on the CPU, by name; they share the arrays' memory."""
        import torch  # Scores are of use without it.

        arrays = {**self.computed, "mask": self.mask, "offsets": self.offsets}
        if self.step_offsets is not None:
            arrays["step_offsets"] = self.step_offsets
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _outputs(array: NDArray[Any], places: list[int], *, alone: bool) -> NDArray[Any]:
    """These of the K outputs `[..., K]`; a single one without its dimension, where it is to stand alone."""
    return array[..., places[0]] if alone and len(places) == 1 else array[..., places]


def _joined(parts: Sequence[NDArray[np.bool_] | None]) -> NDArray[np.bool_] | None:
    there = [part for part in parts if part is not None]
    return np.concatenate(there) if there else None


def _check_offsets(name: str, offsets: NDArray[np.int64], count: int) -> None:
    _check(name, offsets, np.int64, count + 1)
    if offsets[0] != 0 or (np.diff(offsets) < 0).any():
        raise ValueError(f"{name}: expected a rising sequence from 0")


def _check(name: str, array: NDArray[Any], dtype: type, *shape: int) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != shape:
        got = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"{name}: expected {np.dtype(dtype)} {list(shape)}, got {got}")
