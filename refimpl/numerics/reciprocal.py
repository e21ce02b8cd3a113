"""Hopper's approximate reciprocal and the division made of it, float32.  SPEC RCP-1, RCP-2.

RCP-1, MUFU.RCP (PTX rcp.approx.ftz.f32).  For normal x = (1 + i 2^-23) 2^e the code of the result is that of
the float32 nearest to 1 / (1 + i 2^-23), plus d(i) - 1, with the exponent lowered by e.  d, 0 to 2, is
recorded for all 2^23 fractions i on an H100 and kept in `mufu_rcp.xz`, two bits each from the lowest up;
no formula for it is known here.  Subnormal x counts as zero and a subnormal result is zero; zero gives
infinity and infinity gives zero, with the sign of x.

RCP-2, div.full.f32, which Triton's x / s becomes: RN(x RCP(s)), for |s| above 2^126 after multiplying both by
2^-2, and for subnormal s by 2^24.
"""

import lzma
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Single = NDArray[np.float32]

_FRACTIONS = 1 << 23


def rcp(x: Single) -> Single:
    """x (...) float32  ->  (...) float32 as MUFU.RCP gives it.  SPEC RCP-1."""
    bits = x.view(np.uint32).astype(np.int64)
    magnitude, sign = bits & 0x7FFF_FFFF, bits & 0x8000_0000
    fraction, exponent = magnitude & (_FRACTIONS - 1), magnitude >> 23
    nearest = (np.float32(1) / ((fraction + (127 << 23)).astype(np.uint32).view(np.float32))).view(np.uint32)
    delta = (_deltas()[fraction >> 2] >> (2 * (fraction & 3)).astype(np.uint8)) & 3
    result = nearest + delta.astype(np.int64) - 1 - (exponent - 127 << 23)
    result = np.where(result < 1 << 23, 0, result)
    result = np.where(exponent == 0, 0x7F80_0000, result)
    result = np.where(magnitude == 0x7F80_0000, 0, result) | sign
    result = np.where(magnitude > 0x7F80_0000, 0x7FFF_FFFF, result)
    return result.astype(np.uint32).view(np.float32)


def div_full(x: Single, s: Single) -> Single:
    """x (...), s broadcast to it  ->  x / s, float32, as div.full.f32 gives it.  SPEC RCP-2."""
    with np.errstate(all="ignore"):
        before, inverse = div_full_factors(s)
        quotient: Single = (x * before) * inverse
    return quotient


def div_full_factors(s: Single) -> tuple[Single, Single]:
    """s (...)  ->  (b, r), each (...): x / s is RN(RN(x b) r), and b is a power of two.  SPEC RCP-2."""
    size = np.abs(s)
    before = np.where(size > 2.0**126, 2.0**-2, np.where(size < 2.0**-126, 2.0**24, 1.0)).astype(np.float32)
    with np.errstate(all="ignore"):
        return before, rcp(s * before)


@cache
def _deltas() -> NDArray[np.uint8]:
    packed = Path(__file__).with_name("mufu_rcp.xz").read_bytes()
    return np.frombuffer(lzma.decompress(packed), np.uint8)
