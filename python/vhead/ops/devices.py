"""What runs on which device, and how this process was told to run it."""

from pathlib import Path

import torch
from torch import Tensor

from vhead import _native
from vhead.env import read_settings

SETTINGS = read_settings()
_native.configure(
    libtorch_cpu=str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"),
    num_threads=SETTINGS.num_threads,
    read_attributes=SETTINGS.tensor_view == "attributes",
)

# The key of torch's dispatcher for each type of device that the extension has kernels for.
DISPATCH_KEYS = _native.dispatch_keys()


def has_kernels(tensor: Tensor) -> bool:
    """Whether a tensor is on a device that has kernels of this package; they are loaded at the first question.

    Plain torch serves a device for which there is no kernel; `vhead.backends()` says so and why. Whatever else goes
    wrong is an error: nothing falls back in silence.

    Raises:
        CudaError: The kernels could not be loaded, or the process was forked after CUDA had started.
    """
    # Every call asks this, and nearly always of the CPU.
    if tensor.is_cpu:
        return True
    kind = tensor.device.type
    return kind in DISPATCH_KEYS and _native.kernel_absence(kind, tensor.get_device()) is None


def backends() -> dict[str, dict[str, object]]:
    """What runs where.

    This asks the CUDA driver, where there is one, for its devices: from then on, as with `torch.cuda.is_available()`, a
    forked child cannot use CUDA. It makes no context and loads no kernel.

    Returns:
        For each device type with kernels of this package (`"cpu"`, `"cuda"`), which ones and how they run, and where
        plain torch runs instead of them, the reason; under `"other devices"` what the rest use; under `"build"` what
        the extension is.
    """
    rows = _native.backends()
    table = {str(row.pop("device")): _chosen(row) for row in rows}
    return {**table, "other devices": {"kernel": "plain torch"}, "build": {**_native.build_info()}}


def _chosen(row: dict[str, object]) -> dict[str, object]:
    """A row of the table: which kernel runs, then the facts."""
    if SETTINGS.plain_torch:
        return {"kernel": "plain torch", "reason": "VHEAD_PLAIN_TORCH=1", **row}
    return {"kernel": "native" if row.pop("available", True) else "plain torch", **row}
