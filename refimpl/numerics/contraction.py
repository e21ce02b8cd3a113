"""Correctly rounded contractions.  SPEC EXACT-1.

contract(a, b)[m, n] = RN(sum_k a[m, k] b[n, k]): the float64 nearest to the exact sum of exact products,
ties to even.

With the slices of `slicing`, head x head and head x middle are exact on BLAS; the products of lower order
are computed in float64 with the error bound below; if every number within it rounds to the same float64,
that is the result, and the few other elements are computed exactly.  So the bits depend on the mathematics
only: not on BLAS, threads, blocking, or the other rows.

With d = 2^(s-26) (see `slicing`), in units of 2^(ea+eb), which bounds the product of the norms of two rows:
lower order  = middle x (middle + tail) + head x tail + tail x all   <= 6 d^2,
its rounding <= 2^-53 (K + 16) 6 d^2,  and that of the final sums <= 2^-53 2^-48.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refimpl.errors import Invalid
from refimpl.numerics.eft import Array, two_sum
from refimpl.numerics.slicing import Columns, Frame, Ints, Prepared, Room, Slices, prepare, spread_bits
from refimpl.numerics.summation import dot, mean, segment_sum, sum_

__all__ = ["Prepared", "contract", "dot", "mean", "prepare", "segment_sum", "sum_"]

BLOCK = 1 << 22  # elements of a block of an operand, 32 MiB; a block of a result has a quarter
SMALL = 1 << 14  # elements of two matrices below which cutting them together saves time
LONG = 1 << 14  # longer rows are contracted in pieces, as the error bound grows faster than their length
NORMAL = 2.0**-1022


def contract(a: ArrayLike | Prepared, b: ArrayLike | Prepared) -> Array:
    """a (..., M, K), b (..., N, K)  ->  (..., M, N), correctly rounded."""
    pa, pb = prepare(a), prepare(b)
    if pa.shape[:-2] != pb.shape[:-2] or pa.shape[-1] != pb.shape[-1]:
        raise Invalid(
            f"operands of shape {pa.shape} and {pb.shape} do not contract: all but axis -2 must agree."
        )
    m, n, k = pa.shape[-2], pb.shape[-2], pa.shape[-1]
    out = np.zeros((*pa.shape[:-2], m, n))
    if out.size and k:
        with np.errstate(all="ignore"):
            if not (isinstance(a, Prepared) or isinstance(b, Prepared)) and (m + n) * k <= SMALL:
                pa, pb = _together(pa, pb)
            if max(pa.value.size, pb.value.size, 4 * out.size) <= BLOCK:
                _block(pa, pb, out)
            elif out.ndim == 2:
                rooms = [None if isinstance(x, Prepared) else Room() for x in (a, b)]
                _matrix(pa, pb, out, rooms[0], rooms[1])
            else:
                _stack(pa.value.reshape(-1, m, k), pb.value.reshape(-1, n, k), out.reshape(-1, m, n))
    return out


def _together(a: Prepared, b: Prepared) -> tuple[Prepared, Prepared]:
    # half as many calls of NumPy
    m = a.shape[-2]
    both = Prepared(np.concatenate([a.value, b.value], axis=-2))
    both.cut()
    return both.rows(slice(0, m)), both.rows(slice(m, None))


def _matrix(a: Prepared, b: Prepared, out: Array, room_a: Room | None, room_b: Room | None) -> None:
    """Fills out (M, N) in blocks that bound the temporaries."""
    step = max(1, min(BLOCK // min(a.shape[-1], LONG), math.isqrt(BLOCK // 4)))
    for i in range(0, a.shape[0], step):
        rows = a.block(i, i + step, room_a)
        for j in range(0, b.shape[0], step):
            _block(rows, b.block(j, j + step, room_b), out[i : i + step, j : j + step])


def _stack(a: Array, b: Array, out: Array) -> None:
    """Fills out (P, M, N), several matrices at a time."""
    step = BLOCK // max(a[0].size, b[0].size, 4 * out[0].size)
    for i in range(0, len(out), max(1, step)):
        if step:
            at = slice(i, i + step)
            _block(Prepared(a[at]), Prepared(b[at]), out[at])
        else:
            _matrix(Prepared(a[i]), Prepared(b[i]), out[i], Room(), Room())


def _block(a: Prepared, b: Prepared, out: Array) -> None:
    if a.shape[-1] <= LONG:
        _short(a, b, out)
    elif not _long(a.value, b.value, out):
        step = max(1, BLOCK // a.shape[-1]) if out.ndim == 2 else max(out.shape)
        for i in range(0, a.shape[-2], step):
            for j in range(0, b.shape[-2], step):
                at = slice(i, i + step), slice(j, j + step)
                _short(a.rows(at[0]), b.rows(at[1]), out[(..., *at)])


def _long(a: Array, b: Array, out: Array) -> bool:
    """Adds up pieces of K, with the rounding of every sum in the bound; returns whether it could."""
    high, low, error = np.zeros(out.shape), np.zeros(out.shape), np.zeros(out.shape)
    for i in range(0, a.shape[-1], LONG):
        at = slice(i, i + LONG)
        pa, pb = Prepared(a[..., at]), Prepared(b[..., at])
        fa, fb = pa.frame, pb.frame
        if any(f.shift is not None or f.special is not None or f.lossy for f in (fa, fb)):
            return False
        sa, sb = pa.slices, pb.slices
        for term in (_times(sa.head, sb.head), _cross(sa, sb)):
            if term is not None:
                high, rest = two_sum(high, term)
                low += rest
                error += np.abs(low) * 2.0**-52
        rough = _low(fa, sa, fb, sb)
        if rough is not None:
            low += rough
            error += np.abs(low) * 2.0**-52
        if sa.middle is not None or sb.middle is not None:
            error += _error(fa, fb)
    error = (error + np.abs(low) * 2.0**-52) * (1.0 + 2.0**-20)
    above = high + (low + error)
    np.add(above, 0.0, out=out)
    open_ = above != high + (low - error)
    if open_.any():
        _decide_exactly(a, b, np.nonzero(open_), out)
    return True


def _short(a: Prepared, b: Prepared, out: Array) -> None:
    fa, fb = a.frame, b.frame
    rounded, open_ = _product(fa, a.slices, fb, b.slices)
    if fa.shift is not None or fb.shift is not None:
        scaled = np.ldexp(rounded, _outer_sum(fa.shift, fb.shift))
        below = (np.abs(scaled) < NORMAL) & (rounded != 0)  # subnormal: would be rounded twice
        open_ = below if open_ is None else open_ | below
        rounded = scaled
    np.add(rounded, 0.0, out=out)  # an exact zero is +0
    if fa.special is not None or fb.special is not None:
        special = _fill_special(a, b, out)
        open_ = None if open_ is None else open_ & ~special
    if open_ is not None and open_.any():
        _decide_exactly(a.value, b.value, np.nonzero(open_), out)


def _outer_sum(shift_a: Ints | None, shift_b: Ints | None) -> Ints:
    rows = 0 if shift_a is None else shift_a[..., :, None]
    columns = 0 if shift_b is None else shift_b[..., None, :]
    return np.asarray(rows + columns)


def _product(fa: Frame, sa: Slices, fb: Frame, sb: Slices) -> tuple[Array, NDArray[np.bool_] | None]:
    """(..., M, N) rounded, and where that is not certain (None: nowhere)"""
    first = _times(sa.head, sb.head)
    lossy = fa.lossy or fb.lossy
    if sa.middle is None and sb.middle is None and not lossy:
        return first, None
    cross, low = _cross(sa, sb), _low(fa, sa, fb, sb)
    exact = sa.tail is None and sb.tail is None and not lossy  # middle x middle is exact, as head x head is
    if exact and cross is not None and low is None:
        return first + cross, None
    error = _error(fa, fb)
    if cross is None:
        above, below = first + error, first - error
    else:
        high, rest = two_sum(first, cross)
        if low is not None:
            rest += low
        above = rest + error
        above += high
        below = np.subtract(rest, error, out=error)
        below += high
    open_ = above != below
    if exact and low is not None and cross is not None:
        at = np.nonzero(open_)
        above[at] = sum_(np.stack([first[at], cross[at], low[at]], axis=-1))
        return above, None
    return above, open_


def _error(fa: Frame, fb: Frame) -> Array:
    """The bound of the module's docstring, (..., M, N)."""
    k = fa.x.shape[-1]
    d = 2.0 ** (spread_bits(k) - 26)
    scale = 2.0**-53 * ((k + 16) * 6 * d * d + 2.0**-48)
    bound: Array = np.ldexp(scale, fa.exponent)[..., :, None] * np.ldexp(1.0, fb.exponent)[..., None, :]
    return bound


