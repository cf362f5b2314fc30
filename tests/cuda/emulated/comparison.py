"""What `vhead bench --device cuda` compares, on the emulated driver: every layout has the CPU's bits, and a kernel that
is wrong is found."""

import torch
from torch import Tensor

from tests.cuda.emulated import device
from vhead.benchmark.comparison import Plan, compare_with_cpu

PLAN = Plan(rows=130, columns=(7, 64), outputs=(1,), dropouts=(0.0, 0.3), special=(False,))


class Head(torch.autograd.Function):
    """The functions of the CUDA key."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: tuple[float, int | None]) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.mask = mask
        return device.value_head(hidden, weight, bias, *mask)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = list(ctx.needs_input_grad[:3])
        return (*device.value_head_backward(grad, *ctx.saved_tensors, *ctx.mask, needed), None)


def on_device(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, *, dropout_p: float = 0.0, seed: int | None = None
) -> Tensor:
    return Head.apply(hidden, weight, bias, (dropout_p, seed))


def next_seed(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, **mask) -> Tensor:
    return on_device(hidden, weight, bias, **(mask | {"seed": mask["seed"] + 1} if mask["dropout_p"] else mask))


def test_every_layout_has_the_cpu_s_bits(driver) -> None:
    rows = compare_with_cpu(torch.device("cpu"), [PLAN], on_device)
    assert [row for row in rows if row["differing"]] == []
    assert len(rows) == 3 * 6
    kernels = set(driver.kernels())
    for dtype in ("float32", "bfloat16", "float16"):
        for path in ("vector", "scalar"):
            for name in (
                f"value_head_{dtype}_{path}",
                f"value_head_backward_{dtype}_{path}",
                f"value_head_backward_weight_{dtype}_{path}",
            ):
                assert {name, f"{name}_dropout"} <= kernels


def test_another_mask_is_found() -> None:
    wrong = {row["what"] for row in compare_with_cpu(torch.device("cpu"), [PLAN], next_seed) if row["differing"]}
    assert wrong == {"values", "grad_hidden", "grad_weight", "grad_weight, frozen trunk", "mask"}
