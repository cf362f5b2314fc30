"""Every message a wrong argument gets, in full, from each way in."""

import pickle

import numpy as np
import pytest
import torch

from vhead import _native, errors
from vhead.ops import init_normal_, value_head, value_head_plain

H, W, B = torch.ones(2, 3, 8), torch.ones(1, 8), torch.ones(1)
COMPLEX = torch.ones(2, 8, dtype=torch.complex64)
FLOATS = "float32, bfloat16, float16 or float64"

WRONG = [
    ((np.ones((2, 8)), W, B), TypeError, "hidden: expected a torch.Tensor, got ndarray"),
    ((H, None, B), TypeError, "weight: expected a torch.Tensor, got NoneType"),
    ((H, W, 0.5), TypeError, "bias: expected a torch.Tensor, got float"),
    ((H.long(), W, B), TypeError, f"hidden: expected {FLOATS}, got int64"),
    ((COMPLEX, W, B), TypeError, f"hidden: expected {FLOATS}, got complex64"),
    ((COMPLEX.conj(), W, B), TypeError, f"hidden: expected {FLOATS}, got complex64"),
    ((H.to(torch.float8_e4m3fn), W, B), TypeError, f"hidden: expected {FLOATS}, got float8_e4m3fn"),
    ((H, W.bool(), B), TypeError, f"weight: expected {FLOATS}, got bool"),
    ((H, W, B.int()), TypeError, f"bias: expected {FLOATS}, got int32"),
    ((H[0].to_sparse(), W, B), ValueError, "hidden: expected a dense tensor, got layout sparse_coo"),
    ((H[0, 0, 0], W, B), ValueError, "hidden: expected [..., H] with H >= 1, got []"),
    ((H[..., :0], W[..., :0], B), ValueError, "hidden: expected [..., H] with H >= 1, got [2, 3, 0]"),
    ((H, W[:, :7], B), ValueError, "weight: expected [K, 8] or [8] for hidden states [2, 3, 8], got [1, 7]"),
    ((H, W.t(), B), ValueError, "weight: expected [K, 8] or [8] for hidden states [2, 3, 8], got [8, 1]"),
    ((H, W[None], B), ValueError, "weight: expected [K, 8] or [8] for hidden states [2, 3, 8], got [1, 1, 8]"),
    ((H, W[:0], B[:0]), ValueError, "weight: expected [K, 8] or [8] for hidden states [2, 3, 8], got [0, 8]"),
    ((H, W, torch.ones(2)), ValueError, "bias: expected [1], got [2]"),
    ((H, W, B[0]), ValueError, "bias: expected [1], got []"),
    ((H, W.expand(4, 8), B), ValueError, "bias: expected [4], got [1]"),
    ((H.to("meta"), W, B), ValueError, "weight: expected a tensor on meta like hidden, got one on cpu"),
    ((H, W, B.to("meta")), ValueError, "bias: expected a tensor on cpu like hidden, got one on meta"),
]


@pytest.mark.parametrize("head", [value_head, value_head_plain])
@pytest.mark.parametrize(("arguments", "error", "message"), WRONG, ids=[row[2] for row in WRONG])
def test_tensors(head, arguments, error, message) -> None:
    for p in (0.0, 0.5):
        with pytest.raises(error) as caught:
            head(*arguments, dropout_p=p, seed=1)
        assert str(caught.value) == message


