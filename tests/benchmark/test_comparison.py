"""The comparison with the CPU: equal kernels pass, and each way of being wrong is reported where it is."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vhead.benchmark.comparison import LAYOUTS, Inputs, Plan, compare_with_cpu, differing
from vhead.ops import value_head

CPU = torch.device("cpu")
SMALL = Plan(rows=260, columns=(9, 64), dropouts=(0.0, 0.3))
HALF = replace(SMALL, dtypes=(torch.bfloat16,), special=(False,), columns=(64,))


def wrong(rows: list[dict]) -> dict[str, int]:
    """How many elements differ, of what differs."""
    return {row["what"]: row["differing"] for row in rows if row["differing"]}


def test_every_layout_on_the_cpu_has_the_bits_of_contiguous_rows():
    rows = compare_with_cpu(CPU, [SMALL])
    assert wrong(rows) == {}
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16", "float16"}
    whats = {"values", "grad_hidden", "grad_weight", "grad_bias", "grad_weight, frozen trunk", "mask"}
    assert {row["what"] for row in rows} == whats
    settings = len(SMALL.columns) * len(SMALL.special) * len(SMALL.outputs) * len(LAYOUTS)
    for row in rows:
        assert row["cases"] == settings * (1 if row["what"] == "mask" else 2)
        assert row["elements"] > row["cases"]
        assert row["first"] is None


def test_layouts_are_what_they_are_called():
    inputs = Inputs.draw(SMALL, torch.bfloat16, 64, special=False)
    made = {name: layout(inputs.flat, SMALL.rows, 64) for name, layout in LAYOUTS.items()}
    assert {tuple(x.shape) for x in made.values()} == {(260, 64), (130, 2, 64)}
    assert {x.stride(-1) for x in made.values()} == {1}
    assert made["unaligned rows"].data_ptr() % 16
    assert made["padded rows"].data_ptr() % 16 == 0
    assert not made["padded rows"].is_contiguous()
    assert not made["transposed"].is_contiguous()
    assert made["repeated"].stride(0) == 0


def next_float(x: Tensor) -> Tensor:
    """The smallest change that there is."""
    return torch.nextafter(x, torch.full_like(x, torch.inf))


class Broken(torch.autograd.Function):
    """The head whose last value, or the first gradient of the hidden states, is off by the last bit."""

    @staticmethod
    def forward(ctx, values: Tensor, hidden: Tensor, what: str) -> Tensor:
        ctx.what = what
        values = values.clone()
        if what == "values":
            values.view(-1)[-1] = next_float(values.view(-1)[-1])
        return values

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = grad.clone()
        if ctx.what == "gradients":
            grad.view(-1)[0] = next_float(grad.view(-1)[0])
        return grad, None, None


def last_value_off(hidden, weight, bias=None, **mask):
    return Broken.apply(value_head(hidden, weight, bias, **mask), hidden, "values")


def gradients_off(hidden, weight, bias=None, **mask):
    return Broken.apply(value_head(hidden, weight, bias, **mask), hidden, "gradients")


def other_seed(hidden, weight, bias=None, **mask):
    return value_head(hidden, weight, bias, **(mask | {"seed": 1} if mask.get("dropout_p") else mask))


def no_bias(hidden, weight, bias=None, **mask):
    values = value_head(hidden, weight, None, **mask)
    return values if bias is None else values + 0 * bias


def rows_in_another_order(hidden, weight, bias=None, **mask):
    return value_head(hidden.flip(0), weight, bias, **mask)


def other_shape(hidden, weight, bias=None, **mask):
    return value_head(hidden, weight, bias, **mask).unsqueeze(0)


@pytest.mark.parametrize(
    ("head", "found"),
    [
        (last_value_off, {"values"}),
        (gradients_off, {"grad_weight, frozen trunk"}),
        (other_seed, {"values", "grad_hidden", "grad_weight", "grad_weight, frozen trunk", "mask"}),
        (no_bias, {"values"}),
        (rows_in_another_order, {"values", "grad_hidden", "grad_weight", "grad_weight, frozen trunk"}),
        (other_shape, {"values"}),
    ],
    ids=lambda x: x.__name__ if callable(x) else "",
)
def test_a_broken_kernel_is_reported(head: Callable[..., Tensor], found: set[str]):
    rows = compare_with_cpu(CPU, [HALF], head)
    assert found <= set(wrong(rows))
    if head is last_value_off:
        (row,) = (row for row in rows if row["what"] == "values")
        assert row["differing"] == row["cases"], "one element of each case"
        assert row["first"]["index"] == [259]
        assert row["first"]["layout"] == "contiguous"
        assert float(row["first"]["actual"]) > float(row["first"]["expected"])
    if head is other_shape:
        (row,) = (row for row in rows if row["what"] == "values")
        assert row["differing"] == row["elements"]
        assert row["first"]["actual"] == "float32 [1, 260]"


def test_plain_torch_in_place_of_a_kernel_is_reported():
    wide = replace(HALF, columns=(896,))
    plain = compare_with_cpu(CPU, [wide], lambda *tensors, **mask: value_head(*tensors, **mask).double().float())
    assert wrong(plain) == {}, "a detour that changes no bit is no difference"
    from vhead.ops import value_head_plain

    assert "values" in wrong(compare_with_cpu(CPU, [wide], value_head_plain))


def test_bits_count_and_nan_is_nan():
    nan, other_nan = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    expected = torch.stack((torch.tensor(0.0), nan, torch.tensor(1.0), nan))
    actual = torch.stack((torch.tensor(-0.0), other_nan, torch.tensor(1.0), torch.tensor(1.0)))
    assert differing(expected, actual).tolist() == [True, False, False, True]
    assert differing(torch.tensor([True, False]), torch.tensor([True, True])).tolist() == [False, True]


def test_special_numbers_are_among_the_hidden_states():
    for dtype in SMALL.dtypes:
        numbers = Inputs.draw(SMALL, dtype, 64, special=True).flat
        assert numbers.isnan().any()
        assert numbers.isposinf().any()
        assert numbers.isneginf().any()
        assert Inputs.draw(SMALL, dtype, 64, special=False).flat.isfinite().all()
    tiny = torch.finfo(torch.float32).tiny
    numbers = Inputs.draw(SMALL, torch.float32, 64, special=True).flat
    assert ((numbers != 0) & (numbers.abs() < tiny)).any()
