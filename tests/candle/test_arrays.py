"""What hidden states may be: numpy arrays and DLPack tensors of any strides, and what is refused."""

import ctypes
import sys

import numpy as np
import pytest
import torch

from tests.library_versions import NUMPY_VERSIONS_DLPACK, TORCH_VERSIONS_DLPACK
from vhead.candle import CandleValueHead

from .conftest import bits, make_head, random_floats

COLUMNS = 96


def layouts(dtype: str = "float32") -> dict[str, np.ndarray]:
    whole = random_floats(6, 5, 2 * COLUMNS).astype(dtype)
    packed = np.zeros((6, 5, COLUMNS), dtype=[("mark", "i1"), ("hidden", dtype)])
    packed["hidden"] = whole[..., :COLUMNS]
    shifted = np.frombuffer(b"?" + whole.tobytes(), np.uint8)[1:].view(dtype).reshape(whole.shape)
    assert not shifted.flags.aligned
    return {
        "contiguous": np.ascontiguousarray(whole[..., :COLUMNS]),
        "offset": whole[1:, 2:, COLUMNS:],
        "outer swapped": whole[..., :COLUMNS].swapaxes(0, 1),
        "outer reversed": whole[::-1, ::-2, :COLUMNS],
        "outer repeated": np.broadcast_to(whole[0, 0, :COLUMNS], (6, 5, COLUMNS)),
        "fortran": np.asfortranarray(whole[..., :COLUMNS]),
        "last strided": whole[..., ::2],
        "last reversed": whole[..., COLUMNS - 1 :: -1],
        "misaligned": shifted[..., :COLUMNS],
        "packed records": packed["hidden"],
        "one row": whole[0, 0, :COLUMNS],
        "no rows": whole[:, :0, :COLUMNS],
        "no rows at all": whole[:0, :, :COLUMNS],
    }


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("outputs", [1, 3])
def test_values_do_not_depend_on_the_layout(layout, dtype, outputs):
    head, hidden = make_head(outputs, COLUMNS), layouts(dtype)[layout]
    values = head(hidden)
    assert type(values) is np.ndarray
    assert values.shape == hidden.shape[:-1] + ((outputs,) if outputs > 1 else ())
    assert bits(values) == bits(head(hidden.copy(order="C")))


def test_the_comparison_of_layouts_can_fail():
    head, hidden = make_head(1, COLUMNS), layouts()
    assert bits(head(hidden["last reversed"])) != bits(head(hidden["contiguous"]))


def test_read_only_and_memory_mapped_arrays_are_read(tmp_path, head):
    hidden = random_floats(7, COLUMNS)
    expected = bits(head(hidden))
    hidden.tofile(tmp_path / "hidden")
    hidden.flags.writeable = False
    assert bits(head(hidden)) == expected
    assert bits(head(np.memmap(tmp_path / "hidden", np.float32, "r", shape=(7, COLUMNS)))) == expected


def test_the_result_is_new_and_writable_every_time(head):
    hidden = random_floats(2, COLUMNS)
    first, second = head(hidden), head(hidden)
    first[:] = 0
    assert bits(second) == bits(head(hidden))


class Legacy:
    """A library of before DLPack 1.0: no `max_version`, an unversioned capsule."""

    def __init__(self, array):
        self.array = array

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __dlpack__(self, stream=None):
        return self.array.__dlpack__()


class Versioned(Legacy):
    def __init__(self, array):
        if not (NUMPY_VERSIONS_DLPACK if isinstance(array, np.ndarray) else TORCH_VERSIONS_DLPACK):
            pytest.skip(f"this {type(array).__name__} exports unversioned capsules only")
        super().__init__(array)

    def __dlpack__(self, *, stream=None, max_version=None):
        assert max_version >= (1, 0)
        return self.array.__dlpack__(max_version=max_version)


@pytest.mark.parametrize("wrap", [Legacy, Versioned])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("view", ["whole", "outer swapped", "last strided", "no rows"])
def test_dlpack_tensors_are_read_where_they_lie(wrap, dtype, view, head):
    whole = torch.randn(4, 3, 2 * COLUMNS, dtype=dtype)
    tensor = {
        "whole": whole[..., :COLUMNS].contiguous(),
        "outer swapped": whole[1:, :, COLUMNS:].transpose(0, 1),
        "last strided": whole[..., ::2],
        "no rows": whole[:0, :, :COLUMNS],
    }[view]
    values = head(wrap(tensor))
    assert bits(values) == bits(head(tensor)) == bits(head(tensor.float().contiguous().numpy()))


@pytest.mark.parametrize("wrap", [Legacy, Versioned])
def test_an_exported_tensor_is_released(wrap, head):
    hidden = random_floats(3, COLUMNS)
    before = sys.getrefcount(hidden)
    for _ in range(5):
        head(wrap(hidden))
    assert sys.getrefcount(hidden) == before