def _times(a: Array, b: Array) -> Array:
    product: Array = np.matmul(a, b.swapaxes(-1, -2))
    return product


def _pick(x: Array, columns: Columns) -> Array:
    return x if columns is None else x[..., columns]


def _cross(sa: Slices, sb: Slices) -> Array | None:
    """head x middle + middle x head without rounding: multiples of one unit that stay below 2^53 of them"""
    total = None
    if sb.middle is not None:
        total = _times(_pick(sa.head, sb.columns), sb.middle)
    if sa.middle is not None:
        other = _times(sa.middle, _pick(sb.head, sa.columns))
        total = other if total is None else np.add(total, other, out=total)
    return total


def _low(fa: Frame, sa: Slices, fb: Frame, sb: Slices) -> Array | None:
    """middle x (middle + tail) + head x tail + tail x all, rounded as BLAS does"""
    total = None
    if sa.middle is not None and sb.middle is not None:
        total = _times(sa.middle, _pick(fb.x, sa.columns) - _pick(sb.head, sa.columns))
    if sb.tail is not None:
        other = _times(_pick(sa.head, sb.tail_columns), sb.tail)
        total = other if total is None else np.add(total, other, out=total)
    if sa.tail is not None:
        other = _times(sa.tail, _pick(fb.x, sa.tail_columns))
        total = other if total is None else np.add(total, other, out=total)
    return total


