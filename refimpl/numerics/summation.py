"""Correctly rounded sums, means and elementwise dot products.  SPEC EXACT-1.

sum_(x)[i]      = RN(sum_k x[i, k])
mean(x)[i]      = RN(sum_k x[i, k] / K)
dot(a, b)[i]    = RN(sum_k a[i, k] b[i, k])
segment_sum(x, ids, n)[g, d] = RN(sum over t with ids[t] = g of x[t, d])

Each row is cut twice at a power of two so that the cut-off parts add up without rounding in any order; what
is left bounds the error.  If every number within that error rounds to the same float64, that is the result;
otherwise the row is summed in integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refimpl.errors import Invalid
from refimpl.numerics import integers
from refimpl.numerics.eft import Array, two_prod, two_sum

CHUNK = 1 << 19  # elements of a temporary: some ten of them are alive at a time, and should stay in the cache
HUGE = 2.0**960  # sums of magnitudes below this cannot overflow on the way
TINY_PRODUCT = 2.0**-960  # the error of a product below this may underflow
SLACK = 1.0 + 2.0**-20  # covers the rounding of a plain sum of up to 2^32 magnitudes

Bits = NDArray[np.bool_]
Reduce = Callable[[Array], Array]


class Pair(NamedTuple):
    """high + low, within error of the exact value; error 0 means that it is the exact value."""

    high: Array
    low: Array
    error: Array


def _total(x: Array) -> Array:
    # only ever used where the order cannot matter: exact partial sums, or magnitudes for a bound
    total: Array = np.add.reduce(x, axis=-1)
    return total


def _spread(x: Array) -> Array:
    return x[..., None]


def _accumulate(x: Array, total: Reduce, spread: Reduce) -> Pair:
    """The sum of x within a bound.  Requires total(|x|) < HUGE."""
    # x - head is exact, heads are multiples of unit = 2^(e-51) and their magnitudes sum to at most 2^53 units
    exponent = np.frexp(total(np.abs(x)) * SLACK)[1]
    sigma = spread(np.ldexp(1.5, np.maximum(exponent + 1, -1022)))
    head = x + sigma
    head -= sigma
    rest = x - head
    high = total(head)
    left = total(np.abs(rest)) * SLACK
    if not left.any():
        return Pair(high, np.zeros_like(high), left)
    sigma = spread(np.ldexp(1.5, np.maximum(np.frexp(left)[1] + 1, -1022)))
    np.add(rest, sigma, out=head)
    head -= sigma
    rest -= head
    high, low = two_sum(high, total(head))
    return Pair(high, low, total(np.abs(rest, out=rest)) * SLACK)


def _decide(pair: Pair) -> tuple[Array, Bits]:
    """The rounded value, and where the rounding is not certain."""
    # the second term covers the rounding of low +- error itself
    error = pair.error + np.abs(pair.low) * (2.0**-51 * (pair.error > 0))
    above = pair.high + (pair.low + error)
    below = pair.high + (pair.low - error)
    return above + 0.0, above != below


def _special_sum(x: Array) -> Array:
    """Rows with NaN or infinities: what IEEE gives when no finite part overflows."""
    plus, minus = (x == np.inf).any(-1), (x == -np.inf).any(-1)
    bad = np.isnan(x).any(-1) | (plus & minus)
    return np.where(bad, np.nan, np.where(plus, np.inf, -np.inf))


def _sum_rows(x: Array) -> Array:
    """x (P, K)  ->  (P,)"""
    size = _total(np.abs(x))
    hard = ~(size < HUGE)
    easy = np.where(hard[:, None], 0.0, x) if hard.any() else x
    out, open_ = _decide(_accumulate(easy, _total, _spread))
    for i in np.flatnonzero(open_ & ~hard):
        out[i] = math.fsum(x[i]) + 0.0  # correctly rounded, as nothing overflows
    if hard.any():
        _hard_rows(x, hard, 1, out)
    return out


def _hard_rows(x: Array, hard: Bits, divisor: int, out: Array) -> None:
    finite = np.isfinite(x).all(-1)
    for i in np.flatnonzero(hard & finite):
        out[i] = integers.exact_sum(x[i], divisor)
    special = np.flatnonzero(hard & ~finite)
    out[special] = _special_sum(x[special])


def _dot_rows(a: Array, b: Array) -> Array:
    """a, b (P, K)  ->  (P,)"""
    product, rest = two_prod(a, b)
    magnitude = np.abs(product)
    # a split factor overflows to NaN, which the comparison catches; so does a huge product
    hard = ~(_total(magnitude) < HUGE) | ~np.isfinite(_total(rest))
    small = magnitude < TINY_PRODUCT
    lost = np.zeros(len(a))
    if small.any():
        small &= (a != 0) & (b != 0)
        lost = 2.0 * TINY_PRODUCT * np.count_nonzero(small, axis=-1)
        product[small] = rest[small] = 0.0
    terms = np.concatenate([product, rest], axis=-1) if rest.any() else product
    if hard.any():
        terms[hard] = 0.0
    pair = _accumulate(terms, _total, _spread)
    out, open_ = _decide(pair._replace(error=pair.error + lost))
    for i in np.flatnonzero(open_ & ~hard & (lost == 0)):
        out[i] = math.fsum(terms[i]) + 0.0
    rest_open = hard | (open_ & (lost > 0))
    if rest_open.any():
        finite = np.isfinite(a).all(-1) & np.isfinite(b).all(-1)
        for i in np.flatnonzero(finite & rest_open):
            out[i] = integers.exact_dot(a[i], b[i])
        special = np.flatnonzero(~finite)
        sign = [np.where(np.isinf(x[special]), x[special], np.sign(x[special])) for x in (a, b)]
        out[special] = _special_sum(sign[0] * sign[1])
    return out


def _float64(x: ArrayLike) -> Array:
    """Integers and narrower floats are converted, which has to be exact."""
    array = np.asarray(x)
    if array.dtype == np.float64:
        return array
    if array.dtype.kind not in "fiub":
        raise Invalid(f"an operand has dtype {array.dtype}, but a contraction needs real numbers.")
    wide = array.astype(np.float64)
    with np.errstate(invalid="ignore"):
        exact = array.dtype.itemsize < 8 or bool((wide.astype(array.dtype) == array).all())
    if not exact:
        raise Invalid(f"an operand of dtype {array.dtype} holds values that float64 cannot represent.")
    return wide


def _rows_per_chunk(length: int) -> int:
    return max(1, CHUNK // max(1, length))


def dot(a: ArrayLike, b: ArrayLike) -> Array:
    """a, b (..., K), broadcast  ->  (...), the sum over the last axis of a * b, correctly rounded."""
    x, y = np.broadcast_arrays(_float64(a), _float64(b))
    if x.ndim == 0:
        raise Invalid("dot was given two numbers, but needs at least one axis to sum over.")
    out = np.zeros(x.shape[:-1])
    if x.size:
        with np.errstate(all="ignore"):
            _dot_chunks(x, y, out)
    return out


def _dot_chunks(x: Array, y: Array, out: Array) -> None:
    """x, y (..., K), out (...): in chunks of the leading axis, as the operands may be broadcast views."""
    length, count = x.shape[-1], out.size
    step = _rows_per_chunk(length)
    if count <= step:
        out[...] = _dot_rows(x.reshape(count, length), y.reshape(count, length)).reshape(out.shape)
        return
    inner = count // len(out)
    if inner > step:
        for i in range(len(out)):
            _dot_chunks(x[i], y[i], out[i])
        return
    for i in range(0, len(out), step // inner):
        at = slice(i, i + step // inner)
        _dot_chunks(x[at], y[at], out[at])


def _last(x: ArrayLike, axis: int) -> Array:
    array = _float64(x)
    if not -array.ndim <= axis < array.ndim:
        raise Invalid(f"the axis to sum over is {axis}, but the array has {array.ndim} axes.")
    return np.moveaxis(array, axis, -1)


def sum_(x: ArrayLike, axis: int = -1) -> Array:
    """x (..., K, ...)  ->  (...), correctly rounded; an empty or exactly zero sum is +0."""
    rows = _last(x, axis)
    shape, length = rows.shape[:-1], rows.shape[-1]
    flat = rows.reshape(math.prod(shape), length)
    out = np.zeros(len(flat))
    step = _rows_per_chunk(length)
    with np.errstate(all="ignore"):
        for i in range(0, len(flat) if length else 0, step):
            out[i : i + step] = _sum_rows(flat[i : i + step])
    return out.reshape(shape)


def _mean_rows(x: Array) -> Array:
    """x (P, K)  ->  (P,)"""
    count = float(x.shape[-1])
    size = _total(np.abs(x))
    hard = ~(size < HUGE)
    easy = np.where(hard[:, None], 0.0, x) if hard.any() else x
    pair = _accumulate(easy, _total, _spread)
    # (high + low) / count = quotient + (remainder + low) / count, where the remainder of a division is exact
    quotient = pair.high / count
    product, rest = two_prod(quotient, np.full_like(quotient, count))
    remainder = (pair.high - product) - rest
    correction = (remainder + pair.low) / count
    error = (pair.error / count + np.abs(correction) * 2.0**-50) * SLACK
    out, open_ = _decide(Pair(quotient, correction, error))
    # the remainder may have underflowed
    open_ |= (np.abs(quotient) < TINY_PRODUCT) & ((pair.high != 0) | (pair.error > 0))
    for i in np.flatnonzero(open_ & ~hard):
        out[i] = integers.exact_sum(x[i], x.shape[-1])
    if hard.any():
        _hard_rows(x, hard, x.shape[-1], out)
    return out


def mean(x: ArrayLike, axis: int = -1) -> Array:
    """x (..., K, ...)  ->  (...), the float64 nearest to the exact mean: one rounding."""
    rows = _last(x, axis)
    shape, length = rows.shape[:-1], rows.shape[-1]
    if length == 0:
        raise Invalid("the mean of 0 numbers was asked for, but it needs at least one.")
    flat = rows.reshape(math.prod(shape), length)
    out = np.zeros(len(flat))
    step = _rows_per_chunk(length)
    with np.errstate(all="ignore"):
        for i in range(0, len(flat), step):
            out[i : i + step] = _mean_rows(flat[i : i + step])
    return out.reshape(shape)


def segment_sum(x: ArrayLike, ids: ArrayLike, n: int) -> Array:
    """x (T, D), ids (T,)  ->  (n, D), row g the correctly rounded sum of the rows of x whose id is g."""
    rows, which = _float64(x), np.asarray(ids)
    if rows.ndim != 2 or which.shape != rows.shape[:1]:
        raise Invalid(
            f"segment_sum was given x {rows.shape} and ids {which.shape}, but needs (T, D) and (T,)."
        )
    out = np.zeros((n, rows.shape[1]))
    if which.size == 0 or rows.shape[1] == 0:
        return out
    if which.dtype.kind not in "iu" or which.min() < 0 or which.max() >= n:
        raise Invalid(f"segment_sum needs integer ids from 0 to {n - 1}, and was given others.")
    order = np.argsort(which, kind="stable")
    present, first, group = np.unique(which[order], return_index=True, return_inverse=True)
    step = _rows_per_chunk(len(order))
    with np.errstate(all="ignore"):
        for d in range(0, rows.shape[1], step):
            out[present, d : d + step] = _sum_groups(rows[order, d : d + step], first, group)
    return out


def _sum_groups(x: Array, first: NDArray[np.intp], group: NDArray[np.intp]) -> Array:
    """x (T, D) sorted by group (T,), whose first rows are first (n,)  ->  (n, D)"""

    def total(x: Array) -> Array:
        return np.add.reduceat(x, first, axis=0)

    def spread(x: Array) -> Array:
        return x[group]

    hard = ~(total(np.abs(x)) < HUGE)
    easy = np.where(hard[group], 0.0, x) if hard.any() else x
    out, open_ = _decide(_accumulate(easy, total, spread))
    for g, d in np.argwhere(open_ | hard):
        part = x[group == g, d]
        out[g, d] = integers.exact_sum(part) if np.isfinite(part).all() else _special_sum(part[None])[0]
    return out
