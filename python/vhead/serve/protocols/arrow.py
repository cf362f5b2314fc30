"""Bodies as streams of Arrow's IPC format."""

import importlib
import importlib.util
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vhead.errors import MissingExtraError, RequestError
from vhead.rollouts import Rollout
from vhead.rollouts.fields import INPUT_FIELDS
from vhead.scoring.fields import COLUMNS
from vhead.scoring.scores import TRUNCATED, Scores

MEDIA_TYPE = "application/vnd.apache.arrow.stream"
_DEEPEST = 8


def is_there() -> bool:
    """Whether pyarrow is installed."""
    return importlib.util.find_spec("pyarrow") is not None


def _arrow() -> Any:
    try:
        importlib.import_module("pyarrow.ipc")
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise MissingExtraError("pyarrow", "data") from error


def records(body: bytes, most: int) -> list[dict[str, Any]]:
    """The rows of a stream as records with the columns that files of rollouts have; the others are left out.

    Args:
        body: The stream, uncompressed.
        most: How many rows it may have.

    Raises:
        RequestError: It is no such stream, has more rows, or columns of types that no rollout has.
    """
    pa = _arrow()
    found: list[dict[str, Any]] = []
    try:
        for batch in _batches(pa, body):
            batch.validate(full=True)
            if len(found) + batch.num_rows > most:
                raise RequestError(f"expected at most {most} rollouts in a request, got more", 413)
            found += _rows(pa, batch)
    except (pa.ArrowException, OSError, ValueError, struct.error, IndexError) as error:
        if isinstance(error, RequestError):
            raise
        text = str(error).partition("\n")[0][:200]
        raise RequestError(f"the body: expected a stream of Arrow's IPC format: {text}") from None
    return found


def stream(scores: Scores, head: Mapping[str, Any]) -> bytes:
    """Scores as a stream; what describes the server is in the schema's metadata, as JSON under `vhead`.

    Columns of which each rollout has several entries are lists. Behind those of `Scores.to_arrow` come `prompt_length`
    and `mask`.
    """
    pa = _arrow()
    mask = pa.ListArray.from_arrays(pa.array(scores.offsets.astype(np.int32)), pa.array(scores.mask))
    table = scores.to_arrow().append_column("prompt_length", pa.array(scores.prompt_lengths))
    return _written(pa, table.append_column("mask", mask).replace_schema_metadata({"vhead": json.dumps(head)}))


def arrays(content: bytes) -> tuple[dict[str, NDArray[Any]], int | None]:
    """What `stream` wrote: the arrays of `Scores` by their names, the offsets among them, and the weights' step.

    Raises:
        ValueError: It is no such stream, or was cut off.
        OSError: It was cut off.
    """
    pa = _arrow()
    _messages(pa, content)
    table = pa.ipc.open_stream(content).read_all().combine_chunks()
    found = {"prompt_lengths": table.column("prompt_length").to_numpy()}
    found["mask"], found["offsets"] = _flat(pa, table.column("mask"))
    for name in table.column_names:
        if name in COLUMNS:
            found[name], offsets = _flat(pa, table.column(name))
            if COLUMNS[name].unit == "step":
                found["step_offsets"] = offsets
        elif name == TRUNCATED:
            found[name] = table.column(name).to_numpy()
    return found, json.loads(table.schema.metadata[b"vhead"])["step"]


def _flat(pa: Any, column: Any) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The entries of all rows, and where each row's are."""
    whole = column.combine_chunks()
    if isinstance(whole, pa.ChunkedArray):
        whole = whole.chunk(0) if whole.num_chunks else pa.array([], whole.type)
    offsets, widths = np.zeros(0, np.int64), []
    if pa.types.is_list(whole.type):
        offsets, whole = whole.offsets.to_numpy().astype(np.int64), whole.values
    while pa.types.is_fixed_size_list(whole.type):
        widths.append(whole.type.list_size)
        whole = whole.values
    return whole.to_numpy(zero_copy_only=False).reshape(-1, *widths), offsets


def stream_of_rollouts(rollouts: Sequence[Rollout]) -> bytes:
    """Rollouts, all of token ids or all of text, as a stream; their ids stay with whoever sends them."""
    pa = _arrow()
    if rollouts[0].kind != "token ids":
        texts = {name: [getattr(rollout, name) for rollout in rollouts] for name in ("prompt", "completion")}
        return _written(pa, pa.table(texts))
    columns = {
        "prompt_ids": [rollout.prompt for rollout in rollouts],
        "completion_ids": [rollout.completion for rollout in rollouts],
        "completion_mask": [rollout.mask for rollout in rollouts],
        "candidates": [None if one.candidates is None else list(one.candidates) for one in rollouts],
    }
    given = {name: column for name, column in columns.items() if any(each is not None for each in column)}
    return _written(pa, pa.table(given))


