"""Root-mean-square norms in one pass over memory, where torch takes five."""

from torch import Tensor

from vhead import _native
from vhead.ops.devices import SETTINGS


def fuses_norms(x: Tensor) -> bool:
    """Whether `rms_norm` takes a tensor: one in the main memory, of a dtype that hidden states come in."""
    return not SETTINGS.plain_torch and x.is_cpu and x.is_floating_point() and x.element_size() < 8


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + epsilon)`, without gradients.

    The norm is computed in float32; before the weight and after it, it is rounded to the dtype of `x`.

    Args:
        x: `[..., H]`, float32, bfloat16 or float16.
        weight: `[H]`, of the same dtype.
        epsilon: Above 0.

    Returns:
        `[..., H]`, of the same dtype.

    Raises:
        TypeError: The dtypes differ, or are others.
        ValueError: Sizes do not fit.
    """
    return _native.rms_norm(x, weight.detach(), epsilon)
