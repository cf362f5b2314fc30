"""Rotary position embeddings in one pass in place, where torch makes ten passes over fresh memory."""

import torch
from torch import Tensor

from vhead import _native
from vhead.ops.devices import SETTINGS

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rotates_in_place(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `rotate` takes these tensors: contiguous ones of one dtype in the main memory."""
    alike = all(each.is_cpu and each.dtype == x.dtype for each in (x, cos, sin))
    return alike and x.dtype in _DTYPES and x.is_contiguous() and not SETTINGS.plain_torch


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Replaces each head `(a, b)` by `(a * cos - b * sin, b * cos + a * sin)`, in place and without gradients.

    Both products and their sum are rounded to the dtype, as where torch computes one after the other.

    Args:
        x: Heads `[..., heads, D]`, contiguous, float32, bfloat16 or float16.
        cos: `[..., D]`, of the same dtype.
        sin: `[..., D]`, likewise.

    Raises:
        TypeError: The dtypes differ, or are others.
        ValueError: Sizes do not fit, D is odd, or `x` is not contiguous.
    """
    _native.rotate(x, cos, sin)
