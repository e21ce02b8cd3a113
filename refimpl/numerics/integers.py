"""Sums and dot products in exact integer arithmetic.  SPEC EXACT-1.

RN(sum_k a[k] b[k]), with float64 a and b taken as integers times powers of two: slow, and right for every
finite input.  It is the last step of the rounding tests, for what floating-point arithmetic cannot decide.
"""

from __future__ import annotations

import math

import numpy as np

from refimpl.numerics.eft import Array


def _integers(x: Array) -> tuple[list[int], list[int]]:
    # x = mantissa * 2^exponent
    fraction, exponent = np.frexp(x)
    return np.ldexp(fraction, 53).astype(np.int64).tolist(), (exponent.astype(np.int64) - 53).tolist()


def ratio(numerator: int, exponent: int, divisor: int = 1) -> float:
    """The float64 nearest to numerator * 2^exponent / divisor; beyond the largest float64 it is infinite.

    Notes: Python's division of integers is correctly rounded, subnormal results included.
    """
    if numerator == 0:
        return 0.0
    over, under = max(exponent, 0), max(-exponent, 0)
    try:
        return (numerator << over) / (divisor << under)
    except OverflowError:
        return math.inf if numerator > 0 else -math.inf


def exact_sum(x: Array, divisor: int = 1) -> float:
    """x (K,) finite  ->  RN(sum_k x[k] / divisor)."""
    mantissa, exponent = _integers(x)
    base = min((e for m, e in zip(mantissa, exponent, strict=True) if m), default=0)
    total = sum(m << (e - base) for m, e in zip(mantissa, exponent, strict=True) if m)
    return ratio(total, base, divisor)


def exact_dot(a: Array, b: Array) -> float:
    """a, b (K,) finite  ->  RN(sum_k a[k] b[k])."""
    (ma, ea), (mb, eb) = _integers(a), _integers(b)
    terms = [(m * n, e + f) for m, n, e, f in zip(ma, mb, ea, eb, strict=True) if m and n]
    base = min((e for _, e in terms), default=0)
    return ratio(sum(m << (e - base) for m, e in terms), base)
