"""The head as an object: its values against torch's op, its properties, pickling, threads, and life without torch."""

import copy
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch

import vhead.ops
from vhead.candle import CandleValueHead
from vhead.env import EnvironmentVariableError

from .conftest import bits, make_head, random_floats


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 50, 96), (1, 1), (7, 300), (2, 2048), (0, 64), (4, 0, 64), (33,)])
@pytest.mark.parametrize(("outputs", "bias"), [(1, True), (1, False), (3, True)])
def test_values_are_those_of_the_torch_op_bit_for_bit(dtype, shape, outputs, bias):
    head = make_head(outputs, shape[-1], bias=bias)
    hidden = torch.randn(shape).to(dtype)
    weight, b = torch.from_numpy(head.weight), torch.from_numpy(head.bias) if bias else None
    values = vhead.ops.value_head(hidden, weight, b)
    assert head(hidden).shape == tuple(values.shape)
    assert bits(head(hidden)) == bits(values.numpy())


def test_values_change_with_each_argument():
    """Negative control of the test above."""
    head, hidden = make_head(1, 96), random_floats(4, 96)
    others = [CandleValueHead(np.nextafter(head.weight, np.float32(9)), head.bias), CandleValueHead(head.weight)]
    assert all(bits(other(hidden)) != bits(head(hidden)) for other in others)
    assert bits(head(hidden[::-1].copy())) != bits(head(hidden))


def test_a_row_has_the_same_value_alone_in_a_batch_and_on_any_number_of_threads():
    hidden = random_floats(513, 1000)
    whole = make_head(1, 1000, num_threads=1)(hidden)
    for threads in [2, 3, 8]:
        assert bits(make_head(1, 1000, num_threads=threads)(hidden)) == bits(whole)
    alone = np.stack([make_head(1, 1000)(row) for row in hidden[:20]])
    assert bits(alone) == bits(whole[:20])
    # Negative control: another order of additions gives other bits for some row.
    columns = np.random.default_rng(3).permutation(1000)
    head = make_head(1, 1000)
    assert bits(CandleValueHead(head.weight[:, columns], head.bias)(hidden[:, columns])) != bits(whole)


def test_not_a_number_and_infinity_reach_the_values(head):
    hidden = random_floats(4, 96)
    hidden[0, 5], hidden[1, 95], hidden[2, 0] = np.nan, np.inf, -np.inf
    values = head(hidden)
    assert np.isnan(values[0])
    assert np.isinf(values[1:3]).all()
    assert np.isfinite(values[3])


def test_properties_and_repr():
    head = make_head(3, 96)
    assert (head.in_features, head.out_features, head.device) == (96, 3, "cpu")
    assert (head.weight.shape, head.weight.dtype, head.bias.shape) == ((3, 96), np.float32, (3,))
    assert repr(head) == "CandleValueHead(in_features=96, out_features=3, bias=True, device='cpu')"
    assert repr(make_head(1, 4, bias=False)).endswith("bias=False, device='cpu')")
    assert make_head(1, 4, bias=False).bias is None


def test_the_weights_that_are_handed_out_are_copies(head):
    hidden = random_floats(2, 96)
    before = bits(head(hidden))
    head.weight[:], head.bias[:] = 0, 0
    assert bits(head(hidden)) == before
    with pytest.raises(AttributeError):
        head.weight = head.weight


def test_weights_may_be_halves_views_and_tensors():
    weight = torch.randn(8, 2).bfloat16().t()
    head = CandleValueHead(weight, np.array([1, 2], np.float16))
    assert bits(head.weight) == bits(weight.float().contiguous().numpy())
    assert head.bias.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("again", [lambda head: pickle.loads(pickle.dumps(head)), copy.copy, copy.deepcopy])
