"""Writes scores to Parquet: records and scores are collected as Arrow streams, which become one file at the end."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, BinaryIO, Protocol, cast

from vhead.errors import FieldError, RecordError
from vhead.rollouts.fields import MASK
from vhead.rollouts.files.arrow import pa, pc, pq
from vhead.rollouts.files.parquet import ParquetRow
from vhead.rollouts.files.rows import Row
from vhead.scoring.files.output import OutputFile
from vhead.scoring.files.pairs import MARGIN, SUFFIXES, PairScores, sides_of
from vhead.scoring.files.part import Sink, new_file
from vhead.scoring.files.schema import Kind, Shape, shape_of, united
from vhead.scoring.scores import Scores
from vhead.scoring.views import nested

_ROW_GROUP_BYTES = 64 * 2**20
# Where a part of the file says what the columns of JSON records hold, once that is more than before.
_SHAPE = b"vhead.shape"

_MASKS = pa.list_(pa.bool_())

_SCALARS = {
    Kind.NOTHING: pa.null(),
    Kind.BOOLEAN: pa.bool_(),
    Kind.FLOAT: pa.float64(),
    Kind.TEXT: pa.string(),
}


class Columns(Protocol):
    """The input's columns on their way to the output."""

    def held(self, rows: Sequence[Row], *, skips: bool) -> tuple[pa.Table, dict[int, RecordError]]:
        """The rows as a table, and by its place in `rows` what is wrong with each that Parquet cannot hold."""

    def last(self, stored: Mapping[bytes, bytes]) -> None:
        """Takes up what an earlier run noted in the metadata of a part."""

    @property
    def schema(self) -> pa.Schema:
        """The columns of the whole file."""


class RecordColumns:
    """Columns of JSON records, whose types are those of all records together."""

    def __init__(self) -> None:
        self._shape = Shape(Kind.OBJECT, "")
        self._stored: Shape | None = None

    def held(self, rows: Sequence[Row], *, skips: bool) -> tuple[pa.Table, dict[int, RecordError]]:
        """The rows as a table of the types that are known so far, whose metadata hold them where they are new."""
        records, errors = self._fitting(rows, skips=skips)
        names = list(self._shape.members)
        columns = [
            pa.array([record.get(name) for record in records], arrow_type(self._shape.members[name])) for name in names
        ]
        table = pa.table(columns, names)
        if self._shape is not self._stored:
            self._stored = self._shape
            table = table.replace_schema_metadata({_SHAPE: json.dumps(self._shape.to_json()).encode()})
        return table, errors

    def last(self, stored: Mapping[bytes, bytes]) -> None:
        """Takes up the shape that an earlier run noted."""
        if _SHAPE in stored:
            self._shape = self._stored = Shape.from_json(json.loads(stored[_SHAPE]))

    @property
    def schema(self) -> pa.Schema:
        """Every column, as a type that Parquet has."""
        return pa.schema([(name, _stored_type(arrow_type(shape))) for name, shape in self._shape.members.items()])

    def _fitting(self, rows: Sequence[Row], *, skips: bool) -> tuple[list[dict[str, Any]], dict[int, RecordError]]:
        """The records that go into one file with those before them."""
        try:
            records = [row.columns() for row in rows]
            if united(self._shape, shape_of(records, "")) is self._shape:
                return records, {}
        except FieldError:
            pass  # One of them cannot be held: which one is found below.
        fitting: list[dict[str, Any]] = []
        errors: dict[int, RecordError] = {}
        for place, row in enumerate(rows):
            try:
                record = row.columns()
                self._shape = united(self._shape, shape_of([record], row.where))
                fitting.append(record)
            except FieldError as error:
                errors[place] = error
                if not skips:
                    break
        return fitting, errors


