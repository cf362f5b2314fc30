"""Compiles and tests the crate vhead-candle with its feature `cuda`, without nvcc, a CUDA toolkit or a GPU.

candle-core/cuda is compiled with a stand-in for candle's own kernels (tests/candle_cuda/candle-kernels) and linked with
stand-ins for the CUDA libraries; the driver is the emulated one of tests/cuda. The head's op, allocation and copies
work on that, candle's own operations do not. Everything is in a workspace and a target folder of its own.

    python -m tools.candle_cuda_check             # lint and test
    python -m tools.candle_cuda_check --compile   # lint only: types, names, warnings
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from tests.cuda.emulation import driver

ROOT = Path(__file__).parent.parent
WORKSPACE = ROOT / "tests" / "candle_cuda"
TARGET = ROOT / "target" / "candle-cuda"
LIBRARIES = TARGET / "libraries"
EMPTY = ("cublas", "cublasLt", "curand", "nvrtc")


def main() -> None:
    """Runs cargo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="lint only")
    compiles_only = parser.parse_args().compile
    cargo("clippy", "--lib", "--tests", "--", "-D", "warnings")
    if not compiles_only:
        make_libraries()
        cargo("test", "--lib", "cuda::", flags=link_flags(), libraries=(LIBRARIES, driver.folder()))


def cargo(command: str, *words: str, flags: str = "", libraries: tuple[Path, ...] = ()) -> None:
    """Runs a command of cargo on the crate; ends this process where it fails."""
    where = ("--locked", "--quiet", "--manifest-path", WORKSPACE / "Cargo.toml", "--target-dir", TARGET)
    environment = os.environ | ({"RUSTFLAGS": flags} if flags else {})
    if libraries:
        environment["LD_LIBRARY_PATH"] = ":".join(map(str, libraries))
    line = ["cargo", command, *where, "--package", "vhead-candle", *words]
    done = subprocess.run(line, cwd=ROOT, env=environment, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def make_libraries() -> None:
    """What is linked in place of the driver and of the libraries that candle names."""
    LIBRARIES.mkdir(parents=True, exist_ok=True)
    for name in EMPTY:
        library = f"lib{name}.so"
        options = ("-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", LIBRARIES / library)
        subprocess.run(["gcc", *options, WORKSPACE / "libraries.c"], check=True)
    linked = LIBRARIES / "libcuda.so"
    linked.unlink(missing_ok=True)
    linked.symlink_to(driver.folder() / "libcuda.so.1")


def link_flags() -> str:
    """Symbols are looked for when they are called: most are never, and are nowhere."""
    lazily = "-C relro-level=partial -C link-arg=-Wl,--unresolved-symbols=ignore-all"
    return f"-L native={LIBRARIES} {lazily}"


if __name__ == "__main__":
    main()
