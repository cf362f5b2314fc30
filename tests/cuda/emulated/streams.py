"""The stream is the one that torch sends its work to, by either way of reading tensors."""

import ctypes
import os

import torch

from tests.cuda.emulated import device

HANDLE = 0x77
asked: list[tuple[int, ...]] = []

if os.environ.get("VHEAD_TENSOR_VIEW") == "attributes" or not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):

    def raw_stream(device: int) -> int:
        asked.append((device,))
        return HANDLE

    torch._C._cuda_getCurrentRawStream = raw_stream
    EXPECTED = [(0,)]
else:
    # torch's table with another function for streams: what it is asked is the tensor's device, here a CPU's (1, 0).
    new_pointer = ctypes.pythonapi.PyCapsule_New
    new_pointer.restype, new_pointer.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    NAME, WORDS = b"dlpack_exchange_api", 7  # versions, the previous table, five functions

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p))
    def current_stream(kind: int, index: int, to) -> int:
        asked.append((kind, index))
        to[0] = HANDLE
        return 0

    original = get_pointer(torch.Tensor.__dlpack_c_exchange_api__, NAME)
    TABLE = (ctypes.c_void_p * WORDS).from_buffer_copy(ctypes.string_at(original, 8 * WORDS))
    TABLE[WORDS - 1] = ctypes.cast(current_stream, ctypes.c_void_p).value
    torch.Tensor.__dlpack_c_exchange_api__ = new_pointer(ctypes.addressof(TABLE), NAME, None)
    EXPECTED = [(1, 0)]


def test_every_launch_is_on_torch_s_stream(driver, head) -> None:
    hidden, weight, bias = head(5, 64)
    asked.clear()
    device.value_head(hidden, weight, bias)
    assert asked == EXPECTED
    device.value_head_backward(torch.randn(5), hidden, weight, 0.5, 3, [True] * 3)
    device.value_head_backward(torch.ones(0), hidden[:0], weight, 0.0, None, [True] * 3)
    lines = driver.launches()
    assert len(lines) == 6
    assert all(f"stream={HANDLE}" in line for line in lines)