def _written(pa: Any, table: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _check_schema(pa: Any, schema: Any) -> None:
    if len(set(schema.names)) != len(schema.names):
        raise RequestError("the body: expected each column's name once")
    for column in schema:
        if column.name in INPUT_FIELDS and not _is_taken(pa, column.type):
            raise RequestError(f"{column.name}: expected text, numbers, booleans, or lists of them, got {column.type}")


def _is_taken(pa: Any, of: Any, depth: int = 0) -> bool:
    """Whether a type's values have no more entries than bytes: dictionaries and views may name one many times."""
    kinds = pa.types
    if depth > _DEEPEST:
        return False
    if kinds.is_struct(of):
        return of.num_fields > 0 and all(_is_taken(pa, of.field(at).type, depth + 1) for at in range(of.num_fields))
    if kinds.is_list(of) or kinds.is_large_list(of) or kinds.is_fixed_size_list(of):
        return bool(_is_taken(pa, of.value_type, depth + 1)) and getattr(of, "list_size", 1) > 0
    plain = (kinds.is_integer, kinds.is_floating, kinds.is_boolean, kinds.is_string, kinds.is_large_string)
    return any(is_kind(of) for is_kind in plain) or (kinds.is_null(of) and depth == 0)


def _rows(pa: Any, batch: Any) -> list[dict[str, Any]]:
    columns = {name: _values(pa, batch.column(name)) for name in batch.schema.names if name in INPUT_FIELDS}
    return [
        {name: column[at] for name, column in columns.items() if column[at] is not None} for at in range(batch.num_rows)
    ]


def _values(pa: Any, column: Any) -> list[Any]:
    """The values of a column; lists of integers as arrays, without a Python object for each."""
    is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    if not is_list or not pa.types.is_integer(column.type.value_type) or column.values.null_count:
        values: list[Any] = column.to_pylist()
        return values
    flat = column.values.to_numpy(zero_copy_only=False)
    offsets = column.offsets.to_numpy()
    valid = column.is_valid().to_pylist()
    return [flat[offsets[at] : offsets[at + 1]] if valid[at] else None for at in range(len(column))]


def _batches(pa: Any, body: bytes) -> Iterator[Any]:
    """The record batches of a stream, each checked before it is read."""
    schema = None
    messages = _messages(pa, body)
    if any(message.type == "dictionary" for message in messages):
        raise RequestError("the body: expected columns without dictionaries")
    for message in messages:
        if message.type == "schema":
            schema = pa.ipc.read_schema(message)
            _check_schema(pa, schema)
        elif message.type == "record batch" and schema is not None:
            _check_uncompressed(message)
            yield pa.ipc.read_record_batch(message, schema)
    if schema is None:
        raise RequestError("the body: expected a stream of Arrow's IPC format: it has no schema")


def _messages(pa: Any, content: bytes) -> list[Any]:
    """The messages of a stream. Pyarrow takes any end between two messages for the stream's; here, it has to be marked.

    Raises:
        ValueError: The stream was cut off.
    """
    source = pa.BufferReader(content)
    reader = pa.ipc.MessageReader.open_stream(source)
    messages, end = [], 0
    with suppress(StopIteration):
        while True:
            messages.append(reader.read_next_message())
            end = source.tell()
    if source.tell() == end:
        raise ValueError("it was cut off, as it has no marker at its end")
    return messages


def _check_uncompressed(message: Any) -> None:
    """Refuses compressed buffers, whose size in memory has no bound, before pyarrow reads any.

    Pyarrow does not tell, so that this looks into the metadata of the message: a table of flatbuffers, whose third
    field is the record batch. The fourth field of that one says how it is compressed.
    """
    metadata = message.metadata.to_pybytes()
    place = _field(metadata, struct.unpack_from("<I", metadata)[0], 2)
    if place is not None:
        batch = place + struct.unpack_from("<I", metadata, place)[0]
        if _field(metadata, batch, 3) is not None:
            raise RequestError("the body: expected an uncompressed stream of Arrow's IPC format", 415)


def _field(data: bytes, table: int, slot: int) -> int | None:
    """Where a field of a table of flatbuffers is; None where it has none."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    at = 4 + 2 * slot
    if at >= struct.unpack_from("<H", data, vtable)[0]:
        return None
    offset = struct.unpack_from("<H", data, vtable + at)[0]
    return table + offset if offset else None
