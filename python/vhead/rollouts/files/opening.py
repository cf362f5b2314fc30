"""Files of rollouts: which format a name means."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from vhead.errors import FileFormatError
from vhead.rollouts.fields import Fields
from vhead.rollouts.files.compressed import COMPRESSIONS, DecompressedFile
from vhead.rollouts.files.jsonl import JsonlReader
from vhead.rollouts.files.rows import Row
from vhead.rollouts.files.sources import input_files
from vhead.rollouts.files.standard_streams import standard_input

STANDARD_STREAM = "-"
_BYTES_AT_ONCE = 2**20
ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


class Reader(Protocol):
    """The records of a file, in order.

    Attributes:
        size: How much there is to read, in the units of `Row.position`; None when unknown.
        schema: A `pyarrow.Schema` where the columns are known before the records are.
        replaced: Names of the input's columns that were left out for the scores' so far.
    """

    size: int | None
    schema: Any
    replaced: set[str]

    def __iter__(self) -> Iterator[Row]: ...

    def close(self) -> None:
        """Closes the file."""


def format_of(name: str) -> str:
    """The format that a file name means: its ending, or `.jsonl` for `-`.

    Raises:
        FileFormatError: The ending names no format.
    """
    if name == STANDARD_STREAM:
        return ".jsonl"
    ending = next((ending for ending in ENDINGS if name.lower().endswith(ending)), None)
    if ending is None or Path(name).name.lower() == ending:
        got = Path(name).suffix.lower()
        raise FileFormatError(f"{name}: expected a name that ends in {' or '.join(ENDINGS)}, or `-`, got {got!r}")
    return ending


def open_reader(
    name: str, reserved: tuple[str, ...] = (), *, replaces: bool = False, fields: Fields | None = None
) -> Reader:
    """A reader for an input, or for standard input as JSON Lines when `name` is `-`.

    Args:
        name: What `input_files` takes, or `-`. Several Parquet files are read as one input.
        reserved: Names of columns that the input may not have, as the scores will take them.
        replaces: Whether the input's columns of these names are left out instead.
        fields: Columns that hold fields under other names.

    Raises:
        FileFormatError: The ending names no format, the file does not hold it, or several files have other columns.
        OSError: The file cannot be opened.
        MissingExtraError: pyarrow is needed and not installed.
    """
    if name == STANDARD_STREAM:
        return JsonlReader(standard_input(), None, reserved, replaces=replaces, fields=fields)
    paths = input_files(name)
    if {format_of(str(path)) for path in paths} == {".parquet"}:
        from vhead.rollouts.files.parquet import ParquetReader, ParquetReaders  # pyarrow only when used

        if len(paths) == 1:
            return ParquetReader(paths[0], reserved, replaces=replaces, fields=fields)
        return ParquetReaders(paths, reserved, replaces=replaces, fields=fields)
    (path,) = paths
    size = path.stat().st_size
    if path.suffix.lower() in COMPRESSIONS:
        raw = DecompressedFile(path)
        stream = io.BufferedReader(raw, _BYTES_AT_ONCE)
        return JsonlReader(stream, size, reserved, replaces=replaces, fields=fields, position=lambda: raw.position)
    return JsonlReader(path.open("rb"), size, reserved, replaces=replaces, fields=fields)
