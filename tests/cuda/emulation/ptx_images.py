"""The PTX that the kernels' sources give: the stored image where it is current, else compiled now."""

import hashlib
import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from emulation.ptx import Module

ROOT = Path(__file__).parents[3]
ARCHITECTURE = "compute_80"
# Compiled now and kept for the next run.
_COMPILED = ROOT / "target" / "cuda-images"


needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.cuda_nvrtc") is None,
    reason="the compiler comes with the extra `cuda`, which `dev` holds",
)


@cache
def tool(name: str) -> ModuleType:
    """A module of `tools`."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_current() -> bool:
    """Whether the stored images say that they were made from the sources as they are."""
    images = tool("cuda_images")
    sources = {name: images.digest(text) for name, text in images.read_sources().items()}
    try:
        known = images.read_manifest()
    except (OSError, ValueError):
        return False
    return (known["sources"], known["options"]) == (sources, list(images.OPTIONS))


def image(architecture: str) -> bytes:
    """An image of the sources as they are."""
    images = tool("cuda_images")
    return images.read_image(architecture) if is_current() else compiled(images.read_sources(), architecture)


def compiled(sources: Mapping[str, bytes], architecture: str) -> bytes:
    """An image of any sources."""
    images, key = tool("cuda_images"), hashlib.sha256(repr(sorted(sources.items())).encode()).hexdigest()[:20]
    kept = _COMPILED / f"{key}.{architecture}"
    if not kept.exists():
        data = images.Compiler().compile(sources, architecture)
        kept.parent.mkdir(parents=True, exist_ok=True)
        images.replace(kept, data)
    return kept.read_bytes()


def text() -> str:
    """The PTX of the sources as they are."""
    return image(ARCHITECTURE).decode()


@cache
def module() -> Module:
    """That PTX, ready to launch."""
    return Module(text())