@pytest.mark.parametrize("bias", [True, False])
def test_copies_and_pickles_are_the_same_head(again, bias):
    head, hidden = make_head(3, 96, bias=bias, num_threads=2), random_floats(4, 96)
    same = again(head)
    assert bits(same.weight) == bits(head.weight)
    assert same.bias is None if head.bias is None else bits(same.bias) == bits(head.bias)
    assert bits(same(hidden)) == bits(head(hidden))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight": np.zeros((1, 2))}, TypeError, "weight: expected float32 or bfloat16 or float16, got float64"),
        ({"weight": np.zeros((1, 2, 3), np.float32)}, ValueError, r"weight: expected shape \[K, H\] or \[H\], got"),
        ({"weight": np.zeros((0, 2), np.float32)}, ValueError, r"weight: expected shape \[K, H\] of at least one"),
        ({"weight": np.zeros((1, 0), np.float32)}, ValueError, r"weight: expected shape \[K, H\] of at least one"),
        ({"bias": np.zeros(2, np.float32)}, ValueError, r"bias: expected shape \[1\], got \[2\]"),
        ({"bias": 0.5}, TypeError, "bias: expected a numpy array or a DLPack tensor, got float"),
        ({"num_threads": 0}, ValueError, "num_threads: expected 1 to 1024, got 0"),
        ({"num_threads": -1}, ValueError, "num_threads: expected 1 to 1024, got -1"),
        ({"num_threads": 2**20}, ValueError, "num_threads: expected 1 to 1024, got 1048576"),
        ({"num_threads": 2**62}, ValueError, "num_threads: expected 1 to 1024, got 4611686018427387904"),
        ({"num_threads": 2**70}, ValueError, "num_threads: expected 1 to 1024, got 1180591620717411303424"),
        ({"num_threads": 1.5}, TypeError, "'float' object cannot be interpreted as an integer"),
    ],
)
def test_wrong_arguments_are_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        CandleValueHead(**{"weight": random_floats(1, 8), **arguments})


NO_CUDA = (
    "the candle of this wheel is built without CUDA. Use vhead.ops.value_head for torch tensors on a CUDA device, or "
    "the Rust crate vhead-candle with its feature `cuda`"
)


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:1"])
def test_cuda_is_refused_with_what_to_use_instead(tmp_path, head, device):
    head.save(tmp_path / "head.safetensors")
    for make in (partial(CandleValueHead.load, tmp_path / "head.safetensors"), partial(CandleValueHead, head.weight)):
        with pytest.raises(ValueError, match=f"^device: expected 'cpu', got '{device}': {re.escape(NO_CUDA)}$"):
            make(device=device)
    assert CandleValueHead.load(tmp_path / "head.safetensors", device="cpu", num_threads=1).device == "cpu"


@pytest.mark.parametrize("device", ["", "CPU", "cpu:0", "cuda:", "cuda:x", "cuda:-1", "cudart", "metal", "mps"])
def test_unknown_devices_are_refused_by_name(head, device):
    with pytest.raises(ValueError, match=f"^device: expected 'cpu', got '{device}'$"):
        CandleValueHead(head.weight, device=device)


def test_the_environment_sets_the_threads(monkeypatch):
    monkeypatch.setenv("VHEAD_NUM_THREADS", "none")
    with pytest.raises(EnvironmentVariableError, match="VHEAD_NUM_THREADS"):
        make_head(1, 8)
    assert make_head(1, 8, num_threads=1).out_features == 1


def test_many_threads_may_call_one_head(head):
    hidden = [random_floats(2000, 96, seed=seed) for seed in range(8)]
    expected = [bits(head(rows)) for rows in hidden]
    with ThreadPoolExecutor(4) as pool:
        assert [bits(values) for values in pool.map(head, hidden * 5)] == expected * 5


def test_a_head_works_in_a_forked_child(fresh_python):
    code = """
import os, numpy
from vhead.candle import CandleValueHead

head = CandleValueHead(numpy.ones((1, 512), numpy.float32), num_threads=2)
hidden = numpy.random.default_rng(0).standard_normal((4096, 512), dtype=numpy.float32)
before = head(hidden).tobytes()
child = os.fork()
if child == 0:
    os._exit(0 if head(hidden).tobytes() == before else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert fresh_python(code) == "0"


def test_loading_scoring_saving_and_pickling_import_no_torch(tmp_path, fresh_python, head):
    path, hidden = tmp_path / "head.safetensors", random_floats(3, 96)
    head.save(path)
    hidden.tofile(tmp_path / "hidden")
    code = f"""
import pickle, sys, numpy, vhead
head = pickle.loads(pickle.dumps(vhead.CandleValueHead.load({str(path)!r})))
values = head(numpy.fromfile({str(tmp_path / "hidden")!r}, numpy.float32).reshape(3, 96))
head.save({str(path)!r})
try:
    vhead.CandleValueHead.load({str(tmp_path / "hidden")!r})
except vhead.errors.HeadFileError:
    pass
assert not {{"torch", "transformers", "safetensors"}} & set(sys.modules), sorted(sys.modules)
print(values.view("u4").tolist())
"""
    assert fresh_python(code) == str(bits(head(hidden)))
