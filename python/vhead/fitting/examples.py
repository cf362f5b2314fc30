"""Rollouts with what a head is to say about them: targets and weights, from lists or from the fields of a file."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from vhead.errors import FieldError, FitError, RecordError
from vhead.fitting.folds import prompt_digest
from vhead.formats.layout import Format
from vhead.formats.trl import VHEAD
from vhead.rollouts.fields import SIDES
from vhead.rollouts.files.rows import Row
from vhead.rollouts.rollout import Rollout
from vhead.rollouts.wording import named, shown

Target = Literal["returns", "reward", "pairs"]
TARGETS: tuple[str, ...] = get_args(Target)
# The fields of a file that are read where none is named; the first record says which of them there is.
DEFAULT_FIELDS: dict[str, tuple[str, ...]] = {"returns": ("returns", "reward"), "reward": ("reward",), "pairs": ()}
_MISSING = object()
# A head, which is float32, could not say a larger one.
LARGEST = float(np.finfo(np.float32).max)
FINITE = "finite numbers that float32 can hold"


class Example(Protocol):
    """A rollout, or the two of a pair, with what is said about it.

    Attributes:
        prompt: The digest of its prompt, once it has been checked.
        target: Its target, once it has been checked: `[K]` for the whole rollout, `[C, K]` for its tokens.
        weight: Its weight: `[]` for the whole rollout, `[C]` for its tokens.
        field: What errors call its target.
        remedy: What errors say where there is none.
    """

    prompt: str
    field: str
    remedy: ClassVar[str]
    target: NDArray[np.float64]
    weight: NDArray[np.float64]

    @property
    def where(self) -> str:
        """What errors call the place."""

    def rollouts(self) -> tuple[Rollout, ...]:
        """The rollout, or the chosen and the rejected one."""

    def said(self) -> tuple[object, object, str]:
        """Target and weight as they came, None for nothing, and what errors call the target."""


class _Checked:
    """Holds what the check has found."""

    prompt: str
    field: str
    target: NDArray[np.float64]
    weight: NDArray[np.float64]


@dataclass(slots=False, eq=False)
class Given(_Checked):
    """An example that was given as objects."""

    remedy: ClassVar[str] = ""
    index: int
    given: tuple[Rollout, ...]
    raw_target: object
    raw_weight: object

    @property
    def where(self) -> str:
        return f"record {self.index}"

    def rollouts(self) -> tuple[Rollout, ...]:
        return self.given

    def said(self) -> tuple[object, object, str]:
        return self.raw_target, self.raw_weight, "targets"


@dataclass(slots=False, eq=False)
class Recorded(_Checked):
    """An example in a record of a file."""

    remedy: ClassVar[str] = "; --target-field names the field that has it"
    row: Row
    fields: tuple[str, ...]
    weight_field: str | None

    @property
    def where(self) -> str:
        return self.row.where

    def rollouts(self) -> tuple[Rollout, ...]:
        return self.row.rollouts()

    def said(self) -> tuple[object, object, str]:
        names = self.fields if self.weight_field is None else (*self.fields, self.weight_field)
        found = self.row.members(names)
        weight = None if self.weight_field is None else found.get(self.weight_field)
        if self.weight_field is not None and weight is None:
            raise FieldError(self.where, self.weight_field, expected="a weight, 0 or more", got="nothing")
        values = [found.get(name) for name in self.fields]
        return (values[0] if len(values) == 1 else _side_by_side(values)), weight, ", ".join(self.fields)


def _side_by_side(values: Sequence[object]) -> object:
    """Several fields as one target with an output each; None where one of them is missing."""
    if not values or any(value is None for value in values):
        return None
    arrays = [np.asarray(value) for value in values]
    return np.stack(arrays, axis=-1) if len({array.shape for array in arrays}) == 1 else None


@dataclass(frozen=True)
class TargetFields:
    """The fields of records that say what a head is fitted to.

    Attributes:
        targets: One for each output; None: `DEFAULT_FIELDS` of the target.
        weight: The field with the weight; None: each counts as 1.
    """

    targets: tuple[str, ...] | None = None
    weight: str | None = None


class Checks:
    """Checks each example when its turn comes to be read.

    Args:
        target: What the head is fitted to.
        format: That of the head; None: one that can hold it.

    Attributes:
        outputs: K, as the first example has it; None before that.
    """

    def __init__(self, target: Target, format: Format | None = None) -> None:
        self._target, self._format = target, format
        self.outputs = 1 if target == "pairs" else None

    def __call__(self, example: Example, rollouts: Sequence[Rollout]) -> None:
        """Checks the next example, and gives it its digest, target and weight.

        Raises:
            FieldError: It is no pair where pairs are wanted, or the reverse; or its target or weight is none.
        """
        for rollout in rollouts:
            if not isinstance(rollout, Rollout):
                raise FieldError(example.where, "rollout", expected="a Rollout", got=type(rollout).__name__)
        name = named(example.where, rollouts[0].id)
        self._check_form(name, rollouts)
        digests = [prompt_digest(rollout) for rollout in rollouts]
        if len(set(digests)) > 1:
            expected = f"the prompt of the {SIDES[0]} side, whose partner it is"
            raise FieldError(f"{name}, {SIDES[1]}", "prompt", expected=expected, got="another one")
        example.prompt = digests[0]
        target, weight, example.field = example.said()
        example.weight = self._weight(weight, name)
        if target is None and self._target != "pairs":
            raise FieldError(name, example.field, expected=self._expected, got=f"nothing{example.remedy}")
        example.target = np.ones(1) if self._target == "pairs" else self._checked(target, example.field, name)

    def _check_form(self, name: str, rollouts: Sequence[Rollout]) -> None:
        if self._target == "pairs" and len(rollouts) != len(SIDES):
            raise FieldError(name, SIDES[1], expected="a pair, `chosen` and `rejected`", got="one rollout alone")
        if self._target != "pairs" and len(rollouts) != 1:
            expected = f"one completion, because the target is {self._target}"
            raise FieldError(name, SIDES[0], expected=expected, got="a pair; target='pairs' fits to pairs")

    def _checked(self, target: object, field: str, name: str) -> NDArray[np.float64]:
        array = _numbers(target)
        if array is None or array.ndim > (2 if self._target == "returns" else 1) or not array.size:
            raise FieldError(name, field, expected=self._expected, got=shown(target))
        if array.ndim == 0 or (self._target == "returns" and array.ndim == 1):
            array = array[..., None]
        if self.outputs is None:
            self._check_format(array.shape[-1], field, name)
            self.outputs = array.shape[-1]
        if array.shape[-1] != self.outputs:
            expected = f"{self.outputs} numbers, as the first target has"
            raise FieldError(name, field, expected=expected, got=str(array.shape[-1]))
        if array.ndim == 1:
            wrong = array[~(np.abs(array) <= LARGEST)]
            if len(wrong):
                raise FieldError(name, field, expected=FINITE, got=str(wrong[0]))
        return array

    def _check_format(self, outputs: int, field: str, name: str) -> None:
        """Refuses what makes a head that its format cannot hold, which would be found out after the last record."""
        if self._format is not None and self._format.outputs not in (None, outputs):
            one = self._format.outputs
            expected = f"targets for {one} {'output' if one == 1 else 'outputs'}, as {self._format.name} holds"
            got = f"those for {outputs}; {VHEAD.name} is a format that holds any number"
            raise FieldError(name, field, expected=expected, got=got)

    @property
    def _expected(self) -> str:
        if self._target == "reward":
            return "a number, or a list of them for several outputs"
        return "a return for each token of the completion, or one number, which is the rollout's reward"

    def _weight(self, weight: object, name: str) -> NDArray[np.float64]:
        array = np.ones(()) if weight is None else _numbers(weight)
        longest = 1 if self._target == "returns" else 0
        if array is None or array.ndim > longest or not (np.isfinite(array) & (array >= 0)).all():
            each = ", or one for each token of the completion" if longest else ""
            raise FieldError(name, "weights", expected=f"a number, 0 or more{each}", got=shown(weight))
        return array


def _numbers(value: Any) -> NDArray[np.float64] | None:
    """A number, or an array of them, float64; None where it is anything else."""
    if isinstance(value, Real):
        try:
            return np.asarray(float(value))
        except OverflowError:  # An integer of more than 300 digits.
            return None
    if hasattr(value, "detach"):
        # numpy has no bfloat16, in which a model may give rewards.
        value = (value.detach().double() if value.is_floating_point() else value.detach()).cpu().numpy()
    try:
        array = np.asarray(value)
    except ValueError:
        return None
    return array.astype(np.float64) if array.dtype.kind in "fiub" else None


def given_examples(
    rollouts: Iterable[Any], targets: Iterable[object] | None, weights: Iterable[object] | None, target: Target
) -> Iterator[Given]:
    """Examples from rollouts and what is said about each.

    Raises:
        FitError: There are targets for pairs, none for anything else, or more or fewer than rollouts; or a rollout at
            the end of the pairs has no partner. Lists of other lengths are found before anything is computed.
    """
    if isinstance(rollouts, Sized) and isinstance(targets, Sized) and len(targets) > len(rollouts):
        raise FitError(
            f"targets: expected one for each of the rollouts, got {len(targets):,} for {len(rollouts):,} rollouts; "
            "what is said about tokens goes in one array a rollout"
        )
    sources = _pairs(rollouts) if target == "pairs" else ((rollout,) for rollout in rollouts)
    columns = {"targets": targets, "weights": weights}
    iterators = {name: iter(column) for name, column in columns.items() if column is not None}
    for index, sides in enumerate(sources):
        values = {name: next(iterator, _MISSING) for name, iterator in iterators.items()}
        for name, value in values.items():
            if value is _MISSING:
                raise FitError(f"{name}: expected one for each of the rollouts, got only {index:,}")
        yield Given(index, sides, values.get("targets"), values.get("weights"))
    for name, iterator in iterators.items():
        if next(iterator, _MISSING) is not _MISSING:
            raise FitError(f"{name}: expected one for each of the rollouts, got more of them than there are rollouts")


def _pairs(rollouts: Iterable[Any]) -> Iterator[tuple[Rollout, ...]]:
    """Pairs as they are, or two rollouts that follow each other."""
    waiting: Rollout | None = None
    for item in rollouts:
        if isinstance(item, tuple | list):
            yield tuple(item)
        elif waiting is None:
            waiting = item
        else:
            yield waiting, item
            waiting = None
    if waiting is not None:
        raise FitError(
            "rollouts: expected pairs, each chosen rollout followed by the rejected one, got a last one without partner"
        )


def recorded_examples(rows: Iterable[Row], target: Target, fields: TargetFields) -> Iterator[Recorded]:
    """Examples from the records of a file."""
    names = fields.targets
    for row in rows:
        names = _present(row, DEFAULT_FIELDS[target]) if names is None else names
        yield Recorded(row, names, fields.weight)


def _present(row: Row, names: Sequence[str]) -> tuple[str, ...]:
    found: Mapping[str, object] = {}
    with suppress(RecordError):  # A record that cannot be read is reported when its turn comes.
        found = row.members(names)
    return tuple(name for name in names if found.get(name) is not None)[:1] or tuple(names[:1])
