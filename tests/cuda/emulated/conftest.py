"""The emulated driver of this process, and random heads. `tests/cuda/test_*_operation.py` start these tests."""

import ctypes
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from vhead import _native, ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# Releases without DLPack's table ask for a stream by this name; without a GPU the real one fails.
torch._C._cuda_getCurrentRawStream = lambda _device: 0


def pytest_configure(config: pytest.Config) -> None:
    """torch notices the emulated driver as well, and that it is not one for it."""
    config.addinivalue_line("filterwarnings", "ignore:CUDA initialization:UserWarning")


class Driver:
    """What the emulated driver has seen."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")
        self.library.vhead_mock_log.restype = ctypes.c_char_p

    def launches(self) -> list[str]:
        """A line for each launch since the last question."""
        lines = self.library.vhead_mock_log().decode().splitlines()
        self.library.vhead_mock_clear_log()
        return lines

    def kernels(self) -> list[str]:
        """The kernels that were launched since the last question."""
        return [line.split()[0].removeprefix("vhead_") for line in self.launches()]


@pytest.fixture(scope="session")
def loaded_driver() -> Driver:
    assert ops.backends()["cuda"]["kernel"] == "native", "the emulated driver is not there"
    assert _native.kernel_absence("cuda", 0) is None  # loads the kernels
    return Driver()


@pytest.fixture(autouse=True)
def driver(loaded_driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    loaded_driver.launches()
    yield loaded_driver
    assert loaded_driver.library.vhead_mock_context_depth() == 0, "a context stays current"


@pytest.fixture
def head() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Random hidden states of `sizes`, a weight and a bias of `outputs`."""

    def make(*sizes: int, outputs: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        return torch.randn(sizes).to(dtype), torch.randn(outputs, sizes[-1]), torch.randn(outputs)

    return make


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal as bits, but that any NaN equals any other."""
    if a is None or b is None:
        return a is b
    kind = torch.int32 if a.dtype == torch.float32 else torch.int16
    same = (a.view(kind) == b.view(kind)) | (a.isnan() & b.isnan()) if a.numel() else torch.tensor(data=True)
    return a.dtype == b.dtype and a.shape == b.shape and bool(same.all())