def _decide_exactly(a: Array, b: Array, at: tuple[NDArray[np.intp], ...], out: Array) -> None:
    step = max(1, BLOCK // 8 // a.shape[-1])
    for i in range(0, len(at[0]), step):
        part = tuple(index[i : i + step] for index in at)
        out[part] = dot(a[part[:-1]], b[(*part[:-2], part[-1])])


def _fill_special(a: Prepared, b: Prepared, out: Array) -> NDArray[np.bool_]:
    """Writes what IEEE gives wherever a row with NaN or infinities takes part; returns where."""
    none_a, none_b = np.zeros(a.shape[:-1], np.bool_), np.zeros(b.shape[:-1], np.bool_)
    special_a = none_a if a.frame.special is None else a.frame.special
    special_b = none_b if b.frame.special is None else b.frame.special
    special = special_a[..., :, None] | special_b[..., None, :]
    ones_a, ones_b = _Signs.of(a.value), _Signs.of(b.value)
    # numbers of products by kind: small integers, exact on BLAS
    plus = _count(ones_a.infinite_plus, ones_b.plus) + _count(ones_a.infinite_minus, ones_b.minus)
    plus += _count(ones_a.plus, ones_b.infinite_plus) + _count(ones_a.minus, ones_b.infinite_minus)
    minus = _count(ones_a.infinite_plus, ones_b.minus) + _count(ones_a.infinite_minus, ones_b.plus)
    minus += _count(ones_a.plus, ones_b.infinite_minus) + _count(ones_a.minus, ones_b.infinite_plus)
    nan = _count(ones_a.infinite_plus | ones_a.infinite_minus, ones_b.zero)
    nan += _count(ones_a.zero, ones_b.infinite_plus | ones_b.infinite_minus)
    nan += _count(ones_a.nan, np.ones(b.shape, np.bool_))
    nan += _count(np.ones(a.shape, np.bool_), ones_b.nan)
    value = np.where(plus > 0, np.inf, -np.inf)
    value[(nan > 0) | ((plus > 0) & (minus > 0))] = np.nan
    out[special] = value[special]
    return special


class _Signs(NamedTuple):
    plus: NDArray[np.bool_]
    minus: NDArray[np.bool_]
    zero: NDArray[np.bool_]
    infinite_plus: NDArray[np.bool_]
    infinite_minus: NDArray[np.bool_]
    nan: NDArray[np.bool_]  # (..., R, K)

    @classmethod
    def of(cls, x: Array) -> _Signs:
        infinite = np.isinf(x)
        return cls(x > 0, x < 0, x == 0, infinite & (x > 0), infinite & (x < 0), np.isnan(x))


def _count(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> Array:
    return _times(a.astype(np.float64), b.astype(np.float64))
