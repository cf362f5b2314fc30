"""Reads rollouts from Parquet files."""

import base64
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import date, datetime, time
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from vhead.errors import FieldError, FileFormatError
from vhead.rollouts.fields import Fields, columns_of_fields
from vhead.rollouts.files.arrow import pa, pc, pq
from vhead.rollouts.files.arrow_values import exact, seconds
from vhead.rollouts.files.rows import Row, chained, check_reserved
from vhead.rollouts.records import rollouts_of
from vhead.rollouts.rollout import Rollout

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
    """One row of a record batch.

    Attributes:
        batch: Some rows of a file.
        at: Which of them.
        count: Its place among all rows of the input.
        reader: What reads the file.
        number: Its place in the file, where that is one of several.
        found: The batch's columns as far as rows have been asked for them.
    """

    batch: pa.RecordBatch
    at: int
    count: int
    reader: "ParquetReader"
    number: int | None = None
    found: "dict[str, _NumberLists | pa.Array]" = field(default_factory=dict)

    @property
    def where(self) -> str:
        return f"row {self.count}" if self.number is None else f"row {self.number} of {self.reader.path.name}"

    @property
    def position(self) -> int:
        return self.count

    @property
    def digest(self) -> str:
        """The digest of the whole file: nobody mends a Parquet file in its middle, as lines of text are mended."""
        return self.reader.digest

    def rollouts(self) -> tuple[Rollout, ...]:
        """What is to be scored; token ids are read from the batch without a Python object each."""
        names = [name for name in columns_of_fields(self.reader.fields) if name in self.reader.names]
        return rollouts_of({name: self._read(name, self._fast, "iu") for name in names}, self.where, self.reader.fields)

    def columns(self) -> dict[str, Any]:
        """The row as Python objects; where those would lose digits, what `exact` gives.

        Raises:
            FieldError: A column holds what Python cannot, such as broken UTF-8 or a date beyond the year 9999.
        """
        return {name: self._read(name, self._exact) for name in self.batch.schema.names}

    def members(self, names: Iterable[str]) -> dict[str, Any]:
        """Those of these columns that the file has, lists of numbers as arrays.

        Raises:
            FieldError: A column cannot be read.
        """
        there = self.reader.names
        return {name: self._read(name, self._fast, "iuf") for name in names if name in there}

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

    def _exact(self, name: str) -> Any:
        return exact(self.batch.column(name)[self.at])

    def _fast(self, name: str, kinds: str) -> Any:
        """Python objects, but an array where there are numbers of one of these kinds of numpy's, and no null."""
        column = self.found.get(name)
        if column is None:
            array = self.batch.column(name)
            column = self.found[name] = _number_lists(array) or array
        if not isinstance(column, _NumberLists):
            return column[self.at].as_py()
        if column.values.dtype.kind not in kinds or not column.is_whole[self.at]:
            return self.batch.column(name)[self.at].as_py()
        return column.values[slice(*column.bounds[self.at])]

    def _read(self, name: str, read: Callable[..., Any], *options: str) -> Any:
        try:
            return read(name, *options)
        except Exception as error:  # What a broken value raises depends on its type, and on pyarrow's release.
            got = f"one that cannot: {error}"
            raise FieldError(self.where, name, expected="a value that can be read", got=got) from None


class ParquetReader:
    """The rows of a Parquet file, read in batches: memory depends neither on its size nor on that of its row groups.

    Args:
        path: The file.
        reserved: Names of columns that the scores will take, so that the file may not have them.
        replaces: Whether such columns are left out instead.
        fields: Columns that hold fields under other names.

    Attributes:
        path: The file.
        place: Says whether a file of this name is still the same.
        digest_before: Stands for the files before this one.
        size: How many rows there are.
        schema: The columns that are read, a `pyarrow.Schema`.
        replaced: Names of columns that are left out.

    Raises:
        FileFormatError: The file is not Parquet, or has a column's name twice.
        FieldError: A column has a name that the scores will take.
    """

    def __init__(
        self, path: Path, reserved: tuple[str, ...] = (), *, replaces: bool = False, fields: Fields | None = None
    ) -> None:
        self.path = path
        self.fields = fields or {}
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
        self.place = _place(path.stat())
        self.digest_before = b""
        kept = [schema.field(name) for name in names if name not in reserved]
        self.schema = pa.schema(kept, schema.metadata)
        self.replaced = set(names) & set(reserved)

    @cached_property
    def names(self) -> frozenset[str]:
        """The columns' names; pyarrow makes them anew each time that it is asked."""
        return frozenset(self.schema.names)

    @cached_property
    def digest(self) -> str:
        """The digest of the file's bytes, and of the files before it."""
        with self.path.open("rb") as file:
            if _place(os.fstat(file.fileno())) != self.place:
                raise FileFormatError(f"{self.path}: expected the file that is being read, found another of its name")
            own = hashlib.file_digest(file, "sha256")
        return chained(self.digest_before, own.digest()).hex() if self.digest_before else own.hexdigest()

    def __iter__(self) -> Iterator[ParquetRow]:
        count = 0
        batches = self._batches()
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:  # Pages, too, can be broken in more ways than pyarrow has names for.
                raise FileFormatError(f"{self.path}: the file is broken after row {count}: {error}") from None
            if batch is None:
                return
            found: dict[str, _NumberLists | pa.Array] = {}
            for at in range(batch.num_rows):
                count += 1
                yield ParquetRow(batch, at, count, self, found=found)

    def _batches(self) -> Iterator[pa.RecordBatch]:
        for group in range(self._file.metadata.num_row_groups):
            rows = _rows_at_once(self._file, group)
            for batch in self._file.iter_batches(rows, row_groups=[group]):
                for column in batch.columns:
                    _check_dictionaries(column)
                yield batch if self.schema.names == batch.schema.names else batch.select(self.schema.names)

    def _unreadable(self, error: Exception) -> FileFormatError:
        return FileFormatError(f"{self.path}: not a readable Parquet file: {error}")

    def close(self) -> None:
        self._file.close()


