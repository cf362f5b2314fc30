"""How errors show values, and what they call records."""

import reprlib

_SHOWN = 40

Id = str | int | float | None


def shown(value: object) -> str:
    """A value in an error message: short, with its type where the text does not show it."""
    if value is None:
        return "nothing"
    if isinstance(value, str | bytes | list | tuple | dict) and not value:
        return f"an empty {type(value).__name__}"
    return f"{_short(value, _SHOWN)} ({type(value).__name__})"


def named(where: str, id: Id) -> str:
    """What errors call a record: its place in the input, and its id where it has one."""
    return where if id is None else f"{where} (id {_short(id, 2 * _SHOWN)})"


def record_of(id: Id) -> str | None:
    """What errors call a record of which only the id is known; None where it has none."""
    return None if id is None else f"record {_short(id, 2 * _SHOWN)}"


def _short(value: object, length: int) -> str:
    """The beginning of a value's `repr`, of which no more is made than is shown, however large or deep it is."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother, short.maxlong = 4, 2 * length, 2 * length, 2 * length
    text = short.repr(value)
    return text if len(text) <= length else f"{text[:length]}..."
