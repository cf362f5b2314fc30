"""Reads rollouts from Parquet files."""

import base64
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import date, datetime, time
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

from vhead.errors import FieldError, FileFormatError
from vhead.rollouts.arrow import pa, pq
from vhead.rollouts.arrow_values import exact, seconds
from vhead.rollouts.rollout import Rollout
from vhead.rollouts.rows import INPUT_FIELDS, Row, check_reserved, rollout_of

Result = TypeVar("Result")

# Larger batches are read a few microseconds a row faster; smaller ones hold less of a file whose values repeat, which
# may be a thousandth of what it holds.
_ROWS_AT_ONCE = 64
_VALUES_AT_ONCE = 2**22
_ROWS_PROBED = 16
_BYTES_OF_A_VALUE = 8
# Of a column, where pyarrow would otherwise hold a whole row group, which may be the whole file.
_BYTES_AT_ONCE = 2**20


@dataclass(frozen=True, slots=True)
class ParquetRow:
    """One row of a record batch."""

    batch: pa.RecordBatch
    at: int
    count: int
    reader: "ParquetReader"

    @property
    def where(self) -> str:
        return f"row {self.count}"

    @property
    def position(self) -> int:
        return self.count

    @property
    def digest(self) -> str:
        """The digest of the whole file: nobody mends a Parquet file in its middle, as lines of text are mended."""
        return self.reader.digest

    def rollout(self) -> Rollout:
        """What is to be scored; token ids are read from the batch without a Python object each."""
        names = [name for name in INPUT_FIELDS if name in self.batch.schema.names]
        return rollout_of({name: self._read(name, _plain) for name in names}, self.where)

    def columns(self) -> dict[str, Any]:
        """The row as Python objects; where those would lose digits, what `exact` gives.

        Raises:
            FieldError: A column holds what Python cannot, such as broken UTF-8 or a date beyond the year 9999.
        """
        return {name: self._read(name, exact) for name in self.batch.schema.names}

    def fields(self, names: Iterable[str]) -> dict[str, Any]:
        """Those of these columns that the file has, lists of numbers as arrays.

        Raises:
            FieldError: A column cannot be read.
        """
        there = self.batch.schema.names
        return {name: self._read(name, _numbers) for name in names if name in there}

    def json_object(self) -> str:
        """The row as a JSON object.

        Dates and times are ISO 8601, time spans seconds, decimals and UUIDs text, bytes base64; NaN and infinities are
        null.

        Raises:
            FieldError: A column holds something else that JSON cannot, or a time span that seconds would round.
        """
        record = self.columns()
        members = []
        for name, value in record.items():
            try:
                members.append(f"{_dump(name)}: {_dumped(value)}")
            except (TypeError, ValueError, RecursionError) as error:
                got = str(error) or type(error).__name__
                raise FieldError(self.where, name, expected="a value that JSON can hold", got=got) from None
        return f"{{{', '.join(members)}}}"

    def _read(self, name: str, read: Callable[[Any], Result]) -> Result:
        try:
            return read(self.batch.column(name)[self.at])
        except Exception as error:  # What a broken value raises depends on its type, and on pyarrow's release.
            got = f"one that cannot: {error}"
            raise FieldError(self.where, name, expected="a value that can be read", got=got) from None


