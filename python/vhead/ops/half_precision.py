"""Where torch multiplies half precisions more slowly than float32."""

import functools
import platform

import torch

from vhead import _native
from vhead.ops.matrix_unit import onednn_allows

_X86_64, _INTEL = ("x86_64", "amd64"), "GenuineIntel"


@functools.cache
def is_float32_faster(dtype: torch.dtype) -> bool:
    """Whether widening this half precision and multiplying in float32 is faster than torch's own products here.

    The processor decides and no measurement, so that two processes never differ in their digits because one of them was
    disturbed. Measured with torch 2.13 on a Xeon of family 6, model 207 without its matrix unit, and with oneDNN kept
    from its instructions: float32 is 1.5 times as fast as `avx512_bf16`, 0.9 times as `avx512_fp16`, and 4 to 10 times
    as what torch does without them. AMD's `avx512_bf16` has twice the products of float32 in a cycle and is left alone;
    so are processors other than x86-64, of which none was measured. The matrix unit is asked for elsewhere.
    """
    if platform.machine().lower() not in _X86_64:
        return False
    maker, instructions = _native.processor()
    if dtype == torch.float16:
        return not ("avx512_fp16" in instructions and onednn_allows("FP16", "AMX", "AVX10"))
    has_fast = "avx512_bf16" in instructions and maker != _INTEL
    return not (has_fast and onednn_allows("BF16", "FP16", "AMX", "AVX10"))
