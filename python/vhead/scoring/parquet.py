"""Parquet in and out; the only module that needs pyarrow, which the extra `data` brings."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from decimal import Decimal
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from vhead.errors import FieldError, FileFormatError, MissingExtraError
from vhead.scoring.rollout import Rollout, shown
from vhead.scoring.rows import INPUT_FIELDS, Row, check_reserved, digest_of, rollout_of
from vhead.scoring.scores import Scores

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as error:
    raise MissingExtraError("pyarrow", "data") from error

_ROWS_AT_ONCE = 1024
# Of a column, where pyarrow would otherwise hold a whole row group, which may be the whole file.
_BYTES_AT_ONCE = 2**20
_ROW_GROUP_BYTES = 64 * 2**20


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

    def digest(self) -> str:
        """A short text that two different records do not have in common."""
        return digest_of(repr(self.columns()).encode())

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
    """The rows of a Parquet file, read in batches: memory depends neither on its size nor on that of its row groups.

    Raises:
        FileFormatError: The file is not Parquet, or has no columns that make a rollout.
        FieldError: A column has a name that the scores will take.
    """

    def __init__(self, path: Path, reserved: tuple[str, ...] = ()) -> None:
        try:
            self._file = pq.ParquetFile(path, buffer_size=_BYTES_AT_ONCE, pre_buffer=False)
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

    The first records decide the columns and their types. What Parquet needs to be readable comes at its end, so that
    the file grows as Arrow streams, one for each call of `write`, and becomes Parquet when it is complete.

    Args:
        stream: What is appended to.
        earlier: The file of an earlier run that is gone on with, whose first records decide.
    """

    def __init__(self, stream: BinaryIO, earlier: Path | None = None) -> None:
        self._stream = stream
        self._earlier = None if earlier is None else next(_grown_tables(earlier)).schema
        self._carried: Any = None

    def write(self, rows: Sequence[Row], scores: Scores) -> None:
        """Appends the records.

        Raises:
            FieldError: A record has a column, or a type in a column, that the first records did not have.
        """
        if not rows:
            return
        if self._earlier is not None and self._carried is None:
            self._carried = pa.schema([field for field in self._earlier if field.name not in scores.columns])
        table = self._table(rows)
        self._carried = table.schema
        table = _with_scores(table, scores)
        with pa.ipc.new_stream(self._stream, table.schema) as stream:
            stream.write_table(table)

    def publish(self, grown: Path, path: Path) -> None:
        """Writes the Parquet file from the streams, beside its place, and moves it there."""
        unfinished = path.with_name(f".{path.name}.unfinished")
        _write_parquet(_row_groups(_grown_tables(grown)), unfinished)
        unfinished.replace(path)
        grown.unlink()

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


def _grown_tables(path: Path) -> Iterator[pa.Table]:
    """The tables of a file of Arrow streams, one after the other."""
    size = path.stat().st_size
    with path.open("rb") as file:
        while file.tell() < size:
            with pa.ipc.open_stream(file) as stream:
                yield stream.read_all()


def _row_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Puts tables together until they are worth a row group."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(part.nbytes for part in waiting) >= _ROW_GROUP_BYTES:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def _write_parquet(tables: Iterator[pa.Table], path: Path) -> None:
    first = next(tables, pa.table({}))
    with path.open("wb") as file:
        with pq.ParquetWriter(file, first.schema) as writer:
            for table in chain([first], tables):
                writer.write_table(table)
        file.flush()
        os.fsync(file.fileno())


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
    for name in scores.columns:
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
