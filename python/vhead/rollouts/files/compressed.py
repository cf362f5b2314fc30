"""Compressed files as streams of bytes, decompressed piece by piece."""

import gzip
import io
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from vhead.errors import FileFormatError

COMPRESSIONS = (".gz", ".zst")


class DecompressedFile(io.RawIOBase):
    """The bytes that a compressed file stands for; no more of them are held than are asked for.

    Args:
        path: A file whose name ends in `.gz` or `.zst`; several streams may follow each other in it.

    Attributes:
        name: What errors call it.

    Raises:
        OSError: The file cannot be opened.
        MissingExtraError: It is a `.zst`, and pyarrow, which decompresses it, is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._file = path.open("rb")
        try:
            self._stream = _decompressing(self._file, path.suffix.lower())
        except BaseException:
            self._file.close()
            raise

    @property
    def position(self) -> int:
        """How many of the file's own, compressed bytes have been read."""
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Reads some of the bytes, and gives their number, 0 at the end.

        Raises:
            FileFormatError: The file ends early, or does not hold what its name says.
        """
        try:
            data = self._stream.read(len(buffer))
        except (EOFError, zlib.error, ValueError) as error:
            raise self._broken(error) from None
        except OSError as error:
            if error.errno is not None:
                raise
            raise self._broken(error) from None
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._stream.close()
            self._file.close()

    def _broken(self, error: Exception) -> FileFormatError:
        return FileFormatError(f"{self.name}: the compressed file is broken: {error}")


def _decompressing(file: BinaryIO, suffix: str) -> Any:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=file, mode="rb")
    from vhead.rollouts.files.arrow import pa  # pyarrow only when used

    return pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")


def compressed(data: bytes, suffix: str) -> bytes:
    """Bytes as a whole stream of their own, which may follow others in a file.

    Raises:
        MissingExtraError: `suffix` is `.zst`, and pyarrow, which compresses it, is not installed.
    """
    if suffix == ".gz":
        return gzip.compress(data, mtime=0)
    from vhead.rollouts.files.arrow import pa  # pyarrow only when used

    stream: bytes = pa.Codec("zstd").compress(data, asbytes=True)
    return stream
