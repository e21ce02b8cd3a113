"""float32 as the GPU's ordinary units compute it.  SPEC SINGLE-1 to SINGLE-3.

SINGLE-1.  + and * are IEEE's; every NaN result is 0x7fffffff.
SINGLE-2.  fma(a, b, c) = RN(a b + c): one rounding.
SINGLE-3.  To BF16: round to nearest even; every NaN becomes 0x7fff.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from refimpl.numerics.eft import two_sum

Single = NDArray[np.float32]

NAN = np.uint32(0x7FFF_FFFF)
BF16_NAN = np.uint16(0x7FFF)

_BELOW = np.int64((1 << 29) - 1)  # the bits of a float64 that a float32 lacks
_HALF = np.int64(1 << 28)


def canonical(x: Single) -> Single:
    """x (...), whose NaN become the one of the GPU, in place."""
    x.view(np.uint32)[np.isnan(x)] = NAN
    return x


def fma(a: Single, b: Single, c: Single) -> Single:
    """a, b, c (...)  ->  RN(a b + c), float32 (...); NaN are any NaN.  SPEC SINGLE-2.

    The product is exact in float64, its sum with c is not, and rounding that again to float32 goes wrong
    where the first rounding has reached the middle of two float32 values.  There, and for results with
    fewer bits than 24, the sum is rounded to odd instead, after which a second rounding is harmless
    (Boldo and Melquiond 2008).
    """
    with np.errstate(all="ignore"):
        product = a.astype(np.float64) * b.astype(np.float64)
        total = np.asarray(product + c.astype(np.float64))
        doubtful = (total.view(np.int64) & _BELOW) == _HALF
        doubtful |= np.abs(total) < 2.0**-126
        if doubtful.any():
            shape = total.shape
            total[doubtful] = sum_to_odd(
                np.broadcast_to(product, shape)[doubtful], np.broadcast_to(c, shape)[doubtful]
            )
        return total.astype(np.float32)


def sum_to_odd(x: NDArray[np.float64], y: Single) -> NDArray[np.float64]:
    """x + y (n,); of the two float64 around a sum that is none itself, the one whose last bit is 1."""
    s, error = two_sum(x, y.astype(np.float64))
    if not error.any():
        return s
    bits = s.view(np.int64)
    step = np.where((error > 0) == (s > 0), 1, -1)
    bits += np.where((error != 0) & ~np.isnan(error) & (bits & 1 == 0), step, 0)
    return s


def to_bf16(x: Single) -> NDArray[np.uint16]:
    """x (...)  ->  BF16 codes, uint16 (...).  SPEC SINGLE-3."""
    bits = x.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(x), BF16_NAN, rounded.astype(np.uint16))
