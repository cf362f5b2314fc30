"""Python processes that find the emulated driver, a libcuda.so.1 whose device memory is the process's own."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

from tests.cuda.emulation import build

EMULATED = Path(__file__).parent.parent / "emulated"
_OPTIONS = (*build.LIBRARY, "-Wl,-soname,libcuda.so.1")


@cache
def folder() -> Path:
    """Where the library lies, under the name that programs look for."""
    library = build.build(options=_OPTIONS, program=("mock_driver.cpp", "mock_kernels.hpp"))
    place = library.with_name(f"{library.name}-driver")
    place.mkdir(exist_ok=True)
    link = place / "libcuda.so.1"
    if not link.exists():
        beside = place / f".{os.getpid()}"
        beside.symlink_to(library)
        beside.replace(link)
    return place


def environment(**variables: str) -> dict[str, str]:
    """An environment in which the driver is found."""
    others = os.environ.get("LD_LIBRARY_PATH")
    paths = [str(folder()), *([others] if others else [])]
    return {**os.environ, "LD_LIBRARY_PATH": ":".join(paths), **variables}


def python(code: str, **variables: str) -> str:
    """What code prints in a new interpreter that finds the driver."""
    return _run([sys.executable, "-c", code], environment(**variables))


def pytest(*files: str, **variables: str) -> str:
    """The summary of the files' tests in a new interpreter that finds the driver."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *(str(EMULATED / file) for file in files),
    ]
    return _run(command, environment(**variables)).splitlines()[-1]


def _run(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return done.stdout.strip()
