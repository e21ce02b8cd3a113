"""The plain twin of the contractions: exact rational numbers, one rounding at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np


def nearest(value: Fraction) -> float:
    """The float64 nearest to an exact rational, ties to even; infinite where that overflows."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _ieee(terms: Sequence[float]) -> float | None:
    # what a sum with NaN or infinities is; None when all is finite
    if any(math.isnan(t) for t in terms):
        return math.nan
    plus, minus = math.inf in terms, -math.inf in terms
    if plus and minus:
        return math.nan
    return math.inf if plus else -math.inf if minus else None


def total(x, divisor: int = 1) -> float:
    x = [float(v) for v in x]
    special = _ieee(x)
    return nearest(sum(map(Fraction, x), Fraction(0)) / divisor) if special is None else special


def _product(a: float, b: float) -> Fraction | float:
    if math.isfinite(a) and math.isfinite(b):
        return Fraction(a) * Fraction(b)
    return a * b


def dot(a, b) -> float:
    products = [_product(float(x), float(y)) for x, y in zip(a, b, strict=True)]
    special = _ieee([p for p in products if isinstance(p, float)])
    return nearest(sum(products, Fraction(0))) if special is None else special


def contract(a, b) -> np.ndarray:
    """a (..., M, K), b (..., N, K)  ->  (..., M, N)"""
    lead = a.shape[:-2]
    out = np.empty((*lead, a.shape[-2], b.shape[-2]))
    for index in np.ndindex(*out.shape):
        out[index] = dot(a[(*index[:-2], index[-2])], b[(*index[:-2], index[-1])])
    return out


def same_bits(x, y) -> bool:
    """Equal bit for bit, the sign of zero included; all NaN count as one."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.shape != y.shape:
        return False
    equal = x.view(np.uint64) == y.view(np.uint64) if x.ndim else x.tobytes() == y.tobytes()
    return bool(np.all(equal | (np.isnan(x) & np.isnan(y))))
