"""Parquet in and out; the only module that needs pyarrow, which the extra `data` brings."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO

from vhead.errors import FieldError, FileFormatError, MissingExtraError
from vhead.scoring.rollout import Rollout, shown
from vhead.scoring.rows import INPUT_FIELDS, Row, check_reserved, rollout_of
from vhead.scoring.scores import Scores

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as error:
    raise MissingExtraError("pyarrow", "data") from error

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class ParquetRow:
    """One row of a record batch."""

    batch: pa.RecordBatch
    at: int
    position: int

    @property
    def where(self) -> str:
        """The record's place in the file."""
        return f"row {self.position}"

    def rollout(self) -> Rollout:
        """What is to be scored; token ids are read from the batch without a Python object each."""
        names = [name for name in INPUT_FIELDS if name in self.batch.schema.names]
        return rollout_of({name: _plain(self.batch.column(name)[self.at]) for name in names}, self.where)

    def columns(self) -> dict[str, Any]:
        """The row as Python objects."""
        return {name: self.batch.column(name)[self.at].as_py() for name in self.batch.schema.names}

    def json_object(self) -> str:
        """The row as a JSON object: times in ISO 8601, decimals as text, NaN and infinities as null.

        Raises:
            FieldError: A column holds what JSON cannot, such as bytes.
        """
        record = self.columns()
        try:
            return _dump(record)
        except ValueError:
            return _dump(_without_nonfinite(record))
        except TypeError as error:
            name = next(name for name in record if not _dumps(record[name]))
            raise FieldError(self.where, name, expected="a value that JSON can hold", got=str(error)) from None


class ParquetReader:
    """The rows of a Parquet file, read in batches.

    Raises:
        FileFormatError: The file is not Parquet, or has no columns that make a rollout.
        FieldError: A column has a name that the scores will take.
    """

    def __init__(self, path: Path, reserved: tuple[str, ...] = ()) -> None:
        try:
            self._file = pq.ParquetFile(path)
        except pa.ArrowInvalid as error:
            raise FileFormatError(f"{path}: not a readable Parquet file: {error}") from None
        self._path = path
        self.size: int | None = self._file.metadata.num_rows
        check_reserved(self._file.schema_arrow.names, reserved, None)

    def __iter__(self) -> Iterator[Row]:
        position = 0
        try:
            for batch in self._file.iter_batches(_ROWS_AT_ONCE):
                for at in range(batch.num_rows):
                    position += 1
                    yield ParquetRow(batch, at, position)
        except (pa.ArrowException, OSError) as error:
            raise FileFormatError(f"{self._path}: the file is broken after row {position}: {error}") from None

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class ParquetWriter:
    """Writes the input's columns with the scores behind them; per-token scores are `list<float32>` columns.

    The first records decide the columns and their types.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._carried: Any = None
        self._writer: pq.ParquetWriter | None = None

    def write(self, rows: Sequence[Row], scores: Scores) -> None:
        """Appends the records as one row group.

        Raises:
            FieldError: A record has a column, or a type in a column, that the first records did not have.
        """
        if not rows:
            return
        table = self._table(rows)
        self._carried = table.schema
        table = _with_scores(table, scores)
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._stream, table.schema)
        self._writer.write_table(table)

    def finish(self, *, complete: bool) -> None:
        """Writes the footer, without which the file is not readable."""
        if self._writer is None and complete:
            self._writer = pq.ParquetWriter(self._stream, pa.schema([]))
        if self._writer is not None:
            self._writer.close()

    def _table(self, rows: Sequence[Row]) -> pa.Table:
        if all(isinstance(row, ParquetRow) for row in rows):
            return _taken(rows)  # type: ignore[arg-type]
        records = [row.columns() for row in rows]
        if self._carried is None:
            return _inferred(records)
        return self._like_before(rows, records)

    def _like_before(self, rows: Sequence[Row], records: Sequence[Mapping[str, Any]]) -> pa.Table:
        known = set(self._carried.names)
        for row, record in zip(rows, records, strict=True):
            for name in record.keys() - known:
                raise FieldError(row.where, name, expected="a column of the first records", got="a new column")
        try:
            return pa.Table.from_pylist(records, schema=self._carried)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            for row, record in zip(rows, records, strict=True):
                self._check_types(row, record)
            raise

    def _check_types(self, row: Row, record: Mapping[str, Any]) -> None:
        for column in self._carried:
            try:
                pa.array([record.get(column.name)], column.type)
            except (pa.ArrowInvalid, pa.ArrowTypeError):
                expected = f"{column.type}, as in the first records"
                raise FieldError(row.where, column.name, expected=expected, got=shown(record[column.name])) from None


def _inferred(records: Sequence[Mapping[str, Any]]) -> pa.Table:
    """A table whose columns are those of all these records; a column of nothing but nulls becomes text."""
    names = list(dict.fromkeys(name for record in records for name in record))
    columns = {}
    for name in names:
        values = [record.get(name) for record in records]
        try:
            column = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise FieldError(None, name, expected="one type in all records of a Parquet file", got=str(error)) from None
        columns[name] = column.cast(pa.string()) if pa.types.is_null(column.type) else column
    return pa.table(columns)


def _taken(rows: Sequence[ParquetRow]) -> pa.Table:
    """The rows as Arrow holds them, without a Python object each."""
    pieces: list[tuple[pa.RecordBatch, list[int]]] = []
    for row in rows:
        if not pieces or pieces[-1][0] is not row.batch:
            pieces.append((row.batch, []))
        pieces[-1][1].append(row.at)
    return pa.Table.from_batches([batch.take(pa.array(at)) for batch, at in pieces])


def _with_scores(table: pa.Table, scores: Scores) -> pa.Table:
    computed = scores.to_arrow()
    for name in scores.fields:
        table = table.append_column(name, computed.column(name))
    return table


def _plain(value: pa.Scalar) -> Any:  # noqa: ANN401, whatever a column holds
    is_list = pa.types.is_list(value.type) or pa.types.is_large_list(value.type)
    if not is_list or not value.is_valid or not pa.types.is_integer(value.type.value_type) or value.values.null_count:
        return value.as_py()
    return value.values.to_numpy(zero_copy_only=False)


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_json_value)


def _dumps(value: object) -> bool:
    try:
        _dump(value)
    except TypeError:
        return False
    return True


def _json_value(value: object) -> str:
    if isinstance(value, date | datetime | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    raise TypeError(f"{type(value).__name__}")


def _without_nonfinite(value: Any) -> Any:  # noqa: ANN401, any JSON value
    if isinstance(value, dict):
        return {key: _without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nonfinite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
