"""Sizes that no memory holds are an error of the package's own, and never the end of the process."""

import os
import struct

import numpy as np
import pytest
import torch

from vhead import _native
from vhead.candle import CandleValueHead
from vhead.errors import AllocationError, HeadFileError

from .conftest import bits, make_head, random_floats

# Terabytes of float32.
MANY = 2**42


def broadcast(*shape: int) -> np.ndarray:
    return np.broadcast_to(random_floats(1), shape)


def test_the_error_is_python_s_own_for_memory_too():
    assert issubclass(AllocationError, MemoryError)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_weight_that_is_broadcast_to_terabytes(dtype):
    with pytest.raises(AllocationError, match="cannot allocate 17592186044416 bytes"):
        CandleValueHead(np.broadcast_to(dtype(0.3), (1, MANY)))


def test_a_bias_that_is_broadcast_to_terabytes():
    with pytest.raises(AllocationError, match="cannot allocate"):
        CandleValueHead(random_floats(1, 8), broadcast(MANY))


def test_rows_that_are_broadcast_to_terabytes(head):
    with pytest.raises(AllocationError, match="Unable to allocate"):
        head(np.broadcast_to(random_floats(96), (MANY, 96)))


def test_a_strided_row_that_is_broadcast_to_terabytes():
    head = make_head(outputs=1, columns=4)
    with pytest.raises(AllocationError, match="allocate"):
        head(np.broadcast_to(random_floats(8)[::2], (MANY, 4)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_tensors_that_are_broadcast_to_terabytes(dtype):
    weight, nothing = torch.randn(1, 8, dtype=dtype).expand(MANY, 8), torch.randn(0, 8)
    row = torch.randn(1, 1, dtype=dtype).expand(1, MANY)
    calls = [
        lambda: _native.value_head(nothing, weight),
        lambda: _native.value_head_two_layer(nothing, weight, None, row, None),
        lambda: _native.linear(nothing, weight, None, 1.0, False, torch.empty(0, MANY)),
        lambda: _native.LogitStatistics(torch.zeros(1, dtype=torch.int64).expand(MANY), 5, None, 1.0, None, 1.0),
        lambda: _native.LogitStatistics(torch.zeros(1, dtype=torch.int64), MANY, row[0], 1.0, None, 1.0),
        lambda: _native.worker_threads(MANY),
    ]
    for call in calls:
        with pytest.raises(AllocationError, match="cannot allocate"):
            call()


def test_a_process_that_has_no_memory_left_is_told_so(fresh_python):
    """Every way through the head, where the head itself is there and the memory for one more like it is not."""
    code = """
import resource, numpy
from vhead.candle import CandleValueHead

head = CandleValueHead(numpy.random.default_rng(0).random((1, 30_000_000), numpy.float32))
whole, gaps = numpy.ones(30_000_000, numpy.float32), numpy.ones(60_000_000, numpy.float32)[::2]
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 50_000_000, -1))
for call in (
    lambda: head(whole), lambda: head(gaps), lambda: head.save("/tmp/never"), lambda: head.weight,
    lambda: CandleValueHead(whole),
):
    try:
        call()
        print("went through")
    except MemoryError as error:
        print(type(error).__name__)
"""
    assert fresh_python(code).split("\n") == ["AllocationError"] * 5


def sparse(path, tensors: dict[str, list[int]], size: int = 4) -> None:
    """A file of float32 tensors that are all zeros and take no room on the disk."""
    start, entries = 0, []
    for name, shape in tensors.items():
        end = start + int(np.prod(shape, dtype=object)) * size
        entries.append(f'"{name}":{{"dtype":"F32","shape":{shape},"data_offsets":[{start},{end}]}}')
        start = end
    header = f"{{{','.join(entries)}}}".encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + start)


def test_a_head_of_terabytes_in_a_sparse_file(tmp_path):
    sparse(tmp_path / "head.safetensors", {"weight": [1, 2**40]})
    with pytest.raises(AllocationError, match=r"head\.safetensors: cannot allocate 4398046511104 bytes"):
        CandleValueHead.load(tmp_path / "head.safetensors")


def test_a_head_beside_terabytes_is_all_that_is_read(tmp_path):
    sparse(tmp_path / "model.safetensors", {"weight": [1, 8], "model.embed": [2**20, 2**20]})
    head = CandleValueHead.load(tmp_path / "model.safetensors")
    assert bits(head.weight) == bits(np.zeros((1, 8), np.float32))


@pytest.mark.parametrize("length", [2**24 + 1, 83_000_000, 2**63, 2**64 - 1])
def test_a_header_that_is_longer_than_any_checkpoint_s(tmp_path, length):
    path = tmp_path / "head.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{")
    os.truncate(path, 100_000_000)
    with pytest.raises(HeadFileError, match=f"expected a header of at most 16777216 bytes, got {length}"):
        CandleValueHead.load(path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "head.safetensors")
    with pytest.raises(OSError, match="expected a regular file"):
        CandleValueHead.load(tmp_path / "head.safetensors")
