"""Files of rollouts: which format a name means."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from vhead.errors import FileFormatError
from vhead.rollouts.fields import Fields
from vhead.rollouts.jsonl import JsonlReader
from vhead.rollouts.rows import Row
from vhead.rollouts.standard_streams import standard_input

STANDARD_STREAM = "-"
ENDINGS = (".jsonl", ".parquet")


class Reader(Protocol):
    """The records of a file, in order.

    Attributes:
        size: How much there is to read, in the units of `Row.position`; None when unknown.
        schema: A `pyarrow.Schema` where the columns are known before the records are.
    """

    size: int | None
    schema: Any

    def __iter__(self) -> Iterator[Row]: ...

    def close(self) -> None:
        """Closes the file."""


def format_of(name: str) -> str:
    """The format that a file name means: its suffix, or `.jsonl` for `-`.

    Raises:
        FileFormatError: The suffix names no format.
    """
    suffix = ".jsonl" if name == STANDARD_STREAM else Path(name).suffix.lower()
    if suffix not in ENDINGS:
        raise FileFormatError(f"{name}: expected a name that ends in {' or '.join(ENDINGS)}, or `-`, got {suffix!r}")
    return suffix


def open_reader(
    name: str, reserved: tuple[str, ...] = (), *, replaces: bool = False, fields: Fields | None = None
) -> Reader:
    """A reader for a file, or for standard input as JSON Lines when `name` is `-`.

    Args:
        name: A file name or `-`.
        reserved: Names of columns that the input may not have, as the scores will take them.
        replaces: Whether the input's columns of these names are left out instead.
        fields: Columns that hold fields under other names.

    Raises:
        FileFormatError: The suffix names no format, or the file does not hold it.
        OSError: The file cannot be opened.
        MissingExtraError: pyarrow is needed and not installed.
    """
    if format_of(name) == ".parquet":
        from vhead.rollouts.parquet import ParquetReader  # pyarrow only when used

        return ParquetReader(Path(name), reserved, replaces=replaces, fields=fields)
    if name == STANDARD_STREAM:
        return JsonlReader(standard_input(), None, reserved, replaces=replaces, fields=fields)
    return JsonlReader(Path(name).open("rb"), Path(name).stat().st_size, reserved, replaces=replaces, fields=fields)