def test_bfloat16_of_ml_dtypes_is_read(head):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    hidden = random_floats(4, COLUMNS).astype(ml_dtypes.bfloat16)
    assert bits(head(hidden)) == bits(head(hidden.astype(np.float32)))


@pytest.mark.parametrize(
    ("hidden", "error", "message"),
    [
        (np.zeros((2, 96)), TypeError, "hidden: expected float32 or bfloat16 or float16, got float64"),
        (np.zeros((2, 96), np.int64), TypeError, "float16, got int64"),
        (np.zeros((2, 96), np.complex64), TypeError, "float16, got complex64"),
        (np.zeros((2, 96), object), TypeError, "float16, got object"),
        (np.zeros((2, 96), ">f4"), TypeError, "float16, got float32 of the other byte order"),
        (torch.zeros(2, 96, dtype=torch.float64), TypeError, "float16, got float64"),
        (torch.zeros(2, 96, dtype=torch.int32), TypeError, "float16, got int32"),
        (torch.zeros(2, 96, dtype=torch.bool), TypeError, "float16, got bool"),
        # Torch before 2.10 raises a RuntimeError.
        (torch.zeros(2, 96, requires_grad=True), (BufferError, RuntimeError), "require gradient"),
        ([[0.0] * 96], TypeError, "hidden: expected a numpy array or a DLPack tensor, got list"),
        (None, TypeError, "got NoneType"),
        (np.float32(1), TypeError, "got float32"),
        (np.zeros((), np.float32), ValueError, "hidden: expected at least one dimension, got a scalar"),
        (torch.zeros(()), ValueError, "hidden: expected at least one dimension, got a scalar"),
        (np.zeros((2, 95), np.float32), ValueError, r"hidden: expected shape \[..., 96\], got \[2, 95\]"),
        (np.zeros((96, 0), np.float32), ValueError, r"hidden: expected shape \[..., 96\], got \[96, 0\]"),
        (np.zeros((96, 1), np.float32), ValueError, r"hidden: expected shape \[..., 96\], got \[96, 1\]"),
    ],
)
def test_what_is_refused_says_what_was_expected(head, hidden, error, message):
    with pytest.raises(error, match=message):
        head(hidden)


class OnCuda(Legacy):
    def __dlpack_device__(self):
        return 2, 3


class OnMetal(Legacy):
    def __dlpack_device__(self):
        return 8, 0


class Confused(Legacy):
    def __dlpack__(self, *, max_version=None):
        return "not a capsule"


class Broken(Legacy):
    def __dlpack__(self, *, max_version=None):
        raise RuntimeError("cannot export today")


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (OnCuda, ValueError, "hidden: expected an array on the CPU, got one on CUDA device 3: .* vhead.ops.value_head"),
        (OnMetal, ValueError, "hidden: expected an array on the CPU, got one on DLPack device 8"),
        (Confused, TypeError, "PyCapsule"),
        (Broken, RuntimeError, "cannot export today"),
    ],
)
def test_dlpack_tensors_that_cannot_be_read_are_errors(head, kind, error, message):
    with pytest.raises(error, match=message):
        head(kind(random_floats(2, COLUMNS)))


class DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_kind", ctypes.c_int32),
        ("device_index", ctypes.c_int32),
        ("dimensions", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("sizes", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class Edited(Legacy):
    """A library that writes what numpy never does into the fields of DLPack's C structure."""

    def __init__(self, array, edit):
        super().__init__(array)
        self.edit = edit

    def __dlpack__(self, stream=None):
        capsule = self.array.__dlpack__()
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        tensor = DLTensor.from_address(pointer(capsule, b"dltensor"))
        self.edit(tensor)
        return capsule


def with_fields(**fields):
    """An edit that sets fields; a list is what sizes or strides point at."""
    # numpy 1 leaves out the strides of a contiguous array.
    contiguous = (ctypes.c_int64 * 2)(COLUMNS, 1)

    def edit(tensor):
        for name, value in fields.items():
            if isinstance(value, list):
                if not getattr(tensor, name):
                    setattr(tensor, name, ctypes.cast(contiguous, ctypes.POINTER(ctypes.c_int64)))
                for place, number in enumerate(value):
                    getattr(tensor, name)[place] = number
            else:
                setattr(tensor, name, value)

    return edit


def test_the_byte_offset_of_a_dlpack_tensor_is_applied(head):
    hidden = random_floats(5, COLUMNS)
    edited = Edited(hidden, with_fields(byte_offset=2 * COLUMNS * 4, sizes=[3]))
    assert bits(head(edited)) == bits(head(hidden[2:]))


def test_a_dlpack_tensor_without_strides_is_contiguous(head):
    hidden = random_floats(4, 3, COLUMNS)
    assert bits(head(Edited(hidden, with_fields(strides=None)))) == bits(head(hidden))


def test_a_dlpack_tensor_that_is_not_aligned_is_read(head):
    memory = np.zeros(4 * 2 * COLUMNS + 1, np.uint8)
    hidden = random_floats(2, COLUMNS)
    memory[1:] = hidden.view(np.uint8).ravel()
    aligned = memory[: 4 * 2 * COLUMNS].view(np.float32).reshape(2, COLUMNS)
    assert bits(head(Edited(aligned, with_fields(byte_offset=1)))) == bits(head(hidden))


def test_a_dlpack_tensor_without_elements_may_point_nowhere(head):
    assert head(Edited(random_floats(4, COLUMNS), with_fields(data=None, sizes=[0]))).shape == (0,)


NOWHERE = r"hidden: expected an array in memory, got sizes \[.*\] with strides \[.*\] at address"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": None}, NOWHERE),
        ({"byte_offset": 2**63}, NOWHERE),
        ({"byte_offset": 2**64 - 4}, NOWHERE),
        ({"data": 4096, "strides": [-COLUMNS, 1]}, NOWHERE),
        ({"strides": [2**61, 1]}, NOWHERE),
        ({"strides": [-(2**63), 1]}, NOWHERE),
        ({"strides": [2**63 - 1, 2**63 - 1]}, NOWHERE),
        ({"sizes": [2**63 - 1], "strides": [0]}, NOWHERE),
        ({"sizes": [2**62]}, NOWHERE),
        ({"sizes": [-1]}, r"hidden: expected sizes that are not negative, got \[-1, 96\]"),
        ({"sizes": [4, -(2**63)]}, "hidden: expected sizes that are not negative"),
        ({"sizes": None}, "hidden: expected sizes and strides in memory, got some at 0x0 and"),
        ({"sizes": ctypes.cast(1, ctypes.POINTER(ctypes.c_int64))}, "hidden: expected sizes and strides in memory"),
        ({"strides": ctypes.cast(9, ctypes.POINTER(ctypes.c_int64))}, "hidden: expected sizes and strides in memory"),
        ({"dimensions": -1}, "hidden: expected 0 to 64 dimensions, got -1"),
        ({"dimensions": 65}, "hidden: expected 0 to 64 dimensions, got 65"),
        ({"dimensions": 2**31 - 1}, "hidden: expected 0 to 64 dimensions, got 2147483647"),
        ({"device_kind": 2}, "hidden: expected an array on the CPU, got one on CUDA device 0"),
    ],
)
def test_a_dlpack_tensor_that_cannot_be_in_memory_is_an_error(head, fields, message):
    with pytest.raises(ValueError, match=message):
        head(Edited(random_floats(4, COLUMNS), with_fields(**fields)))


@pytest.mark.parametrize("lanes", [0, 2])
def test_a_dlpack_tensor_of_vectors_is_an_error(head, lanes):
    with pytest.raises(TypeError, match=f"DLPack dtype 2 of 32 bits in {lanes} lanes"):
        head(Edited(random_floats(4, COLUMNS), with_fields(lanes=lanes)))


def test_a_capsule_that_was_consumed_before_is_an_error(head):
    tensor = torch.zeros(2, COLUMNS)
    capsule = tensor.__dlpack__()
    torch.utils.dlpack.from_dlpack(capsule)

    class Used(Legacy):
        def __dlpack__(self, *, max_version=None):
            return capsule

    with pytest.raises(ValueError, match="PyCapsule"):
        head(Used(tensor))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_hidden_states_are_not_copied(fresh_python):
    """128 MiB of hidden states raise the process's peak by less than a quarter of that."""
    code = """
import re, numpy
from pathlib import Path
from vhead.candle import CandleValueHead

def peak():
    # Not getrusage's maximum: a child inherits that from its parent.
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024

head = CandleValueHead(numpy.ones((1, 2048), numpy.float32))
hidden = numpy.ones(({rows}, {columns}), numpy.float32)[:, :{take}:{step}]
before = peak()
head(hidden)
print(peak() - before)
"""
    assert int(fresh_python(code.format(rows=16384, columns=2048, take=2048, step=1))) < 32
    # Negative control: a strided last dimension is copied.
    assert int(fresh_python(code.format(rows=16384, columns=4096, take=4096, step=2))) > 96


@pytest.mark.parametrize("columns", [1, 2, 8, 9])
def test_few_columns(columns):
    head, hidden = make_head(1, columns), random_floats(5, columns)
    exact = hidden.astype(np.float64) @ head.weight[0].astype(np.float64) + head.bias.astype(np.float64)
    np.testing.assert_allclose(head(hidden), exact, rtol=1e-5, atol=1e-6)
    assert bits(head(hidden)) == bits(CandleValueHead(head.weight[0], head.bias)(hidden))
