"""The value head on the emulated driver, in processes that find it: the tests are in `tests/cuda/emulated`."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from tests.cuda.emulation import driver
from vhead.ops import value_head, value_head_two_layer
from vhead.ops.arguments import seed_tensor


def test_under_the_emulated_driver() -> None:
    assert " passed" in driver.pytest("value_head.py", "transforms.py", "streams.py", "failures.py")


def test_by_attributes_and_whatever_the_order_of_threads() -> None:
    assert " passed" in driver.pytest(
        "value_head.py", "streams.py", VHEAD_TENSOR_VIEW="attributes", VHEAD_MOCK_SEED="5"
    )


def test_the_stream_by_its_public_name() -> None:
    code = """
        import ctypes, types, torch
        from vhead import _native
        del torch._C._cuda_getCurrentRawStream
        torch.cuda.current_stream = lambda device: types.SimpleNamespace(cuda_stream=0x78 + device)
        _native.configure(read_attributes=True)
        driver = ctypes.CDLL("libcuda.so.1")
        _native.kernel_absence("cuda", 0)
        driver.vhead_mock_take_memory(1)
        _native.value_head(torch.randn(3, 8), torch.randn(1, 8))
        log = driver.vhead_mock_log
        log.restype = ctypes.c_char_p
        print(log().decode())
    """
    assert f"stream={0x78} " in driver.python("if True:" + code)


def test_seeds_are_drawn_where_the_hidden_states_are() -> None:
    with FakeTensorMode():
        drawn = seed_tensor(0.3, None, torch.device("cuda:0"))
    assert (drawn.device, drawn.dtype, drawn.shape) == (torch.device("cuda:0"), torch.int64, ())
    assert seed_tensor(0.3, None, torch.device("cpu")).is_cpu
    assert seed_tensor(0.3, 5, torch.device("cuda:0")).is_cpu, "a number is passed by value"


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_tracers_need_no_device(p) -> None:
    with FakeTensorMode():
        hidden = torch.empty(3, 5, 40, device="cuda:0", dtype=torch.bfloat16)
        weight, weight2 = torch.empty(24, 40, device="cuda:0"), torch.empty(1, 24, device="cuda:0")
        values = value_head(hidden, weight, dropout_p=p)
        two = value_head_two_layer(hidden, weight, None, weight2, None, dropout_p=p)
    assert (values.device, values.dtype, values.shape) == (torch.device("cuda:0"), torch.float32, (3, 5, 24))
    assert (two.device, two.dtype, two.shape) == (torch.device("cuda:0"), torch.float32, (3, 5))