class ParquetReader:
    """The rows of a Parquet file, read in batches: memory depends neither on its size nor on that of its row groups.

    Args:
        path: The file.
        reserved: Names of columns that the scores will take, so that the file may not have them.
        replaces: Whether such columns are left out instead.

    Attributes:
        size: How many rows there are.
        schema: The columns that are read, a `pyarrow.Schema`.

    Raises:
        FileFormatError: The file is not Parquet, or has a column's name twice.
        FieldError: A column has a name that the scores will take.
    """

    def __init__(self, path: Path, reserved: tuple[str, ...] = (), *, replaces: bool = False) -> None:
        self._path = path
        try:
            self._file = pq.ParquetFile(path, buffer_size=_BYTES_AT_ONCE, pre_buffer=False)
            schema = self._file.schema_arrow
            names = list(schema.names)
            self.size: int | None = self._file.metadata.num_rows
        except OSError as error:
            if error.errno is not None:
                raise
            raise self._unreadable(error) from None
        except Exception as error:  # Metadata can be broken in more ways than pyarrow has names for.
            raise self._unreadable(error) from None
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise FileFormatError(f"{path}: expected each column's name once, got {doubled[0]!r} twice or more")
        if not replaces:
            check_reserved(names, reserved, None)
        self._opened = _place(path.stat())
        self._columns = [name for name in names if name not in reserved]
        self.schema = pa.schema([schema.field(name) for name in self._columns], schema.metadata)

    @cached_property
    def digest(self) -> str:
        """The digest of the file's bytes."""
        with self._path.open("rb") as file:
            if _place(os.fstat(file.fileno())) != self._opened:
                raise FileFormatError(f"{self._path}: expected the file that is being read, found another of its name")
            return hashlib.file_digest(file, "sha256").hexdigest()

    def __iter__(self) -> Iterator[Row]:
        count = 0
        batches = self._batches()
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:  # Pages, too, can be broken in more ways than pyarrow has names for.
                raise FileFormatError(f"{self._path}: the file is broken after row {count}: {error}") from None
            if batch is None:
                return
            for at in range(batch.num_rows):
                count += 1
                yield ParquetRow(batch, at, count, self)

    def _batches(self) -> Iterator[pa.RecordBatch]:
        for group in range(self._file.metadata.num_row_groups):
            rows = _rows_at_once(self._file, group)
            for batch in self._file.iter_batches(rows, row_groups=[group]):
                yield batch if self._columns == batch.schema.names else batch.select(self._columns)

    def _unreadable(self, error: Exception) -> FileFormatError:
        return FileFormatError(f"{self._path}: not a readable Parquet file: {error}")

    def close(self) -> None:
        self._file.close()


def _place(status: os.stat_result) -> tuple[int, ...]:
    """What is another number where a name leads to another file, or to one that was written since."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _rows_at_once(file: pq.ParquetFile, group: int) -> int:
    """How many rows of a row group have few enough values to be held at once, by the size of its first ones.

    The metadata of its columns would say it too, but pyarrow ends the process where that is broken.
    """
    first = next(file.iter_batches(_ROWS_PROBED, row_groups=[group]), None)
    if first is None or not first.num_rows:
        return _ROWS_AT_ONCE
    values = first.nbytes // _BYTES_OF_A_VALUE
    rows: int = _VALUES_AT_ONCE * first.num_rows // max(values, 1)
    return max(1, min(_ROWS_AT_ONCE, rows))


def _plain(value: pa.Scalar) -> Any:
    return _array_or_plain(value, pa.types.is_integer)


def _numbers(value: pa.Scalar) -> Any:
    return _array_or_plain(value, lambda of: pa.types.is_integer(of) or pa.types.is_floating(of))


def _array_or_plain(value: pa.Scalar, is_taken: Callable[[pa.DataType], bool]) -> Any:
    is_list = pa.types.is_list(value.type) or pa.types.is_large_list(value.type)
    if not is_list or not value.is_valid or not is_taken(value.type.value_type) or value.values.null_count:
        return value.as_py()
    return value.values.to_numpy(zero_copy_only=False)


def _dumped(value: object) -> str:
    try:
        return _dump(value)
    except ValueError:
        return _dump(_without_nonfinite(value))


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_json_value)


def _json_value(value: object) -> str | float:
    if isinstance(value, pa.DurationScalar):
        return seconds(value)
    if isinstance(value, date | datetime | time):
        return value.isoformat()
    if isinstance(value, Decimal | UUID):
        return str(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    raise TypeError(type(value).__name__)


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nonfinite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
