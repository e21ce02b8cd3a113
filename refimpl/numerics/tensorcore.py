"""Matrix instructions of Hopper tensor cores, bit for bit.  SPEC TENSOR-1 to TENSOR-4.

TENSOR-1, one step.  d = c + sum_i a_i b_i over the products of one instruction is not a sequence of rounded
additions, but one fused sum, whatever the order of the products:

    1  An operand is (-1)^s m 2^e with 1 <= m < 2, or m < 1 and the smallest e (it is not normalised).
    2  Product i has the significand m_a m_b in [0, 4) and the exponent E_i = e_a + e_b.
    3  c has its float32 exponent E_c, at least -126.
    4  Emax is the largest of the E_i and E_c, but not below `lowest`.  What is zero does not take part.
    5  Products and c are cut, toward zero, to multiples of 2^(Emax - fraction).
    6  The cut addends are added exactly.
    7  The sum is cut, toward zero, to `kept` fraction bits; below 2^-126 to multiples of 2^-149; what
       reaches 2^128 is infinite.  A zero is +0.

If an operand or c is NaN, infinity meets zero in a product, or infinities of both signs meet in the sum, d
is the NaN 0x7fffffff; else an infinite product or c is d.

TENSOR-2, the units.     products   fraction   kept   lowest
    QGMMA (wgmma on FP8)       32         13     13        -     E4M3 and E5M2 in any mix
    HGMMA, HMMA (wgmma, mma)   16         25     23     -133     BF16 or FP16

TENSOR-3, chains.  Instructions on the same accumulator follow one another in the order of K, and nothing
wider than d is kept between them.

TENSOR-4, FP8 through mma.sync, which Hopper lacks.  The compiler unpacks 32 of K to FP16 and runs two HMMA
steps from zero, first over the k with k mod 4 in {0, 1}, then over the rest; d = RN(h + c) in float32.

How it is fast.  Products of FP8 are exact in float32, those of 16-bit formats in float64, and so is every
partial sum of step 6.  Emax comes from a product of matrices: with the operands' 2^(digit e) for their
values (zero for zero), sum_i 2^(digit E_i) is a number in base 2^digit, each of whose digits has room for
all products of a step, so that its leading digit is at Emax.  K is the outermost axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refimpl.errors import Invalid
from refimpl.numerics.float32 import Single, canonical
from refimpl.numerics.formats import FORMATS, Format, decode

Array = NDArray[np.float64]
Codes = NDArray[np.unsignedinteger]
P = TypeVar("P")
Decode = Callable[[Codes], P]

FP8 = ("e4m3", "e5m2")
PANEL = 512  # of K that are decoded at a time
COLUMNS = 256  # of a tile of the result: a long inner loop
TILE = 4096  # elements of a tile: the products of one step then stay in cache

_ORIGIN = 151  # added to exponents, so that all powers below are normal float64 for all formats


@dataclass(frozen=True)
class Unit:
    """A row of the table of TENSOR-2, and how it is evaluated."""

    products: int
    fraction: int
    kept: int
    lowest: int  # for FP8 that of c, which nothing can be below
    digit: int  # 2^digit > products
    carrier: type[np.float32] | type[np.float64]  # holds the products
    scales: tuple[float, float]  # 2^(fraction - Emax) is between these if c is finite and a product not zero


QGMMA = Unit(32, 13, 13, -126, 7, np.float32, (2.0 ** (13 - 127), 2.0 ** (13 + 28)))
HMMA = Unit(16, 25, 23, -133, 5, np.float64, (2.0 ** (25 - 254), 2.0 ** (25 + 133)))

# k mod 32 in the order in which the unpacked FP8 operands of mma.sync are multiplied
UNPACKED = np.array(sorted(range(32), key=lambda k: (k % 4 >= 2, k)))


def wgmma_fp8(
    a: Codes, b: Codes, c: ArrayLike | None = None, a_format: str = "e4m3", b_format: str = "e4m3"
) -> Single:
    """a (M, K), b (N, K) FP8 codes, c (M, N) float32  ->  float32 (M, N): c + a b^T by wgmma k32.

    K is a multiple of 32; without c the chain starts from zero.  SPEC TENSOR-1 to TENSOR-3.  Raises Invalid.
    """
    return _multiply(a, b, c, fp8(a_format, "a_format"), fp8(b_format, "b_format"), QGMMA)


def wgmma_bf16(a: Codes, b: Codes, c: ArrayLike | None = None) -> Single:
    """a (M, K), b (N, K) BF16 codes, c (M, N) float32  ->  float32 (M, N), by wgmma k16.  Raises Invalid."""
    return _multiply(a, b, c, FORMATS["bf16"], FORMATS["bf16"], HMMA)


def wgmma_fp16(a: Codes, b: Codes, c: ArrayLike | None = None) -> Single:
    """a (M, K), b (N, K) FP16 codes, c (M, N) float32  ->  float32 (M, N), by wgmma k16.  Raises Invalid."""
    return _multiply(a, b, c, FORMATS["fp16"], FORMATS["fp16"], HMMA)


# mma.sync m16n8k16 computes what wgmma computes.
mma_bf16 = wgmma_bf16
mma_fp16 = wgmma_fp16


def mma_fp8(
    a: Codes, b: Codes, c: ArrayLike | None = None, a_format: str = "e4m3", b_format: str = "e4m3"
) -> Single:
    """a (M, K), b (N, K) FP8 codes, c (M, N) float32  ->  float32 (M, N), by mma.sync k32 as Hopper runs it.

    K is a multiple of 32.  SPEC TENSOR-4.  Raises Invalid.
    """
    fa, fb = fp8(a_format, "a_format"), fp8(b_format, "b_format")
    out = _accumulator(a, b, c, fa, fb, 32)
    decode_a, decode_b = partial(unpacked, fmt=fa), partial(unpacked, fmt=fb)
    with np.errstate(all="ignore"):
        for rows, columns, _, pa, pb in decoded(a, b, decode_a, decode_b, 32):
            out[rows, columns] += chain(pa, pb, None, HMMA)
    return canonical(out)


@dataclass(frozen=True)
class Panel:
    """Rows of an operand, decoded, with K outermost."""

    values: NDArray[Any]  # (K, R) in the unit's carrier
    powers: Array  # (K, R): 2^(digit e), and zero for zero


def values(codes: Codes, fmt: Format) -> Array:
    """codes (...)  ->  float64 (...), by a table."""
    return _tables(fmt, HMMA)[0].take(codes)


def panel(codes: Codes, fmt: Format, unit: Unit) -> Panel:
    """codes (R, K)  ->  the operand of `chain`."""
    values, powers = _tables(fmt, unit)
    index = np.ascontiguousarray(codes.T)
    return Panel(values.take(index), powers.take(index))


def unpacked(codes: Codes, fmt: Format) -> Panel:
    """codes (R, K) of FP8  ->  the operand of `chain` as mma.sync takes it.  SPEC TENSOR-4."""
    k = codes.shape[1]
    order = (np.arange(0, k, 32)[:, None] + UNPACKED).reshape(k)
    return panel(codes[:, order], fmt, HMMA)


def chain(a: Panel, b: Panel, c: Single | None, unit: Unit) -> Single:
    """a (K, M), b (K, N), c (M, N)  ->  float32 (M, N); NaN are any NaN.  SPEC TENSOR-3."""
    (k, m), n = a.values.shape, b.values.shape[1]
    room = np.empty((unit.products, m, n), unit.carrier)
    with np.errstate(all="ignore"):
        d = np.zeros((m, n)) if c is None else c.astype(np.float64)
        for at in range(0, k, unit.products):
            now = slice(at, at + unit.products)
            np.einsum("km,kn->kmn", a.values[now], b.values[now], out=room)
            d = _step(room, np.matmul(a.powers[now].T, b.powers[now]), d, unit)
        d += 0.0  # no negative zero
        return d.astype(np.float32)


def _step(products: NDArray[Any], power: Array, c: Array, unit: Unit) -> Array:
    """products (K, M, N), which are overwritten, power = sum 2^(digit E_i), c (M, N)  ->  d (M, N)."""
    emax = power.view(np.int64) >> 52
    emax //= unit.digit
    np.maximum(emax, _exponent(c, unit), out=emax)
    np.maximum(emax, _ORIGIN + unit.lowest, out=emax)
    field = (1023 + unit.fraction + _ORIGIN) - emax
    field <<= 52
    scale = field.view(np.float64)  # 2^(fraction - Emax): the addends become integers and a rest
    # Where all products are zero the scale may be more than float32 holds, where c is infinite less; neither
    # may make NaN of the products.
    least, most = unit.scales
    products *= np.maximum(np.minimum(scale, most), least).astype(unit.carrier)
    np.trunc(products, out=products)
    d = c * scale
    np.trunc(d, out=d)
    d += np.add.reduce(products, axis=0)
    np.subtract(2046 << 52, field, out=field)
    d *= scale  # which is now 2^(Emax - fraction)
    bits = d.view(np.int64)
    bits &= -1 << 52 - unit.kept
    if unit.lowest - unit.fraction < -149:  # else the sums have no bits below, and products are too small
        _fit(d)
    return d


def _exponent(c: Array, unit: Unit) -> NDArray[np.int64]:
    exponent = c.view(np.int64) >> 52
    exponent &= 0x7FF
    exponent -= 1023 - _ORIGIN
    if unit.lowest < -126:  # else all exponents are about to be raised to -126 anyway
        np.maximum(exponent, _ORIGIN - 126, out=exponent, where=c != 0)
    return exponent


def _fit(d: Array) -> None:
    """Cuts what is below the normal float32 values, and makes infinite what is above them."""
    size = np.abs(d)
    small = size < 2.0**-126
    if small.any():
        d[small] = np.trunc(d[small] * 2.0**149) * 2.0**-149
    large = size >= 2.0**128
    if large.any():
        d[large] *= np.inf


@cache
def _tables(fmt: Format, unit: Unit) -> tuple[NDArray[Any], Array]:
    """Of every code of a format: its value, and 2^(digit e) times what `_ORIGIN` needs of one operand."""
    value = decode(np.arange(1 << fmt.bits), fmt)
    special = ~np.isfinite(value)
    exponent = np.frexp(np.where(special, 0, value))[1] - 1
    exponent = np.maximum(exponent, fmt.smallest_exponent)
    exponent[special] = fmt.smallest_exponent + (1 << fmt.exponent_bits) - 2
    half, rest = divmod(unit.digit * _ORIGIN - 1023, 2)
    assert rest == 0
    power = np.where(value == 0, 0.0, np.ldexp(1.0, unit.digit * exponent + half))
    with np.errstate(invalid="ignore"):
        return value.astype(unit.carrier), power


def _multiply(a: Codes, b: Codes, c: ArrayLike | None, fa: Format, fb: Format, unit: Unit) -> Single:
    out = _accumulator(a, b, c, fa, fb, unit.products)
    decode_a, decode_b = partial(panel, fmt=fa, unit=unit), partial(panel, fmt=fb, unit=unit)
    for rows, columns, _, pa, pb in decoded(a, b, decode_a, decode_b, PANEL):
        out[rows, columns] = chain(pa, pb, out[rows, columns], unit)
    return canonical(out)


def decoded(
    a: Codes, b: Codes, decode_a: Decode[P], decode_b: Decode[P], depth: int, height: int = 0
) -> Iterator[tuple[slice, slice, slice, P, P]]:
    """The tiles of a b^T: rows, columns and part of K, and the two operands decoded.

    K ascends for every element.  Rows are innermost, so that b is decoded once.
    """
    (m, k), n = a.shape, b.shape[0]
    width = max(1, min(n, COLUMNS))
    height = height or TILE // width
    for j in range(0, n, width):
        for at in range(0, k, depth):
            columns, part = slice(j, j + width), slice(at, at + depth)
            pb = decode_b(b[columns, part])
            for i in range(0, m, height):
                rows = slice(i, i + height)
                yield rows, columns, part, decode_a(a[rows, part]), pb


def fp8(name: str, argument: str) -> Format:
    """The FP8 format of a name.  Raises Invalid."""
    if name not in FP8:
        raise Invalid(f"{argument} is {name!r}, but it must be e4m3 or e5m2.")
    return FORMATS[name]


def check_operands(a: Codes, b: Codes, a_format: Format, b_format: Format, step: int) -> tuple[int, int, int]:
    """a (M, K) and b (N, K), codes with K a multiple of `step`  ->  (M, N, K).  Raises Invalid."""
    for name, codes, fmt in (("a", a, a_format), ("b", b, b_format)):
        found = getattr(codes, "dtype", type(codes).__name__)
        if found != fmt.code_type:
            raise Invalid(
                f"{name} holds {found}, but codes of {fmt.name} must be an array of {fmt.code_type}."
            )
        if codes.ndim != 2:
            raise Invalid(f"{name} has the shape {codes.shape}, but it must have two axes, rows and K.")
    if a.shape[1] != b.shape[1]:
        raise Invalid(f"a has K = {a.shape[1]} and b has K = {b.shape[1]}, but they must be the same.")
    if a.shape[1] == 0 or a.shape[1] % step:
        raise Invalid(f"K of a and b is {a.shape[1]}, but it must be a positive multiple of {step}.")
    return a.shape[0], b.shape[0], a.shape[1]


def _accumulator(a: Codes, b: Codes, c: ArrayLike | None, fa: Format, fb: Format, step: int) -> Single:
    m, n, _ = check_operands(a, b, fa, fb, step)
    if c is None:
        return np.zeros((m, n), np.float32)
    c = np.asarray(c)
    if c.dtype != np.float32:
        raise Invalid(f"c holds {c.dtype}, but the accumulator must be float32.")
    if c.shape != (m, n):
        raise Invalid(f"c has the shape {c.shape}, but for these a and b it must be {(m, n)}.")
    return c.copy()
