"""Writing a safetensors file tensor by tensor, so that no more than one of them is in memory.

The library's `save_file` takes all tensors of a file at once. The layout written here is the one it writes: header
length, header padded to 8 bytes, then the tensors, widest dtype first, so that each lies on a multiple of its width.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vhead.checkpoints.tensor_files import SAFETENSORS_DTYPES, TensorInfo
from vhead.errors import HeadFileError

_ALIGNMENT = 8


@dataclass(frozen=True)
class Entry:
    """A tensor to write.

    Attributes:
        name: Its name in the file.
        info: Its shape and dtype.
        read: A function that reads it.
    """

    name: str
    info: TensorInfo
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return prod(self.info.shape) * self.width

    @property
    def width(self) -> int:
        """Bytes of one element.

        Raises:
            HeadFileError: The tensor is not plain numbers of a dtype that safetensors has.
        """
        if self.info.dtype not in SAFETENSORS_DTYPES:
            raise HeadFileError(f"{self.name}: expected a dtype that safetensors has, got {self.info.dtype}")
        dtype: torch.dtype = getattr(torch, self.info.dtype.removeprefix("torch."))
        return dtype.itemsize

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> "Entry":
        """The entry for a tensor that is in memory already."""
        return cls(name, TensorInfo(tuple(tensor.shape), str(tensor.dtype)), lambda: tensor)


def write_safetensors(entries: Sequence[Entry], path: Path) -> None:
    """Writes a file; each tensor is read when its turn comes and let go again."""
    ordered = sorted(entries, key=lambda entry: (-entry.width, entry.name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in ordered:
        header[entry.name] = {
            "dtype": SAFETENSORS_DTYPES[entry.info.dtype],
            "shape": list(entry.info.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in ordered:
            file.write(_bytes_of(entry))


def _bytes_of(entry: Entry) -> Any:
    return entry.read().contiguous().reshape(-1).view(torch.uint8).numpy()
