"""The PTX that the kernels' sources give: the stored image where it is current, else compiled now."""

import hashlib
import importlib.util
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

from tests.cuda.emulation.ptx import Module

ROOT = Path(__file__).parents[3]
ARCHITECTURE = "compute_80"
# Compiled now and kept for the next run.
_COMPILED = ROOT / "target" / "cuda-images"


@cache
def tool(name: str) -> ModuleType:
    """A module of `tools`."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _needs(tool: ModuleType) -> pytest.MarkDecorator:
    """Leaves tests out where another release is installed, such as the compiler that an older torch pins."""
    found = [installed.version for installed in metadata.distributions(name=tool.PACKAGE)]
    reason = f"needs {tool.PACKAGE}=={tool.VERSION}, of the extra `cuda`, which `dev` holds"
    return pytest.mark.skipif(tool.VERSION not in found, reason=reason)


needs_compiler = _needs(tool("cuda_images"))
needs_disassembler = _needs(tool("cuda_sass"))


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
