"""Correctly rounded exp, log, sin and cos on float64 arrays.  SPEC EXACT-5.

f(x) = the float64 nearest to the true value, ties to even, for every float64 x: subnormal results,
overflow and arguments of any size included.  The bits therefore depend on nothing but x.  Special values
are those of IEEE 754: exp(-inf) = 0, log(0) = -inf, log(x < 0) = sin(inf) = cos(inf) = NaN, sin(-0) = -0,
NaN gives NaN; no warning is raised.

Method (Ziv): the fast path gives an unevaluated sum h + l and a bound on its error.  Where h + (l - bound)
and h + (l + bound) round to the same float64, that is the result.  The few others (about one in 2^14) go to
`fixedpoint`, which settles them with integers.  The fast path uses only + - *, rint, comparisons, bit fields
and table look-ups, and no fused operation; its tables are made by `fixedpoint`.

u = 2^-53.  The bounds are derived where they stand; the tests measure that the true error stays below them.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refimpl.numerics import fixedpoint
from refimpl.numerics.eft import fast_two_sum, two_prod, two_sum

Array = NDArray[np.float64]
Fast = Callable[[Array], tuple[Array, NDArray[np.bool_]]]  # x -> result, where it is undecided

_BLOCK = 4096  # values at a time: some twenty temporaries of this size stay in cache
_BITS = 160  # precision at which tables are made
_SPLIT = 1024  # exp: 2^(1/1024); log: 1024 parts of [1, 2); sin, cos: steps of pi/1024

_EXP_MAX = float.fromhex("0x1.62e42fefa39efp+9")  # the largest argument with a finite exp
_EXP_MIN = -746.0  # below, exp < 2^-1075 and rounds to zero
_ANGLE_MAX = 2.0**20  # up to here the parts of pi/1024 are multiplied exactly

_EXP_ERROR = 2.0**-70
_LOG_ERROR = 2.0**-69
_ANGLE_ERROR = 2.0**-68
_REDUCTION_ERROR = 2.0**-102


def exp(x: ArrayLike) -> Array:
    """exp(x), correctly rounded; float64 of the shape of x."""
    return _apply(x, _exp, fixedpoint.exp)


def log(x: ArrayLike) -> Array:
    """log(x), the natural logarithm, correctly rounded; float64 of the shape of x."""
    return _apply(x, _log, fixedpoint.log)


def sin(x: ArrayLike) -> Array:
    """sin(x), x in radians, correctly rounded; float64 of the shape of x."""
    return _apply(x, _sin, fixedpoint.sin)


def cos(x: ArrayLike) -> Array:
    """cos(x), x in radians, correctly rounded; float64 of the shape of x."""
    return _apply(x, _cos, fixedpoint.cos)


def _apply(x: ArrayLike, fast: Fast, settle: Callable[[float], float]) -> Array:
    with np.errstate(all="ignore"):
        x = np.asarray(x, np.float64)
        flat = np.ascontiguousarray(x).reshape(-1)
        result = np.empty_like(flat)
        for at in range(0, flat.size, _BLOCK):
            part = flat[at : at + _BLOCK]
            values, undecided = fast(part)
            where = np.flatnonzero(undecided)
            if where.size:
                hard, back = np.unique(part[where], return_inverse=True)
                values[where] = np.array([settle(v) for v in hard.tolist()])[back]
            result[at : at + _BLOCK] = values
    return result.reshape(x.shape)


def _round(h: Array, low: Array, bound: Array | float) -> tuple[Array, NDArray[np.bool_]]:
    # h + low is the value, |low| may be well above an ulp of h.  The bounds leave room for the roundings of
    # low - bound and low + bound, which are below 2^-105 |h|.
    h, low = fast_two_sum(h, low)
    down = h + (low - bound)
    return down, down != h + (low + bound)


# exp(x) = 2^k 2^(j/1024) exp(r),  x = (1024 k + j) log(2)/1024 + r,  |r| <= 2^-11.5


@cache
def _exp_tables() -> tuple[Array, Array, tuple[float, ...]]:
    step = fixedpoint.ln2(_BITS + 10)
    pairs = [
        fixedpoint.double_double(fixedpoint.exp_fixed(step * j >> 20, _BITS), _BITS) for j in range(_SPLIT)
    ]
    high, low = np.array(pairs).T.copy()
    # log(2)/1024 in two parts of 32 bits, whose products with the 21 bits of 1024 k + j are exact, and a rest
    return high, low, _parts(fixedpoint.ln2(_BITS), _BITS + 10, (42, 74))


def _exp(x: Array) -> tuple[Array, NDArray[np.bool_]]:
    t_high, t_low, (p1, p2, p3) = _exp_tables()
    inside = (x > _EXP_MIN) & (x <= _EXP_MAX)
    y = x if inside.all() else np.where(inside, x, 0.0)
    n = np.rint(y * (1.0 / (p1 + p2)))
    index = n.astype(np.int64)
    k, j = index >> 10, index & 1023
    # y - n p1 is exact (Sterbenz); the error of r_low is below 2^-107
    r, r_low = two_sum(y - n * p1, -(n * p2))
    r_low -= n * p3
    s = r + r_low
    # exp(r) - 1 - r: 4 u of 2^-24, and r^6/720 < 2^-78 left out
    p = s * s * (0.5 + s * (1 / 6 + s * (1 / 24 + s * (1 / 120))))
    # t (1 + r + p): five roundings of terms below 2^-24, and t_low p left out; together below 2^-73.  Where
    # t = 1 the product is exact, however small r is.
    t, tl = t_high[j], t_low[j]
    a, b = two_prod(t, r)
    h, c = fast_two_sum(t, a)
    low = (c + ((b + (tl + tl * s)) + t * r_low)) + t * p
    result, undecided = _round(h, low, h * _EXP_ERROR)
    result = (result.view(np.int64) + (k << 52)).view(np.float64)
    if k.min(initial=0) <= -1022:
        tiny = k <= -1023
        result[tiny], undecided[tiny] = _subnormal(h[tiny], low[tiny], k[tiny])
        undecided |= (k == -1022) & (h <= 1.0)  # a rare band, left to the integers
    if y is not x:
        undecided &= inside
        result = np.where(inside, result, np.where(x > 0, np.inf, np.where(x < 0, 0.0, np.nan)))
    return result, undecided


def _subnormal(h: Array, low: Array, k: NDArray[np.int64]) -> tuple[Array, NDArray[np.bool_]]:
    # (h + low) 2^k on the grid 2^-1074, that is g = 2^(-1074-k) for h + low; adding 2^52 g rounds to it once.
    # The sums of c, low and bound are rounded at 2^-54 g at most, hence the second term of the bound.
    h, low = fast_two_sum(h, low)
    one = np.int64(1023)
    grid = ((one - 1074 - k) << 52).view(np.float64)
    shift = grid * 2.0**52
    s, c = fast_two_sum(shift, h)
    bound = h * _EXP_ERROR + grid * 2.0**-51
    down = s + ((c + low) - bound)
    steps = (down - shift) * ((one + 1074 + k) << 52).view(np.float64)
    return steps.astype(np.int64).view(np.float64), down != s + ((c + low) + bound)


# log(2^e m) = e log(2) - log(c) + log(1 + z),  z = m c - 1,  c near 1/m with 14 bits,  |z| <= 2^-10


@cache
def _log_tables() -> tuple[NDArray[np.int64], Array, Array, Array, tuple[float, ...]]:
    carry, inverse, high, low = [], [], [], []
    ln2 = fixedpoint.ln2(_BITS)
    for i in range(_SPLIT):
        c = 1 << 14 if i == 0 else 1 << 13 if i == _SPLIT - 1 else round((1 << 25) / (2 * _SPLIT + 2 * i + 1))
        up = i > 424  # m above sqrt(2) counts as m / 2, so that no two terms cancel
        exact = c in (1 << 13, 1 << 14)  # 1/2 carries, so both are log(1)
        value = 0 if exact else -fixedpoint.log_fixed(c << _BITS - 14, _BITS) - up * ln2
        first = (value >> _BITS - 43) + 1 >> 1  # a multiple of 2^-42, as is the first part of log(2)
        carry.append(int(up))
        inverse.append(c / (1 << 14))
        high.append(first / (1 << 42))
        low.append(fixedpoint.nearest(value - (first << _BITS - 42), _BITS))
    return np.array(carry), np.array(inverse), np.array(high), np.array(low), _parts(ln2, _BITS, (42,))


def _log(x: Array) -> tuple[Array, NDArray[np.bool_]]:
    carry, inverse, c_high, c_low, (p1, p2) = _log_tables()
    inside = (x > 0) & (x < np.inf)
    y = x if inside.all() else np.where(inside, x, 1.0)
    small = y < 2.0**-1022
    y = np.where(small, y * 2.0**54, y) if small.any() else y
    bits = y.view(np.int64)
    i = bits >> 42 & 1023
    e = ((bits >> 52) - 1023 + carry[i] - np.where(small, 54, 0)).astype(np.float64)
    one = np.int64(1023 << 52)
    m = (bits & ((1 << 52) - 1) | one).view(np.float64)
    top = (bits & ((1 << 52) - (1 << 20)) | one).view(np.float64)  # 33 bits
    c = inverse[i]
    z, z_low = two_sum(top * c - 1.0, (m - top) * c)  # exact
    # log(1 + z) - z + z^2/2: 4 u of |z|^3/3, and z^9/9 left out
    z3 = z * z * z * (1 / 3 - z * (1 / 4 - z * (1 / 5 - z * (1 / 6 - z * (1 / 7 - z * (1 / 8))))))
    a = e * p1 + c_high[i]  # exact
    q, q_low = two_prod(z, z)
    h, d1 = two_sum(a, z)
    h, d2 = two_sum(h, -0.5 * q)
    # If a = 0 the value is at least |z| (1 - 2^-10), and every term below is at most 2^-21 |z|, with an error
    # of a few u; if not, the value is above 2^-11, and the terms are below 2^-31.
    low = (((z_low - z * z_low) - 0.5 * q_low) + (c_low[i] + e * p2)) + ((d1 + d2) + z3)
    result, undecided = _round(h, low, np.abs(h) * _LOG_ERROR)
    if not inside.all():
        undecided &= inside
        result = np.where(inside, result, np.where(x == 0, -np.inf, np.where(x > 0, x, np.nan)))
    return result, undecided


# sin(x) = S cos(r) + C sin(r),  x = k pi/1024 + r,  |r| <= 2^-9.3,  S, C = sin, cos of k pi/1024


@cache
def _angle_tables() -> tuple[Array, Array, tuple[float, ...]]:
    pi = fixedpoint.pi(_BITS)
    pairs = []
    for j in range(_SPLIT // 2 + 1):  # sin of the first quadrant; beyond pi/4 it is the cosine of the rest
        t = pi * min(j, _SPLIT // 2 - j) >> 10
        value = fixedpoint.sin_fixed(t, _BITS) if j <= _SPLIT // 4 else fixedpoint.cos_fixed(t, _BITS)
        pairs.append(fixedpoint.double_double(value, _BITS))
    quarter = np.array(pairs).T
    half = np.concatenate([quarter, quarter[:, -2:0:-1]], axis=1)
    high, low = np.concatenate([half, -half], axis=1)
    # pi/1024 in three parts of 24 bits, whose products with the 29 bits of k are exact, and a rest
    return high, low, _parts(pi, _BITS + 10, (32, 56, 80))


def _sin(x: Array) -> tuple[Array, NDArray[np.bool_]]:
    result, undecided, tiny = _angle(x, 0)
    return np.where(tiny, x, result), undecided  # |x|^3/6 is less than half an ulp of x


def _cos(x: Array) -> tuple[Array, NDArray[np.bool_]]:
    result, undecided, tiny = _angle(x, _SPLIT // 2)
    return np.where(tiny, 1.0, result), undecided  # x^2/2 is less than half of 1's lower ulp


def _angle(x: Array, turn: int) -> tuple[Array, NDArray[np.bool_], NDArray[np.bool_]]:
    t_high, t_low, (p1, p2, p3, p4) = _angle_tables()
    size = np.abs(x)
    tiny = size < 2.0**-27
    inside = (size <= _ANGLE_MAX) & ~tiny
    y = x if inside.all() else np.where(inside, x, 1.0)
    k = np.rint(y * (1.0 / (p1 + p2)))
    # y - k p1 is exact (Sterbenz); the errors of the sums of low terms and of k p4 are below 2^-104 together
    r, d1 = two_sum(y - k * p1, -(k * p2))
    r, d2 = two_sum(r, -(k * p3))
    r, r_low = two_sum(r, (d1 + d2) - k * p4)
    j = k.astype(np.int64) + turn
    sine, cosine = j & 2047, (j + _SPLIT // 2) & 2047
    s, c = t_high[sine], t_high[cosine]
    rr = r * r
    versine = rr * (-0.5 + rr * (1 / 24 - rr * (1 / 720)))  # cos(r) - 1: 3 u of 2^-19.7
    rest = r * rr * (-1 / 6 + rr * (1 / 120 - rr * (1 / 5040)))  # sin(r) - r
    a, b = two_prod(c, r)
    h, d = two_sum(s, a)
    # S is zero, or at most twice the value.  Errors: 2^-51 of s versine, two roundings of the sum; and
    # t_low versine, t_low rest left out: together below 2^-69 of the value.
    low = (
        (d + ((b + t_low[sine]) + (c * r_low + t_low[cosine] * r))) + (c * rest - s * r * r_low) + s * versine
    )
    bound = np.abs(h) * _ANGLE_ERROR + np.where(k == 0, 0.0, _REDUCTION_ERROR)
    result, undecided = _round(h, low, bound)
    undecided &= inside
    undecided |= (size > _ANGLE_MAX) & (size < np.inf)
    result = np.where(size < np.inf, result, np.nan)
    return result, undecided, tiny


def _parts(value: int, bits: int, ends: tuple[int, ...]) -> tuple[float, ...]:
    # value / 2^bits as a sum of float64: each part stops at 2^-end, and the last is the nearest to the rest
    parts = []
    for end in ends:
        part = value >> bits - end
        parts.append(part / (1 << end))
        value -= part << bits - end
    return *parts, fixedpoint.nearest(value, bits)
