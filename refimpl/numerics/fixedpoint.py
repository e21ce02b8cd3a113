"""Elementary functions in Python integers, to any precision.  SPEC EXACT-5.

The slow twin of `functions`: it makes that module's tables, and decides the few arguments that its fast path
cannot.  A number t at `bits` stands for t / 2^bits.  Every `*_fixed` function is within 4 units of the last
place of its argument's own value.  The functions on floats double the precision until both ends of the
interval in which the true value lies round to the same float64; no value of exp, log, sin or cos at a
float64 is a tie or a float64 itself, except at the arguments 0 and 1 (Lindemann), so this ends.
"""

import math
from collections.abc import Callable
from functools import cache

_GUARD = 32  # bits carried beyond those asked for: room for 2^32 roundings
_START = 192  # bits of the first try
_UNITS = 1 << 12  # bound on the error of a try, in units of its last place; all are below 2^6


@cache
def ln2(bits: int) -> int:
    """log 2 = 18 atanh(1/26) - 2 atanh(1/4801) + 8 atanh(1/8749)."""
    at = bits + _GUARD
    return (18 * _inverse(26, at, 1) - 2 * _inverse(4801, at, 1) + 8 * _inverse(8749, at, 1)) >> _GUARD


@cache
def pi(bits: int) -> int:
    """pi = 16 atan(1/5) - 4 atan(1/239)  (Machin)."""
    at = bits + _GUARD
    return (16 * _inverse(5, at, -1) - 4 * _inverse(239, at, -1)) >> _GUARD


def exp_fixed(t: int, bits: int) -> int:
    """exp of t / 2^bits in [-1, 1]: Taylor at t / 256, squared eight times."""
    at = bits + _GUARD
    u = t << (_GUARD - 8)
    total = term = 1 << at
    n = 1
    while term not in (0, -1):
        term = (term * u >> at) // n
        total += term
        n += 1
    for _ in range(8):
        total = total * total >> at
    return total >> _GUARD


def log_fixed(t: int, bits: int) -> int:
    """log of t / 2^bits in [1/2, 2]: 2 atanh((t - 1) / (t + 1))."""
    at = bits + _GUARD
    one = 1 << at
    m = t << _GUARD
    power = ((m - one) << at) // (m + one)
    square = power * power >> at
    total, n = 0, 1
    while power not in (0, -1):
        total += power // n
        power = power * square >> at
        n += 2
    return total >> (_GUARD - 1)


def sin_fixed(t: int, bits: int) -> int:
    """sin of t / 2^bits in [-1, 1], by Taylor."""
    return _alternating(t << _GUARD, t, bits, 2)


def cos_fixed(t: int, bits: int) -> int:
    """cos of t / 2^bits in [-1, 1], by Taylor."""
    return _alternating(1 << (bits + _GUARD), t, bits, 1)


def exp(x: float) -> float:
    """The float64 nearest to exp(x), for finite x."""
    if x > 710.0 or x < -746.0:
        return math.inf if x > 0 else 0.0

    def attempt(bits: int) -> tuple[int, int]:
        t = _fixed(x, bits)
        k = (2 * t // ln2(bits) + 1) // 2
        return exp_fixed(t - (k * ln2(bits + 16) >> 16), bits), bits - k

    return _settle(attempt)


def log(x: float) -> float:
    """The float64 nearest to log(x), for finite x > 0."""
    if x == 1.0:
        return 0.0
    m, e = math.frexp(x)
    if m < 0.7:
        m, e = 2 * m, e - 1
    return _settle(lambda bits: (log_fixed(_fixed(m, bits), bits) + e * ln2(bits + 16) // (1 << 16), bits))


def sin(x: float) -> float:
    """The float64 nearest to sin(x), for finite x."""
    return x if x == 0.0 else _settle(lambda bits: (_quadrant(x, bits, 0), bits))


def cos(x: float) -> float:
    """The float64 nearest to cos(x), for finite x."""
    return 1.0 if x == 0.0 else _settle(lambda bits: (_quadrant(x, bits, 1), bits))


def nearest(t: int, bits: int) -> float:
    """The float64 nearest to t / 2^bits, ties to even."""
    try:
        return float(t << -bits) if bits < 0 else t / (1 << bits)  # Python rounds both of them correctly
    except OverflowError:
        return math.copysign(math.inf, t)


def double_double(t: int, bits: int) -> tuple[float, float]:
    """t / 2^bits as the unevaluated sum of two float64."""
    high = nearest(t, bits)
    return high, nearest(t - _fixed(high, bits), bits)


def _settle(attempt: Callable[[int], tuple[int, int]]) -> float:
    bits = _START
    while True:
        value, scale = attempt(bits)
        low, high = nearest(value - _UNITS, scale), nearest(value + _UNITS, scale)
        if low == high:
            return low
        bits *= 2


def _fixed(x: float, bits: int) -> int:
    numerator, denominator = x.as_integer_ratio()
    return (numerator << bits) // denominator


def _quadrant(x: float, bits: int, turn: int) -> int:
    # sin(x + turn pi/2); the multiple of pi/2 is as large as x, so pi gets as many more bits
    more = max(0, math.frexp(x)[1]) + 2
    t, half = _fixed(x, bits + more), pi(bits + more - 1)
    k = (2 * t // half + 1) // 2
    r = (t - k * half) >> more
    value = cos_fixed(r, bits) if (k + turn) & 1 else sin_fixed(r, bits)
    return -value if (k + turn) & 2 else value


def _alternating(first: int, t: int, bits: int, n: int) -> int:
    # first (1 - t^2 / (n (n + 1)) + t^4 / (n ... (n + 3)) - ...)
    at = bits + _GUARD
    square = (t * t << 2 * _GUARD) >> at
    total = term = first
    while term not in (0, -1):
        term = -(term * square >> at) // (n * (n + 1))
        total += term
        n += 2
    return total >> _GUARD


def _inverse(q: int, bits: int, sign: int) -> int:
    # atanh(1/q) for sign = 1, atan(1/q) for sign = -1
    power = (1 << bits) // q
    total, n, turn = 0, 1, 1
    while power:
        total += turn * (power // n)
        power //= q * q
        n, turn = n + 2, turn * sign
    return total
