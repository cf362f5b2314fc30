"""One type for each column of JSON records, whatever came first.

A `Shape` is what the records so far hold in one place. Shapes of more records are united: whole numbers widen to
fractions, the members of objects are put together, and nothing, an empty list or an empty object takes what comes. What
cannot be one type is an error that names both records.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import chain
from types import NoneType
from typing import Any

from vhead.errors import FieldError
from vhead.rollouts.wording import shown

# Beyond it, a float cannot hold every whole number.
_EXACT_IN_FLOATS = 2**53
_LARGEST_SIGNED = 2**63 - 1
_LARGEST_UNSIGNED = 2**64 - 1
# What Parquet's readers take: pyarrow's refuse lists that are nested 49 deep.
_DEEPEST = 32
_OTHERWISE = "JSON Lines (.jsonl) can hold any"


class Kind(StrEnum):
    """What a place can hold."""

    NOTHING = "nothing"
    BOOLEAN = "a boolean"
    INTEGER = "a whole number"
    FLOAT = "a number with a fraction"
    TEXT = "text"
    LIST = "a list"
    OBJECT = "an object"


_SCALARS = {str: Kind.TEXT, bool: Kind.BOOLEAN}


@dataclass(frozen=True, slots=True)
class Bound:
    """The smallest or the largest whole number of a place, and which record holds it."""

    number: int
    where: str


@dataclass(frozen=True, slots=True)
class Shape:
    """What records hold in one place.

    Attributes:
        kind: What kind of values there are.
        where: The first record that holds something of this kind there.
        least: The smallest whole number; None for other kinds.
        most: The largest whole number; None for other kinds.
        items: What lists hold; None for other kinds.
        members: What objects hold, by name; empty for other kinds.
    """

    kind: Kind
    where: str
    least: Bound | None = None
    most: Bound | None = None
    items: "Shape | None" = None
    members: Mapping[str, "Shape"] = field(default_factory=dict)

    @property
    def is_unsigned(self) -> bool:
        """Whether whole numbers need the sixty-fourth bit."""
        return self.most is not None and self.most.number > _LARGEST_SIGNED

    def to_json(self) -> list[Any]:
        """The shape as lists, for JSON."""
        bounds = [None if bound is None else [bound.number, bound.where] for bound in (self.least, self.most)]
        items = None if self.items is None else self.items.to_json()
        members = {name: member.to_json() for name, member in self.members.items()}
        return [self.kind.name, self.where, *bounds, items, members]

    @classmethod
    def from_json(cls, content: Sequence[Any]) -> "Shape":
        """The shape that `to_json` made lists of."""
        kind, where, least, most, items, members = content
        return cls(
            kind=Kind[kind],
            where=where,
            least=None if least is None else Bound(*least),
            most=None if most is None else Bound(*most),
            items=None if items is None else cls.from_json(items),
            members={name: cls.from_json(member) for name, member in members.items()},
        )


NOTHING = Shape(Kind.NOTHING, "")


def shape_of(values: Sequence[Any], where: str, path: str = "", depth: int = 0) -> Shape:
    """The shape of a place from the values that are there.

    Args:
        values: JSON values.
        where: Which record holds them.
        path: What errors call the place.
        depth: How deep it is.

    Raises:
        FieldError: The values are of several kinds, or no Parquet file can hold one of them.
    """
    if depth > _DEEPEST:
        raise _misfit(where, path, f"at most {_DEEPEST} levels of nesting in a Parquet file", "more")
    types = set(map(type, values)) - {NoneType}
    if not types:
        return NOTHING
    if types <= {int, float}:
        return _numbers(values, where, path)
    if len(types) > 1:
        first, second = _two_kinds(values)
        raise _misfit(where, path, "values of one kind in a Parquet file", f"{shown(first)} and {shown(second)}")
    (only,) = types
    present = [value for value in values if value is not None]
    if only is list:
        return Shape(
            Kind.LIST,
            where,
            items=shape_of(list(chain.from_iterable(present)), where, f"{path}[]", depth + 1),
        )
    if only is dict:
        return Shape(Kind.OBJECT, where, members=_members(present, where, path, depth))
    if only is str:
        _check_unicode(present, where, path)
    return Shape(_SCALARS[only], where)


def united(before: Shape, after: Shape, path: str = "") -> Shape:
    """The shape of what both describe: `before` itself where `after` adds nothing.

    Raises:
        FieldError: They cannot be one type.
    """
    if after.kind is Kind.NOTHING:
        return before
    if before.kind is Kind.NOTHING:
        return after
    kinds = {before.kind, after.kind}
    if kinds == {Kind.INTEGER, Kind.FLOAT}:
        return _widened(before, after, path)
    if len(kinds) > 1:
        raise _misfit(after.where, path, f"{before.kind}, as {before.where} has", str(after.kind))
    if before.kind is Kind.INTEGER:
        return _ranged(before, after, path)
    if before.items is not None and after.items is not None:
        items = united(before.items, after.items, f"{path}[]")
        return before if items is before.items else replace(before, items=items)
    members = dict(before.members)
    for name, member in after.members.items():
        members[name] = united(members.get(name, NOTHING), member, _below(path, name))
    same = len(members) == len(before.members) and all(members[name] is before.members[name] for name in members)
    return before if same else replace(before, members=members)


def _members(objects: Sequence[Mapping[str, Any]], where: str, path: str, depth: int) -> dict[str, Shape]:
    names = dict.fromkeys(chain.from_iterable(objects))
    _check_unicode(names, where, path)
    return {
        name: shape_of([members.get(name) for members in objects], where, _below(path, name), depth + 1)
        for name in names
    }


def _numbers(values: Sequence[Any], where: str, path: str) -> Shape:
    whole = [value for value in values if type(value) is int]
    fractions = len(whole) < len(values) and any(type(value) is float for value in values)
    if not whole:
        return Shape(Kind.FLOAT, where)
    integers = _ranged(Shape(Kind.INTEGER, where, Bound(min(whole), where), Bound(max(whole), where)), None, path)
    return _widened(integers, Shape(Kind.FLOAT, where), path) if fractions else integers


def _ranged(before: Shape, after: Shape | None, path: str) -> Shape:
    """Whole numbers of one column: all signed, or none negative."""
    least, most = before.least, before.most
    if after is not None:
        least = min((bound for bound in (before.least, after.least) if bound), key=lambda bound: bound.number)
        most = max((bound for bound in (before.most, after.most) if bound), key=lambda bound: bound.number)
    if least is None or most is None:
        return before
    for bound in (least, most):
        if not -_LARGEST_SIGNED - 1 <= bound.number <= _LARGEST_UNSIGNED:
            raise _misfit(bound.where, path, "whole numbers of 64 bits in a Parquet file", shown(bound.number))
    if most.number > _LARGEST_SIGNED and least.number < 0:
        first, second = (most, least) if before.most is most else (least, most)
        expected = f"a number that fits in 64 bits together with {first.number}, which {first.where} has"
        raise _misfit(second.where, path, expected, str(second.number))
    same = least is before.least and most is before.most
    return before if same else replace(before, least=least, most=most)


def _widened(before: Shape, after: Shape, path: str) -> Shape:
    """Whole numbers among fractions become floats where each stays the same number."""
    whole, fractions = (before, after) if before.kind is Kind.INTEGER else (after, before)
    for bound in (whole.least, whole.most):
        if bound is not None and abs(bound.number) > _EXACT_IN_FLOATS:
            if whole is before:
                expected = f"a whole number, because {bound.where} has {bound.number}, which 64-bit floats do not hold"
                raise _misfit(fractions.where, path, expected, str(fractions.kind))
            expected = f"a number that 64-bit floats hold, because {fractions.where} has a fraction"
            raise _misfit(bound.where, path, expected, str(bound.number))
    return fractions


def _check_unicode(texts: Iterable[str], where: str, path: str) -> None:
    joined = "".join(texts)
    if joined.isascii():
        return
    try:
        joined.encode()
    except UnicodeEncodeError:
        raise _misfit(where, path, "text that Unicode can hold", "half of a surrogate pair") from None


def _two_kinds(values: Iterable[Any]) -> tuple[Any, Any]:
    """Two values of different kinds."""
    present = [value for value in values if value is not None]
    return present[0], next(value for value in present if type(value) is not type(present[0]))


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _misfit(where: str, path: str, expected: str, got: str) -> FieldError:
    return FieldError(where, path or "record", expected=expected, got=f"{got}; {_OTHERWISE}")
