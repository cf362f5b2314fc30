"""Whose threads run the kernels, what a fork does to them, and the switches of the environment."""

import time

import pytest
import torch

from tests.ops.conftest import same_bits
from vhead import _native, ops
from vhead.ops import value_head

# torch lends its threads since 2.10.
LENDER = "torch" if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10) else "vhead"


def threads_used() -> int:
    return len(set(_native.worker_threads(16)))


def test_threads_follow_torch(two_threads) -> None:
    assert threads_used() == 2
    assert ops.backends()["cpu"]["threads"] == 2
    assert ops.backends()["cpu"]["thread_source"] == LENDER
    torch.set_num_threads(1)
    assert threads_used() == 1
    assert ops.backends()["cpu"]["thread_source"] == "caller"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_values_do_not_depend_on_threads(case, two_threads, dtype, p) -> None:
    c = case(700, 513, outputs=2, dtype=dtype)
    many = value_head(*c.tensors, dropout_p=p, seed=1)
    torch.set_num_threads(1)
    assert same_bits(many, value_head(*c.tensors, dropout_p=p, seed=1))


def test_asked_threads_are_used(two_threads) -> None:
    for asked, source in [(1, "caller"), (2, LENDER), (3, "vhead")]:
        _native.configure(num_threads=asked)
        try:
            assert ops.backends()["cpu"]["threads"] == asked
            assert ops.backends()["cpu"]["thread_source"] == source
            assert 1 <= threads_used() <= asked
        finally:
            _native.configure()


def test_python_threads_side_by_side(two_threads, case) -> None:
    from concurrent.futures import ThreadPoolExecutor

    c = case(500, 300)
    expected = value_head(*c.tensors)
    with ThreadPoolExecutor(4) as pool:
        for values in pool.map(lambda _: value_head(*c.tensors), range(8)):
            assert same_bits(values, expected)


def test_other_threads_run_meanwhile(case) -> None:
    """The GIL is released for large work: a Python thread counts on while a kernel runs."""
    import threading

    c, stop, ticks = case(3000, 1024), threading.Event(), []

    def count() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0)

    thread = threading.Thread(target=count)
    thread.start()
    while not ticks:
        time.sleep(0.001)
    start = time.perf_counter()
    for _ in range(20):
        value_head(*c.tensors, dropout_p=0.5, seed=1)
    end = time.perf_counter()
    stop.set()
    thread.join()
    # Hundreds where the GIL is released; where it is held, one each time the interpreter makes the threads take turns.
    assert sum(start < tick < end for tick in ticks) >= 100


FORK = """
import os, signal, time, torch
from vhead import _native, ops
torch.set_num_threads(2)
hidden, weight = torch.randn(2000, 512), torch.randn(1, 512, requires_grad=True)
def step():
    weight.grad = None
    values = ops.value_head(hidden, weight, dropout_p=0.1, seed=1)
    values.sum().backward()
    return values.detach(), weight.grad
values, gradient = step()
assert len(set(_native.worker_threads(16))) == 2 and ops.backends()["cpu"]["thread_source"] == "{lender}"
child = os.fork()
if child == 0:
    again, gradient_again = step()
    row = ops.backends()["cpu"]
    good = torch.equal(values, again) and torch.equal(gradient, gradient_again)
    good = good and len(set(_native.worker_threads(16))) == 2
    os._exit(0 if good and (row["threads"], row["thread_source"]) == (2, "vhead") else 1)
deadline = time.monotonic() + 60
while time.monotonic() < deadline:
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        print("exit", os.waitstatus_to_exitcode(status))
        break
    time.sleep(0.01)
else:
    os.kill(child, signal.SIGKILL)
    print("hangs")
step()
assert ops.backends()["cpu"]["thread_source"] == "{lender}"
"""


def test_a_forked_child_computes_the_same(fresh_python) -> None:
    assert fresh_python(FORK.format(lender=LENDER)) == "exit 0"


def test_switches_of_the_environment(fresh_python) -> None:
    report = """
import os
os.environ.update({settings})
import torch
from vhead import ops
row = ops.backends()["cpu"]
values = ops.value_head(torch.ones(4, 8), torch.ones(1, 8))
leaf = torch.ones(1, 8, requires_grad=True)
grad_fn = type(ops.value_head(torch.ones(4, 8), leaf).grad_fn).__name__
print(row["kernel"], row["threads"], row["thread_source"], row["tensor_view"], grad_fn, values.tolist())
"""
    values = "[8.0, 8.0, 8.0, 8.0]"
    switched = {"VHEAD_NUM_THREADS": "3", "VHEAD_TENSOR_VIEW": "attributes"}
    assert fresh_python(report.format(settings=switched)) == f"native 3 vhead attributes _ValueHeadBackward {values}"
    plain = {"VHEAD_PLAIN_TORCH": "1", "OMP_NUM_THREADS": "1"}
    kind = "exchange" if hasattr(torch.Tensor, "__dlpack_c_exchange_api__") else "attributes"
    assert fresh_python(report.format(settings=plain)) == f"plain torch 1 caller {kind} SqueezeBackward1 {values}"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("VHEAD_NUM_THREADS", "two", "VHEAD_NUM_THREADS: expected an integer from 1 to 1024, got 'two'"),
        ("VHEAD_NUM_THREADS", "0", "VHEAD_NUM_THREADS: expected an integer from 1 to 1024, got '0'"),
        ("VHEAD_NUM_THREADS", "1025", "VHEAD_NUM_THREADS: expected an integer from 1 to 1024, got '1025'"),
        ("VHEAD_PLAIN_TORCH", "yes", "VHEAD_PLAIN_TORCH: expected one of 0, 1, got 'yes'"),
        ("VHEAD_TENSOR_VIEW", "raw", "VHEAD_TENSOR_VIEW: expected one of exchange, attributes, got 'raw'"),
    ],
)
def test_wrong_switches_are_errors(monkeypatch, name, value, message) -> None:
    from vhead.env import read_settings
    from vhead.errors import EnvironmentVariableError

    monkeypatch.setenv(name, value)
    with pytest.raises(EnvironmentVariableError) as caught:
        read_settings()
    assert str(caught.value) == message


def test_both_ways_of_reading_tensors_agree(case) -> None:
    for c in (case(3, 5, 37), case(40, 600, dtype=torch.bfloat16), case(0, 4)):
        for view in (c.hidden, c.hidden.transpose(0, 1) if c.hidden.dim() == 3 else c.hidden[::2]):
            expected = value_head(view, c.weight, c.bias, dropout_p=0.2, seed=1)
            _native.configure(read_attributes=True)
            try:
                assert ops.backends()["cpu"]["tensor_view"] == "attributes"
                assert same_bits(value_head(view, c.weight, c.bias, dropout_p=0.2, seed=1), expected)
            finally:
                _native.configure()


def test_the_table_says_what_this_binary_is() -> None:
    table = ops.backends()
    assert table["cpu"]["kernel"] == "native"
    assert table["cpu"]["dtypes"] == ["float32", "bfloat16", "float16"]
    assert table["cpu"]["simd"] == table["cpu"]["simd_available"][-1]
    assert table["other devices"] == {"kernel": "plain torch"}
    assert set(table["build"]) == {"version", "profile", "target"}
