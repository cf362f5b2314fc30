"""The extension's functions on the emulated device: for the time of a call, CPU tensors are tensors of that device."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

from vhead import _native

P, R = ParamSpec("P"), TypeVar("R")

_DRIVER = ctypes.CDLL("libcuda.so.1")


@contextmanager
def memory() -> Iterator[None]:
    """In the calling thread, CPU tensors are on device 0."""
    before = _DRIVER.vhead_mock_takes_memory()
    _DRIVER.vhead_mock_take_memory(1)
    try:
        yield
    finally:
        _DRIVER.vhead_mock_take_memory(before)


def on_device(function: Callable[P, R]) -> Callable[P, R]:
    """`function` with CPU tensors on device 0."""

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        with memory():
            return function(*args, **kwargs)

    return called


value_head = on_device(_native.value_head)
value_head_backward = on_device(_native.value_head_backward)
try_value_head = on_device(_native.try_value_head)
LogitStatistics = on_device(_native.LogitStatistics)
LogitGradients = on_device(_native.LogitGradients)
