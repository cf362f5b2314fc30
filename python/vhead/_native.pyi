"""The compiled extension: kernels on torch's tensors and on numpy's arrays.

Only `vhead.ops`, `vhead.candle`, `vhead.env`, `vhead.returns` and `vhead.sync` import it.

A function looks at the device of its first tensor (the hidden states or targets) and runs there; on a CUDA device the
work goes to torch's current stream.
"""

from collections.abc import Sequence
from os import PathLike
from typing import Protocol, final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "Attention",
    "CandleValueHead",
    "FeedForward",
    "LogitGradients",
    "LogitStatistics",
    "SyncPublisher",
    "SyncStage",
    "apply_dropout",
    "available_cores",
    "backends",
    "build_info",
    "configure",
    "dispatch_keys",
    "explained_variance",
    "gae",
    "has_matrix_unit",
    "init_linear",
    "init_normal",
    "kernel_absence",
    "linear",
    "panic_on_purpose",
    "processor",
    "rms_norm",
    "rotate",
    "sync_collect",
    "sync_export",
    "sync_list",
    "token_rewards",
    "try_value_head",
    "value_head",
    "value_head_backward",
    "value_head_two_layer",
    "whiten",
    "worker_threads",
]

def value_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, dropout_p: float = 0.0, seed: Tensor | int | None = None
) -> Tensor:
    """The kernel of `vhead::value_head`: `[..., H]` -> `[...]`, or `[..., K]` for `K` > 1, float32.

    A seed that is on the CUDA device of the hidden states is read there, by the kernel.

    Raises:
        TypeError: An argument is no tensor with data of its own, or its dtype is not float32, bfloat16 or float16.
        ValueError: Shapes do not fit, tensors are not dense ones on one device, or `dropout_p` lies outside [0, 1).
        KernelPanicError: A kernel failed inside.
        CudaError: The driver or the device refuses, or there are no kernels for it.
    """

def try_value_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, grad_enabled: bool) -> Tensor | None:
    """`value_head` where every argument is a plain tensor that fits and needs no gradient; None otherwise.

    None as well on a CUDA device whose kernels have not been loaded yet.
    """

def value_head_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, dropout_p: float, seed: Tensor | int | None, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients for (hidden, weight, bias), each where needed: hidden's in its dtype, the others float32."""

def dispatch_keys() -> dict[str, str]:
    """The key of torch's dispatcher for each type of device that has kernels here. This asks no driver."""

def kernel_absence(device: str, ordinal: int) -> str | None:
    """Why a device of the type `device` has no kernels of this package; None where it has, and they are loaded then.

    Raises:
        ValueError: There is no such device.
        CudaError: Loading failed and may succeed later, or the process was forked after CUDA had started.
    """

def value_head_two_layer(
    hidden: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
) -> Tensor:
    """The CPU's kernel of `vhead::value_head_two_layer`: `[..., H]` -> `[...]`, or `[..., K]` for `K` > 1, float32."""

def linear(x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, relu: bool, out: Tensor) -> None:
    """Writes `scale * (x @ weight.T) + bias` or its ReLU to `out`, contiguous float32, in the value head's order."""

def apply_dropout(x: Tensor, dropout_p: float, seed: Tensor | int | None, first: int) -> Tensor:
    """`x` as float32, the elements that dropout drops times zero; its rows are number `first` on of the mask."""

def init_linear(sizes: Sequence[int], columns: int, parameter: str, seed: int) -> Tensor:
    """New float32 numbers from `nn.Linear(columns, _)`'s default distribution; `parameter` is "weight" or "bias"."""

def init_normal(sizes: Sequence[int], std: float, parameter: str, seed: int) -> Tensor:
    """New float32 numbers from N(0, `std`); `parameter` is "weight" or "bias"."""

def gae(
    rewards: NDArray[np.float32],
    values: NDArray[np.float32] | None,
    mask: NDArray[np.uint8] | None,
    offsets: NDArray[np.int64],
    gamma: float,
    lam: Sequence[float],
    value_lam: Sequence[float] | None,
    bootstrap: NDArray[np.float32] | None,
    carry: bool,
    advantages: NDArray[np.float32],
    returns: NDArray[np.float32] | None,
    threads: int | None,
) -> None:
    """Writes advantages and returns; arrays are contiguous, and read in row-major order.

    Raises:
        ValueError: Lengths differ, offsets do not rise from 0, or a number that is read is not finite.
    """

def token_rewards(
    reward: NDArray[np.float32],
    mask: NDArray[np.uint8] | None,
    offsets: NDArray[np.int64],
    logprobs: tuple[NDArray[np.float32], NDArray[np.float32]] | None,
    kl_coef: float,
    kl: str,
    rewards: NDArray[np.float32],
    threads: int | None,
) -> None:
    """Writes the reward of each token.

    Raises:
        ValueError: As `gae`; a rollout has no model token.
    """

def whiten(
    x: NDArray[np.float32],
    mask: NDArray[np.uint8] | None,
    shift_mean: bool,
    unbiased: bool,
    everywhere: bool,
    whitened: NDArray[np.float32],
    threads: int | None,
) -> int:
    """Writes `x` with mean 0 and variance 1 over the places of `mask`, whose count is the result; nothing below 2."""

