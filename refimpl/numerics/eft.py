"""Error-free transformations on float64 arrays.  SPEC EXACT-1.

two_sum:   a + b = s + e exactly, s = RN(a + b)
two_prod:  a * b = p + e exactly, p = RN(a * b)

Source: Dekker 1971; Knuth, TAOCP 4.2.2; Ogita, Rump and Oishi 2005.
Nothing but + - * is used, so the bits are IEEE's.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SPLITTER = 134217729.0  # 2^27 + 1


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a, b (...)  ->  s, e (...) with s = RN(a + b) and s + e = a + b; requires that nothing overflows."""
    s = a + b
    t = s - a
    e = s - t
    np.subtract(a, e, out=e)
    np.subtract(b, t, out=t)
    e += t
    return s, e


def fast_two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a, b (...)  ->  s, e (...) as `two_sum`; requires |a| >= |b| or a = 0."""
    s = a + b
    e = s - a
    np.subtract(b, e, out=e)
    return s, e


def split(a: Array) -> tuple[Array, Array]:
    """a (...)  ->  high, low (...) with a = high + low, each of at most 26 bits; requires |a| < 2^996."""
    high = a * SPLITTER
    low = high - a
    high -= low
    return high, a - high


def two_prod(a: Array, b: Array) -> tuple[Array, Array]:
    """a, b (...)  ->  p, e (...) with p = RN(a * b) and p + e = a * b.

    Requires |a|, |b| < 2^996, |a b| < 2^1021, and a b = 0 or |a b| >= 2^-967 (otherwise e would underflow).
    """
    p = a * b
    a_high, a_low = split(a)
    b_high, b_low = split(b)
    e = a_high * b_high
    e -= p
    e += a_high * b_low
    e += a_low * b_high
    e += a_low * b_low
    return p, e
