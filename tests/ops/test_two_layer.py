"""The head of two layers: its bits, its errors, its gradients, and what torch does with it."""

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.func import grad, vmap

from tests.ops.conftest import DTYPES, rms, same_bits
from vhead import _native
from vhead.ops import value_head, value_head_two_layer, value_head_two_layer_plain

OPERATOR = torch.ops.vhead.value_head_two_layer.default
BACKWARD_OPERATOR = torch.ops.vhead.value_head_two_layer_backward.default


def head(columns: int, width: int, outputs: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Weights and biases of two layers, random."""
    weight1, weight2 = torch.randn(width, columns) / columns**0.5, torch.randn(outputs, width) / width**0.5
    return weight1.to(dtype), torch.randn(width).to(dtype), weight2, torch.randn(outputs)


@pytest.fixture
def tensors():
    """Makes hidden states `sizes` and a head over them."""

    def make(*sizes: int, width: int = 40, outputs: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        return torch.randn(sizes).to(dtype), *head(sizes[-1], width, outputs)

    return make


def double(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.double() for tensor in tensors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(33, 7, 1), (256, 300, 3), (897, 64, 1)])
@pytest.mark.usefixtures("two_threads")
def test_a_row_s_value_depends_on_that_row_alone(tensors, dtype, shape) -> None:
    columns, width, outputs = shape
    hidden, *rest = tensors(50, columns, width=width, outputs=outputs, dtype=dtype)
    together = value_head_two_layer(hidden, *rest)
    for i in (0, 11, 12, 49):
        assert same_bits(value_head_two_layer(hidden[i : i + 1], *rest), together[i : i + 1])
    torch.set_num_threads(1)
    assert same_bits(value_head_two_layer(hidden.view(5, 10, columns), *rest).flatten(0, 1), together)
    assert same_bits(value_head_two_layer(hidden.flip(0), *rest).flip(0), together)
    other = value_head_two_layer_plain(hidden, *rest)
    assert not same_bits(other, together), "torch's own order differs, so the check can fail"


@pytest.mark.parametrize("outputs", [1, 2])
def test_it_is_two_heads_with_a_relu_between(tensors, outputs) -> None:
    hidden, weight1, bias1, weight2, bias2 = tensors(9, 300, width=520, outputs=outputs)
    activations = value_head(hidden, weight1, bias1).relu()
    expected = value_head(activations, weight2, bias2)
    assert same_bits(value_head_two_layer(hidden, weight1, bias1, weight2, bias2), expected)
    assert not same_bits(value_head(value_head(hidden, weight1, bias1), weight2, bias2), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_as_exact_as_the_twin(tensors, dtype, p) -> None:
    case = tensors(200, 768, width=800, outputs=2, dtype=dtype)
    exact = value_head_two_layer_plain(*double(case), dropout_p=p, seed=4)
    ours = value_head_two_layer(*case, dropout_p=p, seed=4)
    plain = value_head_two_layer_plain(*case, dropout_p=p, seed=4)
    assert ours.dtype == torch.float32
    assert rms(ours - exact) <= 1.1 * rms(plain - exact)
    assert not torch.equal(ours, value_head_two_layer(*case, dropout_p=p, seed=5)) or p == 0


def test_half_precision_weights_are_upcast_exactly(tensors) -> None:
    hidden, weight1, bias1, weight2, bias2 = tensors(20, 300, width=64)
    for dtype in (torch.bfloat16, torch.float16):
        halves = [tensor.to(dtype) for tensor in (weight1, bias1, weight2, bias2)]
        floats = [tensor.float() for tensor in halves]
        assert same_bits(value_head_two_layer(hidden, *halves), value_head_two_layer(hidden, *floats))


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("sizes", [(9,), (4, 9), (2, 3, 9), (0, 9), (2, 0, 9)])
def test_shapes_with_and_without_biases(tensors, sizes, outputs) -> None:
    hidden, weight1, bias1, weight2, bias2 = tensors(*sizes, outputs=outputs)
    for arguments in (
        (weight1, bias1, weight2, bias2),
        (weight1, None, weight2, None),
        (weight1, None, weight2, bias2),
    ):
        values = value_head_two_layer(hidden, *arguments)
        assert values.shape == (sizes[:-1] if outputs == 1 else (*sizes[:-1], outputs))
        torch.testing.assert_close(values, value_head_two_layer_plain(hidden, *arguments))


def test_strides_do_not_matter(tensors) -> None:
    hidden, weight1, bias1, weight2, bias2 = tensors(3, 7, 70)
    expected = value_head_two_layer(hidden, weight1, bias1, weight2, bias2)
    turned = hidden.transpose(0, 2).contiguous().transpose(0, 2)
    wide = torch.randn(80, 140)
    wide[::2, ::2] = weight1
    assert same_bits(value_head_two_layer(turned, wide[::2, ::2], bias1, weight2.expand(1, 40), bias2), expected)
    assert not same_bits(value_head_two_layer(turned, wide[1::2, ::2], bias1, weight2, bias2), expected)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_and_infinity_reach_their_row_only(tensors, poison) -> None:
    hidden, *rest = tensors(30, 65)
    hidden[17, 3] = poison
    values = value_head_two_layer(hidden, *rest)
    plain = value_head_two_layer_plain(hidden, *rest)
    assert torch.equal(values.isfinite(), plain.isfinite())
    assert (~values.isfinite()).nonzero().tolist() == [[17]]


def gradients(function, case: tuple[Tensor, ...], upstream: Tensor, **arguments) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in case]
    values = function(*leaves, **arguments)
    return torch.autograd.grad(values, leaves, upstream.to(values.dtype))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_as_exact_as_the_twin_s(tensors, dtype, outputs, p, monkeypatch) -> None:
    monkeypatch.setattr("vhead.ops.two_layer._CHUNK_BYTES", 4 * 40 * 17)  # 17 rows, and a last chunk that is shorter
    case = tensors(20, 4, 130, outputs=outputs, dtype=dtype)
    upstream = torch.randn((20, 4) if outputs == 1 else (20, 4, outputs))
    ours = gradients(value_head_two_layer, case, upstream, dropout_p=p, seed=4)
    plain = gradients(value_head_two_layer_plain, case, upstream, dropout_p=p, seed=4)
    exact = gradients(value_head_two_layer_plain, double(case), upstream, dropout_p=p, seed=4)
    other = gradients(value_head_two_layer, case, upstream, dropout_p=0.5, seed=5)
    for mine, twin, true, wrong in zip(ours, plain, exact, other, strict=True):
        assert mine.dtype == twin.dtype
        assert mine.shape == true.shape
        assert rms(mine - true) <= 1.5 * rms(twin - true) + 3e-7 * rms(true)
        assert rms(wrong - true) > 1e-2 * rms(true) or wrong is other[4]


@pytest.mark.parametrize("missing", range(5))
def test_only_what_is_needed_is_computed(tensors, missing) -> None:
    case = tensors(6, 40)
    every = gradients(value_head_two_layer, case, torch.ones(6), dropout_p=0.2, seed=1)
    leaves = [tensor.clone().requires_grad_(i != missing) for i, tensor in enumerate(case)]
    value_head_two_layer(*leaves, dropout_p=0.2, seed=1).sum().backward()
    for i, (leaf, full) in enumerate(zip(leaves, every, strict=True)):
        assert leaf.grad is None if i == missing else same_bits(leaf.grad, full)


def test_backward_keeps_hidden_states_weights_and_seed_only(tensors) -> None:
    leaves = [tensor.requires_grad_() for tensor in tensors(6, 40)]
    seed, kept = torch.tensor(3), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        value_head_two_layer(*leaves, dropout_p=0.5, seed=seed)
    assert set(kept) == {*(tensor.data_ptr() for tensor in leaves[:4]), seed.data_ptr()}


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_float64_gradients_by_finite_differences(tensors, p) -> None:
    leaves = tuple(t.requires_grad_() for t in double(tensors(2, 3, 7, width=5, outputs=2)))

    def function(*tensors):
        return value_head_two_layer(*tensors, dropout_p=p, seed=1)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_double_backward_is_the_twin_s(tensors) -> None:
    def twice(function, case: tuple[Tensor, ...]) -> list[Tensor]:
        leaves = [tensor.detach().clone().requires_grad_() for tensor in case]
        values = function(*leaves, dropout_p=0.3, seed=2).sin()
        first = torch.autograd.grad(values.sum(), leaves[:4], create_graph=True)
        sum(gradient.square().mean() for gradient in first).backward()
        return [leaf.grad for leaf in leaves]

    case = tensors(5, 30, outputs=2)
    for mine, true in zip(
        twice(value_head_two_layer, case), twice(value_head_two_layer_plain, double(case)), strict=True
    ):
        torch.testing.assert_close(mine, true.float(), rtol=1e-4, atol=1e-5)


# opcheck itself looks at `.grad` of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_opcheck(tensors) -> None:
    leaves = [t.requires_grad_() for t in tensors(3, 5, 37, outputs=2, dtype=torch.bfloat16)]
    torch.library.opcheck(OPERATOR, (*leaves, 0.3, torch.tensor(5)))
    torch.library.opcheck(OPERATOR, (leaves[0], leaves[1], None, leaves[3], None, 0.0, None))
    saved = [leaf.detach() for leaf in leaves[:4]]
    for needed in ([True] * 5, [False, True, False, True, False]):
        torch.library.opcheck(BACKWARD_OPERATOR, (torch.randn(3, 5, 2), *saved, 0.3, torch.tensor(5), needed))


def test_compile(tensors) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *t: value_head_two_layer(*t, dropout_p=0.3, seed=9).sin(), backend="aot_eager", fullgraph=True
    )
    case = tensors(4, 5, 37, dtype=torch.bfloat16)
    upstream = torch.randn(4, 5)
    ours = gradients(compiled, case, upstream)
    eager = gradients(lambda *t: value_head_two_layer(*t, dropout_p=0.3, seed=9).sin(), case, upstream)
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_leaves_the_head_in_float32(tensors) -> None:
    case = tensors(30, 300)
    leaves = [tensor.clone().requires_grad_() for tensor in case]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = value_head_two_layer(*leaves)
        plain = value_head_two_layer_plain(*case)
        inside.sum().backward()
    assert same_bits(inside.detach(), value_head_two_layer(*case))
    assert same_bits(plain, value_head_two_layer_plain(*case))
    expected = gradients(value_head_two_layer, case, torch.ones(30))
    assert all(same_bits(leaf.grad, full) for leaf, full in zip(leaves, expected, strict=True))


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_vmap_is_the_loop(tensors, p) -> None:
    hidden, *rest = tensors(4, 6, 37)

    def one(hidden: Tensor, weight1: Tensor) -> Tensor:
        return value_head_two_layer(hidden, weight1, *rest[1:], dropout_p=p, seed=3)

    loop = torch.stack([one(sample, rest[0]) for sample in hidden])
    assert same_bits(vmap(one, in_dims=(0, None))(hidden, rest[0]), loop)
    weights = torch.randn(4, *rest[0].shape)
    loop = torch.stack([one(sample, weight) for sample, weight in zip(hidden, weights, strict=True)])
    assert same_bits(vmap(one)(hidden, weights), loop)
    ours, plain = (
        grad(lambda w, f=f: f(hidden, w, *rest[1:], dropout_p=p, seed=3).sin().sum())(rest[0])
        for f in (value_head_two_layer, value_head_two_layer_plain)
    )
    torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4)


def test_fake_and_meta_tensors_have_shapes(tensors) -> None:
    case = tensors(2, 3, 37, outputs=4)
    with FakeTensorMode():
        fakes = [torch.randn(t.shape, requires_grad=True) for t in case]
        values = value_head_two_layer(*fakes, dropout_p=0.3)
        values.sum().backward()
        assert (values.shape, values.dtype, fakes[1].grad.shape) == ((2, 3, 4), torch.float32, (40, 37))
    assert value_head_two_layer(*(t.to("meta") for t in case)).shape == (2, 3, 4)


H, W1, B1, W2, B2 = torch.ones(2, 3, 8), torch.ones(4, 8), torch.ones(4), torch.ones(1, 4), torch.ones(1)
WRONG = [
    ((0, W1, B1, W2, B2), TypeError, "hidden: expected a torch.Tensor, got int"),
    ((H.int(), W1, B1, W2, B2), TypeError, "hidden: expected float32, bfloat16, float16 or float64, got int32"),
    ((H[0, 0, 0], W1, B1, W2, B2), ValueError, "hidden: expected [..., H] with H >= 1, got []"),
    ((H, W1[0], B1, W2, B2), ValueError, "weight1: expected [I, 8], got [8]"),
    ((H, W1[:, :5], B1, W2, B2), ValueError, "weight1: expected [I, 8], got [4, 5]"),
    ((H, W1[:0], B1[:0], W2[:, :0], B2), ValueError, "weight1: expected [I, 8], got [0, 8]"),
    ((H, W1, B2, W2, B2), ValueError, "bias1: expected [4], got [1]"),
    ((H, W1, B1, W2[0], B2), ValueError, "weight2: expected [K, 4], got [4]"),
    ((H, W1, B1, W1, B2), ValueError, "weight2: expected [K, 4], got [4, 8]"),
    ((H, W1, B1, W2, B1), ValueError, "bias2: expected [1], got [4]"),
    ((H, W1, B1, W2.to("meta"), B2), ValueError, "weight2: expected a tensor on cpu like hidden, got one on meta"),
]


@pytest.mark.parametrize("function", [value_head_two_layer, value_head_two_layer_plain])
@pytest.mark.parametrize(("arguments", "error", "message"), WRONG, ids=[row[2] for row in WRONG])
def test_wrong_arguments(function, arguments, error, message) -> None:
    with pytest.raises(error) as caught:
        function(*arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [row for row in WRONG if row[0][0] is H and row[0][3] is not None and not row[0][3].is_meta],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_of_the_kernel(arguments, error, message) -> None:
    with pytest.raises(error) as caught:
        _native.value_head_two_layer(*arguments)
    assert str(caught.value) == message