class TableColumns:
    """Columns of a Parquet file, which stay as they are.

    Args:
        schema: Their types.

    Raises:
        FieldError: Parquet cannot be written with one of them, although it was read.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self.schema = schema
        for column in schema:
            try:
                _try_out(pa.schema([column]).empty_table())
            except pa.ArrowException as error:
                expected = "a column of a type that can be written to Parquet"
                raise FieldError(None, column.name, expected=expected, got=str(error)) from None

    def held(self, rows: Sequence[Row], *, skips: bool) -> tuple[pa.Table, dict[int, RecordError]]:
        """The rows as Arrow holds them, without a Python object each."""
        errors: dict[int, RecordError] = {}
        table = self._table(rows)
        try:
            _try_out(table)
        except (pa.ArrowException, OSError):
            errors = self._errors(rows, skips=skips)
            stop = len(rows) if skips else min(errors, default=len(rows))
            table = self._table([row for place, row in enumerate(rows[:stop]) if place not in errors])
        return table, errors

    def last(self, stored: Mapping[bytes, bytes]) -> None:
        """Does nothing: about these columns, a part has no notes."""

    def _errors(self, rows: Sequence[Row], *, skips: bool) -> dict[int, RecordError]:
        errors: dict[int, RecordError] = {}
        for place, row in enumerate(rows):
            for name in self.schema.names:
                try:
                    _try_out(self._table([row]).select([name]))
                except (pa.ArrowException, OSError) as error:
                    got = f"one that cannot: {error}"
                    misfit = FieldError(row.where, name, expected="a value that Parquet can hold", got=got)
                    errors.setdefault(place, misfit)
            if errors and not skips:
                break
        return errors

    def _table(self, rows: Sequence[Row]) -> pa.Table:
        slices: list[tuple[pa.RecordBatch, int, int]] = []
        for row in rows:
            if not isinstance(row, ParquetRow):
                raise TypeError(f"rows: expected rows of a Parquet file, got a {type(row).__name__}")
            batch, start, stop = slices[-1] if slices else (None, 0, 0)
            if batch is row.batch and stop == row.at:
                slices[-1] = (batch, start, stop + 1)
            else:
                slices.append((row.batch, row.at, row.at + 1))
        return pa.Table.from_batches([batch.slice(start, stop - start) for batch, start, stop in slices], self.schema)


class ParquetOutput(OutputFile):
    """A Parquet file of scores; the arguments are those of `OutputFile`."""

    def _make_writer(self, schema: pa.Schema | None) -> "ParquetWriter":
        writer = ParquetWriter(self._part, self.suffix, schema)
        with self._part.read_back() as grown:
            writer.go_on(grown, self._part.tell())
        return writer

    def _complete(self, nothing: Scores | PairScores) -> None:
        """Writes the Parquet file beside its place and moves it there."""
        with new_file(self.path.with_name(f".{self.path.name}.unfinished")) as target, self._part.read_back() as grown:
            cast("ParquetWriter", self._writer).finish(grown, self._part.tell(), target, nothing)
            target.sync()
            self._note_published(target)
            target.path.replace(self.path)
        self.partial.unlink()


class ParquetWriter:
    """Writes the input's columns with the scores behind them; per-token scores are `list<float32>` columns.

    The columns' types are those of the whole file. They are known only at its end, as is what makes a Parquet file
    readable, so until then the file grows as Arrow streams, one for each call of `append`. Each record is checked
    against all before it when it is appended, so that nothing is found at the end that does not fit.

    Args:
        stream: What is appended to.
        suffix: Added to the names of the scores' columns.
        schema: The input's columns, where they are known beforehand, as those of a Parquet file are.

    Raises:
        FieldError: Parquet cannot be written with one of these columns.
    """

    def __init__(self, stream: Sink, suffix: str = "", schema: pa.Schema | None = None) -> None:
        self._stream = stream
        self._suffix = suffix
        # In the order in which they stand behind the scores.
        self._mask_names = [f"{MASK}{side}{suffix}" for side in ("", *SUFFIXES)]
        self._masks: set[str] = set()
        self._columns: Columns = RecordColumns() if schema is None else TableColumns(schema)

    def go_on(self, grown: BinaryIO, length: int) -> None:
        """Takes up what an earlier run appended.

        Args:
            grown: The file, at its beginning.
            length: How many bytes of it.
        """
        for batches in _streams(grown, length):
            self._columns.last(batches.schema.metadata or {})
            self._masks.update(set(self._mask_names) & set(batches.schema.names))
            for _ in batches:
                pass

    def held(self, rows: Sequence[Row], *, skips: bool) -> tuple[pa.Table, dict[int, RecordError]]:
        """The rows as a table, and by its place in `rows` what is wrong with each that Parquet cannot hold.

        Args:
            rows: The records.
            skips: Whether to continue after the first record that it cannot hold.
        """
        return self._columns.held(rows, skips=skips)

    def append(self, table: pa.Table, scores: Scores | PairScores) -> None:
        """Appends records with their scores."""
        table = self._with_scores(table, scores)
        with pa.ipc.new_stream(self._stream, table.schema) as stream:
            stream.write_table(table)

    def finish(self, grown: BinaryIO, length: int, target: Sink, nothing: Scores | PairScores) -> None:
        """Writes the Parquet file from the streams.

        Args:
            grown: The file of streams, at its beginning.
            length: Its bytes.
            target: The file to write.
            nothing: The scores of no rollouts, whose columns a file without records has.
        """
        carried = self._columns.schema
        tables = (self._with_masks(_of_types(table, carried), carried) for table in _grown_tables(grown, length))
        first = next(tables, None)
        if first is None:
            first = self._with_scores(carried.empty_table(), nothing)
        with pq.ParquetWriter(target, first.schema) as writer:
            for table in _row_groups(chain([first], tables)):
                writer.write_table(table)

    def _with_scores(self, table: pa.Table, scores: Scores | PairScores) -> pa.Table:
        sides = sides_of(scores)
        for suffix, side in sides.items():
            # Ids are among the columns as they came; as one column of their own they need not have one type.
            computed = replace(side, ids=(None,) * len(side)).to_arrow()
            for name in side.columns:
                table = table.append_column(f"{name}{suffix}{self._suffix}", computed.column(name))
        if isinstance(scores, PairScores) and scores.margin is not None:
            table = table.append_column(f"{MARGIN}{self._suffix}", nested(pa, scores.margin))
        for suffix, side in sides.items():
            mask = f"{MASK}{suffix}{self._suffix}"
            # Records that came with a mask keep it.
            if mask not in table.column_names and not side.mask.all():
                self._masks.add(mask)
                table = table.append_column(mask, _masks(side))
        return table

    def _with_masks(self, table: pa.Table, carried: pa.Schema) -> pa.Table:
        """The table with a column for each kind of masks that any part has, in one order."""
        masks = [name for name in self._mask_names if name in self._masks and name not in carried.names]
        for name in masks:
            if name not in table.column_names:
                table = table.append_column(name, pa.nulls(table.num_rows, _MASKS))
        return table.select([name for name in table.column_names if name not in masks] + masks) if masks else table


def _masks(scores: Scores) -> pa.Array:
    """Which tokens are the model's; null where it wrote them all."""
    masks = [None if score.mask.all() else score.mask for score in scores]
    return pa.array(masks, _MASKS)


