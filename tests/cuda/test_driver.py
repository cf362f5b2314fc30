"""What is said where there is no driver, no device or no way to it; and that the extension links nothing of CUDA's."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

import vhead
from tests.cuda.emulation import driver
from vhead import _native

WITHOUT_TORCH = "from vhead import _native; print(_native.kernel_absence('cuda', 0))"
needs_no_driver = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA driver on this machine")


def needed_libraries(library: Path) -> set[str]:
    """The libraries that the dynamic section names."""
    done = subprocess.run(["readelf", "--dynamic", "--wide", library], capture_output=True, text=True, check=True)
    return set(re.findall(r"\(NEEDED\).*\[(.*)\]", done.stdout))


def test_the_extension_links_nothing_of_cuda() -> None:
    needed = needed_libraries(Path(_native.__file__))
    assert {name.split(".so")[0] for name in needed} <= {
        "libc",
        "libm",
        "libgcc_s",
        "libpthread",
        "libdl",
        "ld-linux-x86-64",
    }


def test_needed_libraries_are_found() -> None:
    assert any("torch" in name for name in needed_libraries(Path(torch._C.__file__)))


@needs_no_driver
def test_no_driver() -> None:
    row = vhead.backends()["cuda"]
    assert (row["kernel"], row["reason"]) == ("plain torch", "no CUDA driver: libcuda.so.1 was not found")
    assert _native.kernel_absence("cuda", 0) == row["reason"]
    assert _native.value_head(torch.randn(3, 4), torch.randn(1, 4)).is_cpu


@needs_no_driver
def test_the_command_says_why(fresh_python) -> None:
    said = fresh_python("import sys; sys.argv = ['vhead', 'env']; from vhead.cli import main; main()")
    assert re.search(r"^backend cuda kernel +plain torch$", said, re.MULTILINE)
    assert re.search(r"^backend cuda reason +no CUDA driver: libcuda.so.1 was not found$", said, re.MULTILINE)


def test_looking_for_a_driver_takes_no_torch(fresh_python) -> None:
    assert fresh_python(f"{WITHOUT_TORCH}; import sys; print('torch' in sys.modules)").endswith("False")


def test_no_device() -> None:
    assert driver.python(WITHOUT_TORCH, VHEAD_MOCK_DEVICES="0") == "the CUDA driver sees no device"


def test_a_driver_that_does_not_start() -> None:
    said = driver.python(WITHOUT_TORCH, VHEAD_MOCK_FAIL="cuInit=803")
    assert said == "the CUDA driver does not start: cuInit: unknown code (803), no description"


def test_a_driver_that_was_started_before_a_fork_by_somebody_else() -> None:
    code = """
        import ctypes, os
        from vhead import _native
        from vhead.errors import CudaError
        assert ctypes.CDLL("libcuda.so.1").cuInit(0) == 0
        if os.fork() == 0:
            try:
                _native.kernel_absence("cuda", 0)
            except CudaError as error:
                print(error, flush=True)
            os._exit(0)
        os.wait()
    """
    assert "start worker processes with the 'spawn' method" in driver.python("if True:" + code)


def test_plain_torch_on_demand() -> None:
    code = "from vhead.ops import backends; row = backends()['cuda']; print(row['kernel'], '|', row['reason'])"
    assert driver.python(code, VHEAD_PLAIN_TORCH="1") == "plain torch | VHEAD_PLAIN_TORCH=1"


def test_the_emulated_driver_is_said_to_be_one() -> None:
    code = (
        "from vhead.ops import backends; row = backends()['cuda']; print(row['kernel'], row['driver'], row['devices'])"
    )
    said = driver.python(code, VHEAD_MOCK_DEVICES="2", VHEAD_MOCK_ARCH="8.9", VHEAD_MOCK_DRIVER="12040")
    expected = "emulated device, compute capability 8.9: native, image sm_80"
    assert said == f"native 12.4 (emulated) {{0: {expected!r}, 1: {expected!r}}}"
