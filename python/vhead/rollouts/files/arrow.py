"""The one place that imports pyarrow, which the extra `data` brings."""

from vhead.errors import MissingExtraError

try:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
except ImportError as error:
    raise MissingExtraError("pyarrow", "data") from error

__all__ = ["pa", "pc", "pq"]
