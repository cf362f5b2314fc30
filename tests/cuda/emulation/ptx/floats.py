"""Floating-point arithmetic with a single rounding, to nearest and ties to even, on numpy arrays."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

# The bits of a float64 below those of a float32, and their value halfway between two float32 numbers.
_BELOW = np.uint64((1 << 29) - 1)
_HALFWAY = np.uint64(1 << 28)
# Below this a float32 has fewer bits, so halfway lies elsewhere.
_SUBNORMAL = 2.0**-125


def fma32(a: Floats, b: Floats, c: Floats) -> Floats:
    """`a * b + c`, rounded once.

    The product of two float32 numbers is exact in float64; their sum with `c` is rounded to float64 and again to
    float32. Two roundings differ from one only where the first lands halfway between two float32 numbers, and is then
    done again with its last bit odd wherever something was cut off.
    """
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + addend
    halfway = (total.view(np.uint64) & _BELOW) == _HALFWAY
    if np.any(halfway | (np.abs(total) < _SUBNORMAL)):
        total = _rounded_to_odd(product, addend, total)
    return total.astype(np.float32)


def _rounded_to_odd(a: Doubles, b: Doubles, total: Doubles) -> Doubles:
    """`a + b`, of its two float64 neighbours the odd one where it is not exact (Boldo and Melquiond, 2008)."""
    virtual = total - a
    error = (a - (total - virtual)) + (b - virtual)
    bits = total.view(np.int64)
    wrong = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    away = (error > 0) == (total > 0)
    return np.where(wrong, np.where(away, bits + 1, bits - 1), bits).view(np.float64)


def to_bfloat16(x: Floats) -> NDArray[np.uint16]:
    """Rounded to bfloat16, as bits; a NaN is PTX's 0x7fff."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def to_float16(x: Floats | Doubles) -> NDArray[np.uint16]:
    """Rounded to float16, as bits; a NaN is PTX's 0x7fff."""
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))