class ParquetReaders:
    """The rows of several Parquet files with the same columns, one file after the other.

    Args:
        paths: The files, at least one.
        reserved: Names of columns that the scores will take, so that no file may have them.
        replaces: Whether such columns are left out instead.
        fields: Columns that hold fields under other names.

    Attributes:
        size: How many rows there are.
        schema: The columns that are read, a `pyarrow.Schema`.
        replaced: Names of columns that are left out.

    Raises:
        FileFormatError: A file is not Parquet, or has other columns than the first one.
        FieldError: A column has a name that the scores will take.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        reserved: tuple[str, ...] = (),
        *,
        replaces: bool = False,
        fields: Fields | None = None,
    ) -> None:
        self._paths = paths
        self._options: dict[str, Any] = {"reserved": reserved, "replaces": replaces, "fields": fields}
        self._opened: ParquetReader | None = None
        self._places: list[tuple[int, ...]] = []
        self.replaced: set[str] = set()
        rows = 0
        for path in paths:
            # Thousands of files cannot all be open.
            with closing(ParquetReader(path, **self._options)) as reader:
                if path == paths[0]:
                    self.schema = reader.schema
                self._check(path, reader.schema)
                self._places.append(reader.place)
                self.replaced |= reader.replaced
                rows += reader.size or 0
        self.size: int | None = rows

    def __iter__(self) -> Iterator[Row]:
        count, digest = 0, b""
        for path, place in zip(self._paths, self._places, strict=True):
            reader = self._opened = ParquetReader(path, **self._options)
            if reader.place != place:
                raise FileFormatError(f"{path}: expected the file that was there at first, found another of its name")
            reader.schema, reader.digest_before = self.schema, digest
            for row in reader:
                yield replace(row, count=count + row.count, number=row.count)
            count += reader.size or 0
            digest = reader.digest.encode()
            reader.close()

    def _check(self, path: Path, schema: pa.Schema) -> None:
        if sorted(schema, key=_name) != sorted(self.schema, key=_name):
            expected, got = (
                ", ".join(f"{field.name}: {field.type}" for field in each) for each in (self.schema, schema)
            )
            raise FileFormatError(f"{path}: expected the columns of {self._paths[0]} ({expected}), got {got}")

    def close(self) -> None:
        """Closes the file that is being read."""
        if self._opened is not None:
            self._opened.close()


def _name(field: pa.Field) -> str:
    name: str = field.name
    return name


def _check_dictionaries(array: pa.Array) -> None:
    """Looks at the indices of dictionaries: pyarrow follows broken ones out of its memory, and the process ends.

    Raises:
        ValueError: An index leads out of its dictionary.
    """
    if pa.types.is_dictionary(array.type):
        ends = pc.min_max(array.indices).as_py()
        if ends["min"] is not None and not 0 <= ends["min"] <= ends["max"] < len(array.dictionary):
            raise ValueError(f"an index out of a dictionary of {len(array.dictionary)}: {ends['min']} to {ends['max']}")
    elif pa.types.is_struct(array.type):
        for at in range(array.type.num_fields):
            _check_dictionaries(array.field(at))
    elif pa.types.is_nested(array.type) and hasattr(array, "values"):
        _check_dictionaries(array.values)


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


@dataclass(frozen=True, slots=True)
class _NumberLists:
    """A column of lists of numbers, without a Python object for each of them.

    Attributes:
        values: The numbers of all rows, over Arrow's own memory.
        bounds: Where each row's begin and end.
        is_whole: Whether the row has a list, and no null in it.
    """

    values: NDArray[Any]
    bounds: list[list[int]]
    is_whole: list[bool]


def _number_lists(column: pa.Array) -> _NumberLists | None:
    """The lists of a column; None where it holds anything but lists of numbers.

    Raises:
        ValueError: The lists lead out of the column's numbers.
    """
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        return None
    if not (pa.types.is_integer(column.type.value_type) or pa.types.is_floating(column.type.value_type)):
        return None
    offsets, all_values = _array(column.offsets), column.values
    first, last = offsets[[0, -1]].tolist()
    if not 0 <= first <= last <= len(all_values) or (np.diff(offsets) < 0).any():
        raise ValueError(f"lists that lead out of the {len(all_values):,} numbers of the column")
    values = all_values.slice(first, last - first)
    is_whole = _flags(column.is_valid())
    if values.null_count:
        before = np.concatenate([[0], np.cumsum(_flags(values.is_null()))])
        is_whole &= np.diff(before[offsets - first]) == 0
    bounds = np.column_stack([offsets[:-1], offsets[1:]]) - first
    return _NumberLists(_array(values), bounds.tolist(), is_whole.tolist())


def _flags(array: pa.Array) -> NDArray[np.bool_]:
    return _array(array.cast(pa.uint8())).astype(np.bool_)


def _array(values: pa.Array) -> NDArray[Any]:
    """Numbers as an array over Arrow's own memory; pyarrow's `to_numpy` would import pandas for it."""
    dtype = np.dtype(values.type.to_pandas_dtype())
    if not len(values):
        return np.empty(0, dtype)
    return np.frombuffer(values.buffers()[1], dtype, len(values), values.offset * dtype.itemsize)


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
