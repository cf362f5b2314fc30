"""Fresh parameters from a seed."""

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from vhead import _native
from vhead.ops.arguments import draw_seed
from vhead.ops.dropout import sharding_module


@torch.no_grad()
def init_linear_(weight: Tensor, bias: Tensor | None) -> None:
    """Fills in place with `nn.Linear`'s default distribution, uniform within `1 / sqrt(in_features)` of zero.

    One seed is drawn from torch's default generator of the CPU; the numbers are a function of it, the same on every
    device. They are made in float32 and rounded to the parameters' dtype. Parameters without data (meta, fake) are left
    alone.

    Args:
        weight: `[out_features, in_features]`, any floating dtype, any device.
        bias: `[out_features]`.
    """
    columns = weight.shape[-1]
    _fill({"weight": weight, "bias": bias}, lambda sizes, name, seed: _native.init_linear(sizes, columns, name, seed))


@torch.no_grad()
def init_normal_(weight: Tensor, bias: Tensor | None, std: float) -> None:
    """Fills the weight in place with N(0, `std`), the bias with zeros; the rest as `init_linear_`.

    Raises:
        ValueError: `std` is negative or not finite.
    """
    if not (math.isfinite(std) and std >= 0.0):
        raise ValueError(f"std: expected a finite number that is not negative, got {std}")
    _fill({"weight": weight}, lambda sizes, name, seed: _native.init_normal(sizes, std, name, seed))
    if bias is not None:
        bias.zero_()


@torch.no_grad()
def init_zeros_(weight: Tensor, bias: Tensor | None) -> None:
    """Fills in place with zeros, so that every value is 0; no seed is drawn.

    Args:
        weight: `[out_features, in_features]`, any floating dtype, any device.
        bias: `[out_features]`.
    """
    weight.zero_()
    if bias is not None:
        bias.zero_()


def _fill(parameters: dict[str, Tensor | None], draw: Callable[[list[int], str, int], Tensor]) -> None:
    present = {name: parameter for name, parameter in parameters.items() if parameter is not None}
    if any(parameter.is_meta or isinstance(parameter, FakeTensor) for parameter in present.values()):
        return
    seed = int(draw_seed(torch.device("cpu")).item())
    for name, parameter in present.items():
        numbers = draw(list(parameter.shape), name, seed)
        parameter.copy_(_distributed_like(parameter, numbers.to(parameter.device)))


def _distributed_like(parameter: Tensor, numbers: Tensor) -> Tensor:
    """`numbers` sharded as `parameter` is, where that is a DTensor: every rank then holds rank 0's draw."""
    sharding = sharding_module()
    if sharding is None or not isinstance(parameter, sharding.DTensor):
        return numbers
    return cast("Tensor", sharding.distribute_tensor(numbers, parameter.device_mesh, parameter.placements))