WRONG_DROPOUT = [
    ({"dropout_p": 1.0}, ValueError, "dropout_p: expected a probability in [0, 1), got 1.0"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p: expected a probability in [0, 1), got -0.1"),
    ({"dropout_p": float("nan")}, ValueError, "dropout_p: expected a probability in [0, 1), got nan"),
    ({"seed": 2**64}, ValueError, "seed: expected an integer of 64 bits, got 18446744073709551616"),
    ({"seed": 0.5}, TypeError, "seed: expected an int or an int64 torch.Tensor, got float"),
    ({"seed": torch.tensor(1, dtype=torch.int32)}, TypeError, "seed: expected int64, got int32"),
    ({"seed": torch.tensor([1, 2])}, ValueError, "seed: expected one element, got [2]"),
]


@pytest.mark.parametrize("head", [value_head, value_head_plain])
@pytest.mark.parametrize(("arguments", "error", "message"), WRONG_DROPOUT, ids=[row[2] for row in WRONG_DROPOUT])
def test_dropout(head, arguments, error, message) -> None:
    with pytest.raises(error) as caught:
        head(H, W, B, **{"dropout_p": 0.5, **arguments})
    assert str(caught.value) == message


NEGATIVE = COMPLEX.conj().imag
FAKE = torch._subclasses.FakeTensorMode().from_tensor(H)
KERNEL_FLOATS = "float32 or bfloat16 or float16"
SEED = torch.tensor(1)
WRONG_FOR_THE_KERNEL = [
    ((1, W, B), TypeError, "hidden: expected a torch.Tensor, got int"),
    ((FAKE, W, B), TypeError, "hidden: expected a tensor with its own data, got a FakeTensor"),
    ((H.double(), W, B), TypeError, f"hidden: expected {KERNEL_FLOATS}, got float64"),
    ((COMPLEX.conj(), W, B), TypeError, f"hidden: expected {KERNEL_FLOATS}, got complex64"),
    ((H, W.int(), B), TypeError, f"weight: expected {KERNEL_FLOATS}, got int32"),
    ((H, W, B.double()), TypeError, f"bias: expected {KERNEL_FLOATS}, got float64"),
    ((H.to("meta"), W, B), ValueError, "hidden: expected a tensor on cpu or cuda, got one on meta"),
    ((H, W.to_sparse(), B), ValueError, "weight: expected a dense tensor, got layout torch.sparse_coo"),
    (
        (NEGATIVE, W, B),
        ValueError,
        "hidden: expected a tensor as it lies in memory, got a negative view (call resolve_neg())",
    ),
    ((torch._efficientzerotensor((2, 8)), W, B), ValueError, "hidden: expected a tensor with storage, got one without"),
    ((H[0, 0, 0], W, B), ValueError, "hidden: expected [..., H] with H >= 1, got []"),
    ((H[..., :0], W[..., :0], B), ValueError, "hidden: expected [..., H] with H >= 1, got [2, 3, 0]"),
    ((H, W[:, :7], B), ValueError, "weight: expected [K, 8] or [8] for hidden states [2, 3, 8], got [1, 7]"),
    ((H, W[None], B), ValueError, "weight: expected [K, 8] or [8] for hidden states [2, 3, 8], got [1, 1, 8]"),
    ((H, W[:0], None), ValueError, "weight: expected [K, 8] or [8] for hidden states [2, 3, 8], got [0, 8]"),
    ((H, W, torch.ones(2)), ValueError, "bias: expected [1], got [2]"),
    ((H, W, B, 1.5, SEED), ValueError, "dropout probability must lie in [0, 1), got 1.5"),
    ((H, W, B, 0.5), ValueError, "seed: expected an int64 tensor with dropout, got None"),
    ((H, W, B, 0.5, torch.tensor(0.5)), TypeError, "seed: expected int64, got float32"),
    ((H, W, B, 0.5, torch.tensor([1, 2])), ValueError, "seed: expected one int64 number, got sizes [2]"),
]


@pytest.fixture(params=["exchange", "attributes"])
def tensor_view(request):
    _native.configure(read_attributes=request.param == "attributes")
    yield
    _native.configure()


@pytest.mark.usefixtures("tensor_view")
@pytest.mark.parametrize(
    ("arguments", "error", "message"), WRONG_FOR_THE_KERNEL, ids=[row[2] for row in WRONG_FOR_THE_KERNEL]
)
def test_the_kernel_itself(arguments, error, message) -> None:
    with pytest.raises(error) as caught:
        _native.value_head(*arguments)
    assert str(caught.value) == message
    if len(arguments) == 3 and isinstance(arguments[0], torch.Tensor):
        assert _native.try_value_head(*arguments, grad_enabled=False) is None


@pytest.mark.usefixtures("tensor_view")
def test_the_kernel_s_gradient() -> None:
    needed = (True, True, True)
    with pytest.raises(ValueError, match=r"^grad: expected \[2, 3\], got \[3, 2\]$"):
        _native.value_head_backward(torch.ones(3, 2), H, W, 0.0, None, needed)
    with pytest.raises(TypeError, match=r"^grad: expected float32, got bfloat16$"):
        _native.value_head_backward(torch.ones(2, 3).bfloat16(), H, W, 0.0, None, needed)


def test_init() -> None:
    for std in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"^std: expected a finite number that is not negative, got {std}$"):
            init_normal_(torch.empty(1, 8), None, std)


def test_panics_become_exceptions(two_threads) -> None:
    """Also from a thread of torch's, and the process goes on."""
    for tasks in (1, 16):
        with pytest.raises(errors.KernelPanicError, match="a kernel failed inside: on purpose") as caught:
            _native.panic_on_purpose(tasks)
        assert isinstance(caught.value, RuntimeError)
        copy = pickle.loads(pickle.dumps(caught.value))
        assert str(copy) == str(caught.value)
        assert len(_native.worker_threads(8)) == 8
