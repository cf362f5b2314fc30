"""The compiled extension: kernels on torch's tensors. Only `vhead.ops`, `vhead.candle` and `vhead.env` import it."""

from collections.abc import Sequence
from os import PathLike
from typing import Protocol, final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "CandleValueHead",
    "CudaLogitGradients",
    "CudaLogitStatistics",
    "LogitGradients",
    "LogitStatistics",
    "available_cores",
    "backends",
    "build_info",
    "configure",
    "cuda_absence",
    "cuda_value_head",
    "cuda_value_head_backward",
    "dropout_mask",
    "init_linear",
    "init_normal",
    "keep_kept",
    "linear",
    "panic_on_purpose",
    "try_value_head",
    "value_head",
    "value_head_backward",
    "value_head_two_layer",
    "worker_threads",
]

def value_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, dropout_p: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    """The kernel of `vhead::value_head`: `[..., H]` -> `[...]`, or `[..., K]` for `K` > 1, float32.

    Raises:
        TypeError: An argument is no tensor with data of its own, or its dtype is not float32, bfloat16 or float16.
        ValueError: Shapes do not fit, a tensor is not a dense one on the CPU, or `dropout_p` lies outside [0, 1).
        KernelPanicError: A kernel failed inside.
    """

def try_value_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, grad_enabled: bool) -> Tensor | None:
    """`value_head` where every argument is a plain tensor that fits and needs no gradient; None otherwise.

    None as well on a CUDA device whose kernels have not been loaded yet.
    """

def value_head_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, dropout_p: float, seed: Tensor | None, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients for (hidden, weight, bias), each where needed: hidden's in its dtype, the others float32."""

def cuda_absence(ordinal: int) -> str | None:
    """Why a CUDA device has no kernels of this package; None where it has, and they are loaded then.

    Raises:
        ValueError: There is no such device.
        CudaError: Loading failed and may succeed later, or the process was forked after CUDA had started.
    """

def cuda_value_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, dropout_p: float = 0.0, seed: Tensor | int | None = None
) -> Tensor:
    """`value_head` on a CUDA device, on torch's current stream. A seed on that device is read there, by the kernel.

    Raises:
        TypeError: As `value_head`.
        ValueError: As `value_head`, and for tensors that are not on one CUDA device.
        CudaError: The driver or the device refuses, or there are no kernels for it.
    """

def cuda_value_head_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, dropout_p: float, seed: Tensor | int | None, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`value_head_backward` on a CUDA device."""

def value_head_two_layer(
    hidden: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The kernel of `vhead::value_head_two_layer`: `[..., H]` -> `[...]`, or `[..., K]` for `K` > 1, float32."""

def linear(x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, relu: bool, out: Tensor) -> None:
    """Writes `scale * (x @ weight.T) + bias` or its ReLU to `out`, contiguous float32, in the value head's order."""

def keep_kept(x: Tensor, dropout_p: float, seed: Tensor | None, first: int) -> Tensor:
    """`x` as float32, the elements that dropout drops times zero; its rows are number `first` on of the mask."""

def init_linear(sizes: Sequence[int], columns: int, parameter: str, seed: int) -> Tensor:
    """New float32 numbers from `nn.Linear(columns, _)`'s default distribution; `parameter` is "weight" or "bias"."""

def init_normal(sizes: Sequence[int], std: float, parameter: str, seed: int) -> Tensor:
    """New float32 numbers from N(0, `std`); `parameter` is "weight" or "bias"."""

def dropout_mask(rows: int, columns: int, dropout_p: float, seed: int) -> bytes:
    """The mask of `[rows, columns]` elements, row-major, one byte each: 1 is kept."""

def configure(
    *, libtorch_cpu: str | None = None, num_threads: int | None = None, read_attributes: bool = False
) -> None:
    """Says where libtorch_cpu lies (to use its threads), how many threads to use, and how to read tensors."""

def backends() -> list[dict[str, object]]:
    """One dictionary for each device that has native kernels."""

def build_info() -> dict[str, str]:
    """Version, profile and target of this binary."""

def available_cores() -> int:
    """The cores that this process may use: what affinity and the quota of its control group leave, at least 1."""

def worker_threads(tasks: int) -> list[int]:
    """Runs short naps as a kernel's pieces are run; the system's ids of the threads that ran them."""

def panic_on_purpose(tasks: int) -> None:
    """Fails inside a piece of work, for tests of what a caller sees then."""

@final
class LogitStatistics:
    """Statistics of `[N]` targets, a tile of products at a time."""

    def __new__(
        cls,
        targets: Tensor,
        vocabulary: int,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
        temperature: float,
    ) -> LogitStatistics: ...
    def fold(self, products: Tensor, row: int, column: int) -> None: ...
    def finish(self) -> list[Tensor]: ...

@final
class LogitGradients:
    """Gradients of log-probabilities and entropies by the products, a tile at a time."""

    def __new__(
        cls,
        targets: Tensor,
        vocabulary: int,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
        temperature: float,
        statistics: Sequence[Tensor],
        gradients: Sequence[Tensor],
    ) -> LogitGradients: ...
    def differentiate(self, products: Tensor, row: int, column: int) -> None: ...

@final
class CudaLogitStatistics:
    """`LogitStatistics` on a CUDA device, on torch's current stream. Targets are not checked, since that would wait.

    Raises:
        TypeError: As `LogitStatistics`.
        ValueError: Sizes do not fit, or tensors are not on one CUDA device.
        CudaError: The driver or the device refuses, or there are no kernels for it.
    """

    def __new__(
        cls,
        targets: Tensor,
        vocabulary: int,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
        temperature: float,
    ) -> CudaLogitStatistics: ...
    def fold(self, products: Tensor, row: int, column: int) -> None: ...
    def finish(self) -> list[Tensor]: ...

@final
class CudaLogitGradients:
    """`LogitGradients` on a CUDA device; the gradients go to `out`, which may be the products."""

    def __new__(
        cls,
        targets: Tensor,
        vocabulary: int,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
        temperature: float,
        statistics: Sequence[Tensor],
        gradients: Sequence[Tensor],
    ) -> CudaLogitGradients: ...
    def differentiate(self, products: Tensor, row: int, column: int, out: Tensor) -> None: ...

class _SupportsDLPack(Protocol):
    def __dlpack__(self) -> object: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

@final
class CandleValueHead:
    def __new__(
        cls,
        weight: _SupportsDLPack,
        bias: _SupportsDLPack | None = None,
        device: str = "cpu",
        num_threads: int | None = None,
    ) -> CandleValueHead: ...
    @classmethod
    def load(
        cls, path: str | PathLike[str], device: str = "cpu", *, num_threads: int | None = None
    ) -> CandleValueHead: ...
    def save(self, path: str | PathLike[str]) -> None: ...
    def __call__(self, hidden: _SupportsDLPack) -> NDArray[np.float32]: ...
    def __reduce__(self) -> tuple[type[CandleValueHead], tuple[object, ...]]: ...
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def device(self) -> str: ...
    @property
    def weight(self) -> NDArray[np.float32]: ...
    @property
    def bias(self) -> NDArray[np.float32] | None: ...
