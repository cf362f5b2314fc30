"""What a driver or device that refuses looks like from Python, and that nothing is left behind."""

import ctypes
import itertools
import os
import pickle

import pytest
import torch

from tests.cuda.emulated import device
from vhead import _native
from vhead.errors import CudaError
from vhead.ops import backends

DEVICES = 16
_unused = itertools.count(1)


@pytest.fixture(autouse=True)
def many_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VHEAD_MOCK_DEVICES", str(DEVICES))


@pytest.fixture
def ordinal() -> int:
    """A device that this process has not asked for yet."""
    return next(_unused)


def forward() -> torch.Tensor:
    return device.value_head(torch.randn(3, 64), torch.randn(1, 64))


def test_a_failed_launch_names_the_kernel(monkeypatch, driver) -> None:
    monkeypatch.setenv("VHEAD_MOCK_FAIL", "cuLaunchKernel=719")
    expected = r"vhead_value_head_float32_vector was not launched: cuLaunchKernel: CUDA_ERROR_LAUNCH_FAILED \(719\)"
    with pytest.raises(CudaError, match=expected) as caught:
        forward()
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert driver.launches() == []
    monkeypatch.delenv("VHEAD_MOCK_FAIL")
    assert forward().shape == (3,)


def test_a_code_that_the_driver_cannot_name(monkeypatch) -> None:
    monkeypatch.setenv("VHEAD_MOCK_FAIL", "cuLaunchKernel=998")
    with pytest.raises(CudaError, match=r"unknown code \(998\)"):
        forward()


def test_no_memory_for_a_launch(monkeypatch) -> None:
    monkeypatch.setenv("VHEAD_MOCK_FAIL", "cuLaunchKernel=2")
    with pytest.raises(CudaError, match="out of device memory: cuLaunchKernel"):
        forward()


def test_a_context_that_cannot_be_made_current(monkeypatch) -> None:
    monkeypatch.setenv("VHEAD_MOCK_FAIL", "cuCtxPushCurrent=700")
    with pytest.raises(CudaError, match="cuCtxPushCurrent"):
        forward()


def test_clearing_gradients_can_fail(monkeypatch) -> None:
    monkeypatch.setenv("VHEAD_MOCK_FAIL", "cuMemsetD8Async=700")
    with pytest.raises(CudaError, match="cuMemsetD8Async"):
        device.value_head_backward(torch.ones(0), torch.ones(0, 4), torch.ones(1, 4), 0.0, None, [True] * 3)


def test_a_device_that_is_not_there() -> None:
    for ordinal in (DEVICES, 99, 4000, -1):
        with pytest.raises(ValueError, match=f"expected an ordinal below {DEVICES}, got {ordinal}"):
            _native.kernel_absence("cuda", ordinal)


@pytest.mark.parametrize(
    ("capability", "image"),
    [("8.0", "sm_80"), ("8.9", "sm_80"), ("10.3", "sm_100"), ("12.1", "sm_120"), ("11.0", "compute_80")],
)
def test_each_architecture_gets_an_image_that_runs_there(monkeypatch, ordinal, capability, image) -> None:
    monkeypatch.setenv("VHEAD_MOCK_ARCH", capability)
    assert _native.kernel_absence("cuda", ordinal) is None
    row = backends()["cuda"]["devices"][ordinal]
    assert row == f"emulated device, compute capability {capability}: native, image {image}, loaded"


def test_a_device_without_an_image_is_said_to_run_plain_torch(monkeypatch, ordinal) -> None:
    monkeypatch.setenv("VHEAD_MOCK_ARCH", "7.5")
    row = backends()["cuda"]
    assert row["kernel"] == "plain torch"
    assert row["devices"][ordinal].endswith("compute capability 7.5: plain torch, no kernel image for it")
    reason = _native.kernel_absence("cuda", ordinal)
    assert reason.startswith("no kernel image for emulated device of compute capability 7.5: there are sm_80,")
    monkeypatch.delenv("VHEAD_MOCK_ARCH")
    assert _native.kernel_absence("cuda", ordinal) == reason, "found once"


