"""Compiles the kernels for the CPU, into target/cuda-emulation by the hash of what goes in."""

import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[3]
KERNELS = ROOT / "rust" / "cuda" / "kernels"
HERE = Path(__file__).parent
BUILT = ROOT / "target" / "cuda-emulation"
COMPILER = ("g++", "-std=c++17", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
LIBRARY = ("-O1", "-fPIC", "-shared")
# A program of its own, since Python would have to be started with the sanitizers' libraries.
SANITIZED = ("-O0", "-DVHEAD_REPLAY", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
_KERNEL = re.compile(r'extern "C"\s+void\s+(\w+)\(')


class BuildError(Exception):
    """The compiler refused the sources."""


def read_sources() -> dict[str, str]:
    """The kernels' files by name."""
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(KERNELS.glob("*.cu*"))}


def build(
    sources: Mapping[str, str] | None = None,
    *,
    unit: str = "vhead.cu",
    options: tuple[str, ...] = LIBRARY,
    program: tuple[str, ...] = ("host.cpp",),
) -> Path:
    """What `options` make of `unit`, one of `sources` or of the kernels' own files, around it; the first of
    `program` is compiled, the others are included."""
    files = {**(sources or read_sources()), **{name: (HERE / name).read_text() for name in ("shim.hpp", *program)}}
    key = hashlib.sha256(repr((sorted(files.items()), unit, COMPILER, options)).encode()).hexdigest()[:20]
    built = BUILT / key
    if not built.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILT) as folder:
            for name, text in files.items():
                (Path(folder) / name).write_text(text, encoding="utf-8")
            _compile(Path(folder), unit, options, program[0])
            os.replace(Path(folder) / "built", built)
    return built


def _compile(folder: Path, unit: str, options: tuple[str, ...], program: str) -> None:
    preprocessed = _run(folder, *COMPILER, "-E", "-P", "-include", "shim.hpp", "-x", "c++", unit)
    kernels = [f"KERNEL({name})\n" for name in _KERNEL.findall(preprocessed)]
    (folder / "kernels.inc").write_text("".join(kernels), encoding="utf-8")
    _run(folder, *COMPILER, *options, f'-DUNIT="{unit}"', program, "-o", "built")


def _run(folder: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(done.stderr)
    return done.stdout
