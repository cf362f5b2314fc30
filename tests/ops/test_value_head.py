"""Forward: which bits come out, and how far they are from the float64 twin."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from tests.ops.conftest import DTYPES, HALVES, Case, rms, same_bits
from vhead import _native
from vhead.ops import value_head, value_head_plain
from vhead.ops.token_statistics.kernels import TILINGS

WIDTHS = [1, 7, 8, 255, 257, 2048]


def depends_on_its_row_alone(head: Callable[[Tensor], Tensor], hidden: Tensor) -> bool:
    together = head(hidden)
    return all(same_bits(head(hidden[i : i + 1]), together[i : i + 1]) for i in range(len(hidden)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_row_alone_has_the_value_it_has_in_a_batch(case, dtype, width) -> None:
    c = case(37, width, dtype=dtype)
    assert depends_on_its_row_alone(lambda h: value_head(h, c.weight, c.bias), c.hidden)
    wide = case(9, width, outputs=3, dtype=dtype)
    assert depends_on_its_row_alone(lambda h: value_head(h, wide.weight, wide.bias), wide.hidden)


def test_row_rule_can_fail(case) -> None:
    c = case(37, 257)
    assert not depends_on_its_row_alone(lambda h: value_head(h, c.weight) + h.mean() * 1e-6, c.hidden)


@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_do_not_depend_on_each_other(case, dtype) -> None:
    c = case(5, 300, outputs=4, dtype=dtype)
    together = value_head(c.hidden, c.weight, c.bias)
    for k in range(4):
        assert same_bits(together[:, k].contiguous(), value_head(c.hidden, c.weight[k], c.bias[k : k + 1]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x[:, ::2],
        lambda x: x[1:, 3:, 5:],
        lambda x: x[:, :1].expand(-1, 5, -1),
        lambda x: x[..., ::3],
        lambda x: x.flip(1),
        lambda x: x.mT,
        lambda x: x[1, 2],
        lambda x: x[:, None, :, None],
    ],
    ids=["transposed", "every other row", "slices", "expanded", "strided columns", "flipped", "columns", "row", "ones"],
)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_strides_do_not_matter(case, dtype, view, p) -> None:
    hidden = view(case(3, 7, 70, dtype=dtype).hidden)
    weight = torch.randn(1, hidden.shape[-1])
    strided = value_head(hidden, weight, dropout_p=p, seed=5)
    assert strided.shape == hidden.shape[:-1]
    assert same_bits(
        strided, value_head(hidden.clone(memory_format=torch.contiguous_format), weight, dropout_p=p, seed=5)
    )


def test_stride_rule_can_fail(case) -> None:
    c = case(6, 70)
    assert not same_bits(value_head(c.hidden[::2], c.weight), value_head(c.hidden[1::2], c.weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_misaligned_storage(case, dtype, offset) -> None:
    c = case(4, 45, dtype=dtype)

    def shifted(tensor: Tensor) -> Tensor:
        buffer = bytearray(offset) + tensor.contiguous().view(torch.uint8).numpy().tobytes()
        moved = torch.frombuffer(buffer, dtype=tensor.dtype, offset=offset).view(tensor.shape)
        assert moved.data_ptr() % tensor.element_size() == offset % tensor.element_size()
        return moved

    there = value_head(shifted(c.hidden), shifted(c.weight), shifted(c.bias), dropout_p=0.2, seed=3)
    assert same_bits(there, value_head(*c.tensors, dropout_p=0.2, seed=3))


def error(values: Tensor, c: Case) -> float:
    return rms(values.double() - value_head_plain(*c.double().tensors))


def trl_head(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What TRL's ValueHead computes in eval mode."""
    return linear(hidden.to(weight.dtype), weight, bias).squeeze(-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [512, 768, 4096])
def test_never_further_from_float64_than_trl(case, dtype, width) -> None:
    c = case(300, width, dtype=dtype)
    ours, theirs = error(value_head(*c.tensors), c), error(trl_head(*c.tensors), c)
    assert 0 < ours <= theirs


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_weights_are_upcast_exactly(case, dtype) -> None:
    c = case(300, 768, dtype=dtype)
    halves = Case(c.hidden, c.weight.to(dtype), c.bias.to(dtype))
    values = value_head(*halves.tensors)
    assert same_bits(values, value_head(halves.hidden, halves.weight.float(), halves.bias.float()))
    assert error(values, halves) <= error(trl_head(*halves.tensors), halves) / 10


def test_float64_is_computed_in_float64(case) -> None:
    c = case(5, 100)
    for hidden, weight in [
        (c.hidden.double(), c.weight),
        (c.hidden, c.weight.double()),
        (c.hidden.bfloat16(), c.weight.double()),
    ]:
        values = value_head(hidden, weight)
        assert values.dtype == torch.float64
        assert torch.equal(values, (hidden.double() @ weight.double().t()).squeeze(-1))