def arrow_type(shape: Shape) -> pa.DataType:
    """The type of a column of this shape, so far."""
    if shape.kind is Kind.INTEGER:
        return pa.uint64() if shape.is_unsigned else pa.int64()
    if shape.items is not None:
        return pa.list_(arrow_type(shape.items))
    if shape.kind is Kind.OBJECT:
        return pa.struct([(name, arrow_type(member)) for name, member in shape.members.items()])
    return _SCALARS[shape.kind]


def _stored_type(of: pa.DataType) -> pa.DataType:
    """What stands in Parquet for a type; nothing but nulls, and objects without members, are text there."""
    if pa.types.is_list(of):
        return pa.list_(_stored_type(of.value_type))
    if pa.types.is_struct(of) and of.num_fields:
        return pa.struct([(column.name, _stored_type(column.type)) for column in of])
    return pa.string() if pa.types.is_null(of) or pa.types.is_struct(of) else of


def _of_types(table: pa.Table, carried: pa.Schema) -> pa.Table:
    """A part's columns as the whole file has them: the carried ones first, then the scores."""
    columns, fields = [], []
    for column in carried:
        at = table.schema.get_field_index(column.name)
        chunks = table.column(at).chunks if at >= 0 else [pa.nulls(table.num_rows)]
        columns.append(pa.chunked_array([_converted(chunk, column.type) for chunk in chunks], column.type))
        fields.append(column)
    for name in table.column_names:
        if name not in carried.names:
            columns.append(table.column(name))
            fields.append(table.schema.field(name))
    metadata = {key: value for key, value in (table.schema.metadata or {}).items() if key != _SHAPE}
    return pa.Table.from_arrays(columns, schema=pa.schema(fields, metadata))


def _converted(array: pa.Array, to: pa.DataType) -> pa.Array:
    """The same values as another type that can hold them."""
    if array.type == to:
        return array
    if pa.types.is_null(array.type):
        return pa.nulls(len(array), to)
    if pa.types.is_list(array.type):
        values = _converted(array.values, to.value_type)
        return pa.ListArray.from_arrays(array.offsets, values, to, mask=array.is_null())
    if pa.types.is_struct(array.type) and pa.types.is_struct(to):
        members = [
            _converted(array.field(column.name), column.type)
            if array.type.get_field_index(column.name) >= 0
            else pa.nulls(len(array), column.type)
            for column in to
        ]
        return pa.StructArray.from_arrays(members, fields=list(to), mask=array.is_null())
    if pa.types.is_struct(array.type):
        return pc.if_else(array.is_valid(), pa.scalar("{}"), pa.scalar(None, pa.string()))
    return array.cast(to)


def _try_out(table: pa.Table) -> None:
    """Writes Parquet to nowhere, as only that tells what cannot be written."""
    pq.write_table(table, pa.MockOutputStream())


def _streams(grown: BinaryIO, length: int) -> Iterator[pa.RecordBatchStreamReader]:
    while grown.tell() < length:
        with pa.ipc.open_stream(grown) as stream:
            yield stream


def _grown_tables(grown: BinaryIO, length: int) -> Iterator[pa.Table]:
    """The tables of a file of Arrow streams, one after the other."""
    for stream in _streams(grown, length):
        yield stream.read_all()


def _row_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Puts tables together until they are worth a row group."""
    waiting: list[pa.Table] = []
    size = 0
    for table in tables:
        waiting.append(table)
        size += table.nbytes
        if size >= _ROW_GROUP_BYTES:
            yield pa.concat_tables(waiting)
            waiting, size = [], 0
    if waiting:
        yield pa.concat_tables(waiting)