@pytest.mark.parametrize("code", [200, 209, 218, 222])
def test_an_image_that_the_driver_does_not_load_is_an_absence(monkeypatch, driver, ordinal, code) -> None:
    monkeypatch.setenv("VHEAD_MOCK_FAIL", f"cuModuleLoadData={code}")
    monkeypatch.setenv("VHEAD_MOCK_DRIVER", "11080")
    reason = _native.kernel_absence("cuda", ordinal)
    assert reason.startswith("the CUDA driver 11.8 does not load image sm_90: cuModuleLoadData: ")
    assert f"({code})" in reason
    assert driver.library.vhead_mock_held_contexts(ordinal) == 0
    monkeypatch.delenv("VHEAD_MOCK_FAIL")
    assert _native.kernel_absence("cuda", ordinal) == reason
    assert "plain torch, the CUDA driver 11.8" in backends()["cuda"]["devices"][ordinal]


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("cuModuleLoadData=2", "out of device memory: cuModuleLoadData"),
        ("cuDevicePrimaryCtxRetain=2", "out of device memory: cuDevicePrimaryCtxRetain"),
        ("cuModuleGetFunction=500", "vhead_value_head_float32_vector was not launched: cuModuleGetFunction"),
    ],
)
def test_what_may_pass_is_an_error_and_tried_again(monkeypatch, driver, ordinal, failure, message) -> None:
    modules = driver.library.vhead_mock_loaded_modules()
    monkeypatch.setenv("VHEAD_MOCK_FAIL", failure)
    with pytest.raises(CudaError, match=message):
        _native.kernel_absence("cuda", ordinal)
    assert driver.library.vhead_mock_held_contexts(ordinal) == 0
    assert driver.library.vhead_mock_loaded_modules() == modules
    monkeypatch.delenv("VHEAD_MOCK_FAIL")
    assert _native.kernel_absence("cuda", ordinal) is None
    assert driver.library.vhead_mock_held_contexts(ordinal) == 1
    assert driver.library.vhead_mock_loaded_modules() == modules + 1


def test_the_current_context_stays_what_it_was(driver, ordinal) -> None:
    mine, now = ctypes.c_void_p(), ctypes.c_void_p()
    assert driver.library.cuDevicePrimaryCtxRetain(ctypes.byref(mine), ordinal) == 0
    assert driver.library.cuCtxPushCurrent_v2(mine) == 0
    try:
        forward()
        assert "device=0 " in driver.launches()[0]
        assert driver.library.cuCtxGetCurrent(ctypes.byref(now)) == 0
        assert now.value == mine.value
    finally:
        driver.library.cuCtxPopCurrent_v2(ctypes.byref(now))


def test_a_forked_child_is_told(tmp_path) -> None:
    forward()
    said = tmp_path / "said"
    child = os.fork()
    if child == 0:
        try:
            forward()
        except CudaError as error:
            said.write_text(str(error))
        os._exit(0)
    os.waitpid(child, 0)
    assert said.read_text() == (
        "CUDA had started before this process was forked, and does not survive that: start worker processes with the "
        "'spawn' method"
    )


BAD = {
    "no tensor": (lambda h, w: (h.numpy(), w), TypeError, "hidden: expected a torch.Tensor, got ndarray"),
    "dtype": (lambda h, w: (h.double(), w), TypeError, "hidden: expected float32 or bfloat16 or float16, got float64"),
    "meta": (lambda h, w: (h.to("meta"), w), ValueError, "hidden: expected a tensor on cpu or cuda, got one on meta"),
    "sparse": (lambda h, w: (h.to_sparse(), w), ValueError, "hidden: expected a dense tensor, got layout torch.sparse"),
    "no columns": (lambda h, w: (h[:, :0], w), ValueError, r"hidden: expected \[..., H\] with H >= 1"),
    "width": (lambda h, w: (h, w[:, 1:]), ValueError, r"weight: expected \[K, 64\] or \[64\]"),
    "outputs": (lambda h, w: (h, w[:0]), ValueError, r"weight: expected \[K, 64\] or \[64\]"),
    "bias": (lambda h, w: (h, w, torch.ones(2)), ValueError, r"bias: expected \[1\], got \[2\]"),
    "seed": (lambda h, w: (h, w, None, 0.5, torch.ones(2, dtype=torch.int64)), ValueError, "seed: expected one int64"),
    "seed's dtype": (lambda h, w: (h, w, None, 0.5, torch.ones(1)), TypeError, "seed: expected int64, got float32"),
    "no seed": (lambda h, w: (h, w, None, 0.5), ValueError, "seed: expected an int64 tensor with dropout, got None"),
    "probability": (lambda h, w: (h, w, None, 1.0, 3), ValueError, r"dropout probability must lie in \[0, 1\), got 1"),
}


@pytest.mark.parametrize("mistake", BAD)
def test_bad_input_is_named(driver, mistake) -> None:
    arguments, kind, message = BAD[mistake]
    with pytest.raises(kind, match=message):
        device.value_head(*arguments(torch.randn(3, 64), torch.randn(1, 64)))
    assert driver.launches() == []