@pytest.mark.parametrize("outputs", [1, 2, 5])
def test_shapes(case, outputs) -> None:
    for sizes in [(9,), (4, 9), (2, 3, 9), (2, 1, 3, 9), (0, 9), (2, 0, 9)]:
        c = case(*sizes, outputs=outputs)
        values = value_head(*c.tensors)
        assert values.shape == (sizes[:-1] if outputs == 1 else (*sizes[:-1], outputs))
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, value_head_plain(*c.tensors))
    if outputs == 1:
        assert same_bits(value_head(c.hidden, c.weight[0]), value_head(c.hidden, c.weight))


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_reach_their_row_only(case, p, poison) -> None:
    c = case(6, 300)
    clean = value_head(*c.tensors, dropout_p=p, seed=1)
    keep = mask(6, 300, p, 1)
    for column in (0, 131, 299):
        hidden = c.hidden.clone()
        hidden[2, column] = poison
        values = value_head(hidden, c.weight, c.bias, dropout_p=p, seed=1)
        others = torch.arange(6) != 2
        assert same_bits(values[others], clean[others])
        assert not values[2].isfinite()
        assert values[2].isnan() == (math.isnan(poison) or not keep[2, column])


def mask(rows: int, columns: int, p: float, seed: int) -> Tensor:
    return _native.apply_dropout(torch.ones(rows, columns), p, seed, 0).bool()


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 2**64 - 1, 123456789123])
@pytest.mark.parametrize("p", [1e-5, 0.1, 0.5, 0.999, 1 - 1e-9])
def test_the_mask_is_one_function_everywhere(p, seed) -> None:
    """Read back from each way's gradient, which is zero where an element was dropped."""
    signed = (seed + 2**63) % 2**64 - 2**63
    expected = mask(12, 37, p, signed)
    for head in (value_head, value_head_plain):
        hidden = torch.randn(3, 4, 37, requires_grad=True)
        head(hidden, torch.full((1, 37), 2.0), dropout_p=p, seed=seed).sum().backward()
        assert torch.equal(hidden.grad.view(12, 37) != 0, expected)


def test_the_mask_drops_as_often_as_asked() -> None:
    for p in (0.1, 0.5, 0.9):
        kept = mask(400, 500, p, 3).float()
        assert abs(kept.mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / kept.numel())
    assert not torch.equal(mask(10, 10, 0.5, 1), mask(10, 10, 0.5, 2))


def test_scale_is_the_threshold_s(case) -> None:
    c = case(50, 64)
    keep = mask(50, 64, 0.3, 8).double()
    threshold = math.floor(0.3 * 65536 + 0.5)
    expected = (c.hidden.double() * keep) @ c.weight[0].double() * (65536 / (65536 - threshold)) + c.bias.double()
    torch.testing.assert_close(value_head(*c.tensors, dropout_p=0.3, seed=8), expected.float())


def test_seeds_come_from_torch_s_generator(case) -> None:
    c = case(20, 64)
    torch.manual_seed(5)
    first, second = value_head(*c.tensors, dropout_p=0.5), value_head(*c.tensors, dropout_p=0.5)
    torch.manual_seed(5)
    assert same_bits(first, value_head(*c.tensors, dropout_p=0.5))
    assert not same_bits(first, second)
    before = torch.get_rng_state()
    value_head(*c.tensors)
    value_head(*c.tensors, dropout_p=0.5, seed=1)
    value_head(*c.tensors, dropout_p=1e-7)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_seed_is_a_number_or_a_tensor(case) -> None:
    c = case(20, 64)
    for seed in (7, -7):
        number = value_head(*c.tensors, dropout_p=0.5, seed=seed)
        assert same_bits(number, value_head(*c.tensors, dropout_p=0.5, seed=torch.tensor(seed)))
        assert same_bits(number, value_head(*c.tensors, dropout_p=0.5, seed=torch.tensor([seed])))
    assert same_bits(
        value_head(*c.tensors, dropout_p=0.5, seed=2**64 - 1), value_head(*c.tensors, dropout_p=0.5, seed=-1)
    )


def test_negative_views_are_read_as_they_mean() -> None:
    negative = torch.randn(5, 40, dtype=torch.complex64).conj().imag
    weight = torch.randn(1, 40, dtype=torch.complex64).conj().imag
    assert negative.is_neg()
    assert weight.is_neg()
    plain = value_head(negative.clone(), weight.clone())
    assert same_bits(value_head(negative, weight), plain)
    leaf = weight.clone().requires_grad_()
    assert same_bits(value_head(negative, leaf).detach(), plain)
    assert not same_bits(value_head(negative, weight.clone()), -plain)


def test_results_are_ordinary_tensors(case) -> None:
    with torch.device("meta"):
        values = value_head(torch.ones(3, 4, device="cpu"), torch.randn(1, 4, device="cpu"))
    assert values.device.type == "cpu"
    assert values.untyped_storage().resizable()
    with torch.inference_mode():
        assert value_head(*case(3, 4).tensors).is_inference()


@pytest.mark.parametrize("key", _native.dispatch_keys().values())
@pytest.mark.parametrize("name", ["value_head", "value_head_backward", "value_head_two_layer"])
def test_every_backend_of_the_extension_is_the_dispatcher_s(name, key) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vhead::{name}", key)
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"vhead::{name}", "MPS"), "the check can fail"


def test_every_backend_of_the_extension_has_its_tiles() -> None:
    assert TILINGS.keys() == _native.dispatch_keys().keys()
    assert [row["device"] for row in _native.backends()] == list(TILINGS)
    with pytest.raises(ValueError, match=r"^device: expected cpu or cuda, got mps$"):
        _native.kernel_absence("mps", 0)
