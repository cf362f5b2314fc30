"""Arrays as base64 of .npy files."""

import base64
import binascii
import io
from typing import Any

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

MEDIA_TYPE = "application/vnd.vhead.npy+json"
_LONGEST_HEADER = 1024


def encoded(array: NDArray[Any]) -> str:
    """An array as text."""
    file = io.BytesIO()
    npy_format.write_array(file, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return base64.b64encode(file.getbuffer()).decode("ascii")


def decoded(text: str) -> NDArray[Any]:
    """The array of a text: integers or booleans.

    Raises:
        ValueError: It is no base64 or no such file, or states more entries than it holds.
    """
    try:
        file = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("text that is not base64") from None
    reader = io.BytesIO(file)
    try:
        if npy_format.read_magic(reader) != (1, 0):
            raise ValueError("a file of another version than 1.0")
        shape, fortran, dtype = npy_format.read_array_header_1_0(reader, max_header_size=_LONGEST_HEADER)
    except Exception as error:  # Headers are literals of Python, and can be broken in as many ways.
        raise ValueError(f"a file that is not .npy: {str(error)[:100]}") from None
    if dtype.kind not in "iub":
        raise ValueError(f"an array of {dtype}")
    # Numpy takes True for a whole number, and then does not reshape to it.
    if any(isinstance(size, bool) for size in shape):
        raise ValueError(f"a file that states the shape {list(shape)}")
    # Python's whole numbers, as those of numpy would overflow.
    count = 1
    for size in shape:
        count *= size
    if min(shape, default=0) < 0 or count * dtype.itemsize != len(file) - reader.tell():
        raise ValueError(f"a file that does not hold the shape {list(shape)} that it states")
    flat = np.frombuffer(file, dtype, offset=reader.tell())
    return flat.reshape(shape, order="F" if fortran else "C").astype(dtype.newbyteorder("="), copy=False)
