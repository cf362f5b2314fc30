"""Sizes of batches that a machine takes well."""

import torch

_HALF = (torch.bfloat16, torch.float16)
_HALF_MULTIPLE = 64


def row_multiple(device: torch.device, dtype: torch.dtype) -> int:
    """What the number of rows of a packed batch should be a multiple of.

    On a CPU, torch multiplies half precisions with kernels that oneDNN compiles for each number of rows and then keeps:
    some milliseconds and some hundred KiB each. Sizes that come again cost neither.
    """
    return _HALF_MULTIPLE if device.type == "cpu" and dtype in _HALF else 1