def explained_variance(
    values: NDArray[np.float32], returns: NDArray[np.float32], mask: NDArray[np.uint8] | None, threads: int | None
) -> float:
    """The share of the returns' variance that the values explain; NaN where they do not vary."""

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

def processor() -> tuple[str, list[str]]:
    """The processor's maker, empty where it does not say, and its vector instructions for half precisions."""

def worker_threads(tasks: int) -> list[int]:
    """Runs short naps as a kernel's pieces are run; the system's ids of the threads that ran them."""

def panic_on_purpose(tasks: int) -> None:
    """Fails inside a piece of work, for tests of what a caller sees then."""

def has_matrix_unit() -> bool:
    """Whether the CPU has a unit for bfloat16 products (Intel AMX), and the system lets this process use it."""

@final
class FeedForward:
    """Gated feed-forward layers by the matrix unit, with the memory that one after the other needs.

    Raises:
        TypeError: A tensor is not bfloat16.
        ValueError: Sizes do not fit.
        RuntimeError: There is no such unit, or another thread is using this object.
    """

    def __new__(cls) -> FeedForward: ...
    def apply(self, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor: ...

@final
class Attention:
    """Attention over one packed row by the matrix unit, with the memory that one layer after the other needs.

    Raises:
        TypeError: A tensor is not bfloat16, or one of rows is not int64.
        ValueError: Sizes do not fit.
        RuntimeError: There is no such unit, or another thread is using this object.
    """

    def __new__(cls, ends: Tensor, positions: Tensor) -> Attention: ...
    def apply(self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor: ...

def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + epsilon)` of `[..., H]`, in its dtype, which is the weight's as well."""

def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotary position embeddings of `x` `[..., heads * D]` in place, by `cos` and `sin` `[..., D]` of its dtype."""

@final
class LogitStatistics:
    """Statistics of `[N]` targets, a tile of products at a time.

    On a CUDA device targets are not checked, since that would wait; one that is no token gives NaN.

    Raises:
        TypeError: As `value_head`.
        ValueError: Sizes do not fit, tensors are not on one device, or, on the CPU, a target is no token.
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
        candidates: Tensor | None = None,
        top: int = 0,
    ) -> LogitStatistics: ...
    def fold(self, products: Tensor, row: int, column: int) -> None: ...
    def fold_products(self, hidden: Tensor, weight: Tensor, column: int) -> None: ...
    def finish(self) -> list[Tensor]: ...
    def finish_selected(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]: ...

@final
class LogitGradients:
    """Gradients of log-probabilities and entropies by the products, a tile at a time.

    They go to `out`, contiguous and in any of the three dtypes; over the products where that is None, as on the CPU.
    """

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
    def differentiate(self, products: Tensor, row: int, column: int, out: Tensor | None = None) -> None: ...
    def add_products(
        self,
        hidden: Tensor,
        weight: Tensor,
        column: int,
        grad_hidden: Tensor | None = None,
        grad_weight: Tensor | None = None,
    ) -> None: ...

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

_Described = tuple[str, str, list[int]]
_Summary = tuple[int, bool, int | None, list[str], str, str, int]

@final
class SyncPublisher:
    """Publishes weights: `begin`, then the bytes of each tensor in the order that it gives, then `finish`."""

    def __new__(
        cls, directory: PathLike[str], delta: bool, full_every: int, keep: int, staging: PathLike[str]
    ) -> SyncPublisher: ...
    @property
    def last_step(self) -> int | None: ...
    def begin(
        self, step: int, tensors: Sequence[tuple[str, str, Sequence[int], str]], parts: Sequence[str], metadata: str
    ) -> list[_Described]: ...
    def append(self, piece: NDArray[np.uint8]) -> None: ...
    def finish(self, attachments: Sequence[tuple[str, bytes]]) -> _Summary: ...
    def abandon(self) -> None: ...

@final
class SyncStage:
    """A publication on its way into a model: `verify_next` until `next` is None, then `install` or `copy`."""

    @staticmethod
    def open(
        directory: PathLike[str],
        step: int | None,
        have: tuple[int, str] | None,
        staging: PathLike[str],
        in_place: bool,
    ) -> SyncStage | None: ...
    @property
    def summary(self) -> _Summary: ...
    @property
    def tensors(self) -> list[_Described]: ...
    @property
    def digests(self) -> list[str]: ...
    @property
    def is_over_weights_in_use(self) -> bool: ...
    @property
    def next(self) -> int | None: ...
    def places(self) -> tuple[list[int], list[tuple[int, int]]] | None: ...
    def verify_next(self, in_use: NDArray[np.uint8] | None) -> None: ...
    def install(self, targets: Sequence[tuple[int, NDArray[np.uint8]]]) -> None: ...
    def copy(self, tensor: int, start: int, into: NDArray[np.uint8]) -> None: ...

def sync_list(directory: PathLike[str]) -> list[tuple[int, _Summary | None, str, bool]]: ...
def sync_collect(directory: PathLike[str], keep: int) -> tuple[list[int], list[str]]: ...
def sync_export(
    directory: PathLike[str],
    to: PathLike[str],
    step: int | None,
    checksum: str,
    full: bool,
    staging: PathLike[str],
) -> int: ...
