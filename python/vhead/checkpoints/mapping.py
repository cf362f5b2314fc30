"""Tensors that lie in a file's pages, which all processes of a machine share until one of them writes to its own."""

import json
import mmap
import os
from pathlib import Path

import torch
from torch import Tensor

from vhead.checkpoints.tensor_files import TORCH_DTYPES


def mapped_bytes(descriptor: int) -> Tensor:
    """The bytes of an open file, uint8 `[length]`, mapped: what is written to them stays in this process.

    The file must stay as it is. Removing it is no harm, nor is replacing it by another one of its name.
    """
    return torch.frombuffer(mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)


def mapped_tensor(file: Tensor, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor | None:
    """A tensor that begins at byte `start` of a mapped file; None where that is no multiple of its width."""
    count = torch.Size(shape).numel()
    if start % dtype.itemsize or start + count * dtype.itemsize > len(file):
        return None
    return file[start : start + count * dtype.itemsize].view(dtype).reshape(shape)


def mapped_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file that was checked before, mapped; those that can be."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        file = mapped_bytes(descriptor)
    finally:
        os.close(descriptor)
    data = 8 + int.from_bytes(bytes(file[:8].tolist()), "little")
    header = json.loads(bytes(file[8:data].tolist()))
    found: dict[str, Tensor] = {}
    for name, info in header.items():
        dtype = TORCH_DTYPES.get(info["dtype"]) if name != "__metadata__" else None
        if dtype is not None:
            tensor = mapped_tensor(file, data + info["data_offsets"][0], dtype, tuple(info["shape"]))
            found.update({} if tensor is None else {name: tensor})
    return found
