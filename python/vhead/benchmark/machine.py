"""What a reader of figures needs to know about where they come from."""

import importlib.metadata
import os
import platform
from datetime import UTC, datetime
from pathlib import Path

import torch

from vhead.errors import BenchmarkError
from vhead.ops import backends

# Settings of the environment that change what is measured.
SETTINGS = ("OMP_", "MKL_", "KMP_", "MALLOC_", "VHEAD_", "CUDA_", "PYTORCH_")
PACKAGES = ("torch", "transformers", "trl", "numpy", "vhead")


def provenance(threads: int, rounds: int) -> dict[str, object]:
    """The machine and the versions; None for a package that is not installed."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_field("model name"),
        "cores": os.cpu_count(),
        "simd": sorted(f for f in _cpu_field("flags").split() if f.startswith(("avx", "amx", "fma", "f16c"))),
        "caches": _caches(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{name: installed_version(name) for name in PACKAGES},
        "torch_threads": threads,
        "rounds": rounds,
        "niceness": os.nice(0),
        "environment": {k: v for k, v in os.environ.items() if k.startswith(SETTINGS)},
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
    }


def installed_version(package: str) -> str | None:
    """The version of an installed package; None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def find_device(name: str | None) -> torch.device:
    """The device of this name; a CUDA device where there is one, for None.

    Raises:
        BenchmarkError: It is neither the CPU nor a CUDA device that torch finds here.
    """
    if name is None:
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BenchmarkError(f"device: expected cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise BenchmarkError(f"device: expected cpu, cuda or cuda:N, got {name!r}")
    count = _cuda_devices()
    index = device.index or 0
    if index >= count:
        raise BenchmarkError(f"device: expected cuda:0 to cuda:{count - 1}, got {name!r}")
    return torch.device("cuda", index)


def _cuda_devices() -> int:
    if torch.version.cuda is None:
        raise BenchmarkError(f"device: CUDA was asked for, and torch {torch.__version__} is built without it")
    if not torch.cuda.is_available():
        raise BenchmarkError(f"device: CUDA was asked for, and torch finds no device: {_why_not()}")
    return torch.cuda.device_count()


def _why_not() -> str:
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return "none is visible"


def device_facts(device: torch.device) -> dict[str, object]:
    """The device and what runs the head on it."""
    facts: dict[str, object] = {"device": str(device), "backend": _backend(device), "device_name": None}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device_name": properties.name,
            "device_memory": properties.total_memory,
            "device_multiprocessors": properties.multi_processor_count,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "torch_cuda": torch.version.cuda,
        }
    return facts


def _backend(device: torch.device) -> dict[str, object]:
    table = backends()
    return table.get(device.type, table["other devices"])


def why_not_native(device: torch.device) -> str | None:
    """Why plain torch runs there instead of the head's own kernels; None where they run."""
    backend = _backend(device)
    return None if backend["kernel"] == "native" else str(backend.get("reason", "there are no kernels for this device"))


def _cpu_field(name: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "unknown")


def _caches() -> dict[str, str]:
    caches = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")
    return {
        f"L{(c / 'level').read_text().strip()} {(c / 'type').read_text().strip()}": (c / "size").read_text().strip()
        for c in caches
    }
