"""Matrix products as other units might compute them, to tell them apart.  SPEC TENSOR-5.

Each variant changes one thing of the step of TENSOR-1: how many products it adds, where addends are cut and
whether they are cut or rounded, what the result keeps, which exponents count.  They are small and plain, made
for fingerprints; nothing else uses them.  Finite operands only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from refimpl.numerics.float32 import Single, fma
from refimpl.numerics.formats import FP16, FP32, Format, decode, round_to
from refimpl.numerics.summation import sum_

Array = NDArray[np.float64]
Codes = NDArray[np.unsignedinteger]

_NONE = -(1 << 20)  # an exponent below all others


@dataclass(frozen=True)
class Variant:
    """A step that differs from the hardware's."""

    name: str
    text: str
    products: int
    fraction: int
    kept: int
    lowest: int | None = None
    align: str = "zero"  # addends are cut, or rounded to nearest
    store: str = "zero"  # so is the result
    normalised: bool = False  # exponents of products whose significand is in [1, 2)
    zeros: bool = False  # products that are zero count, with the exponents of their operands
    fused: bool = True  # c is an addend; else it is added to the sum in float32
    flush: bool = False  # subnormal operands are zero
    half: bool = False  # the accumulator is FP16


def multiply(a: Codes, b: Codes, c: Single, fa: Format, fb: Format, v: Variant) -> Single:
    """a (M, K), b (N, K), c (M, N)  ->  float32 (M, N), in steps of the variant."""
    (x, ex), (y, ey) = _operand(a, fa, v), _operand(b, fb, v)
    d = c.astype(np.float64)
    for at in range(0, a.shape[1], v.products):
        now = slice(at, at + v.products)
        p = x[:, None, now] * y[None, :, now]  # exact
        exponents = ex[:, None, now] + ey[None, :, now]
        if v.normalised:
            exponents = np.frexp(p)[1] - 1
        d = _step(p, exponents if v.zeros else np.where(p == 0, _NONE, exponents), d, v)
    return d.astype(np.float32)


def sequential(a: Codes, b: Codes, c: Single, fa: Format, fb: Format) -> Single:
    """One fused multiply-add in float32 after the other, in the order of K."""
    x, y, d = decode(a, fa).astype(np.float32), decode(b, fb).astype(np.float32), c
    for k in range(a.shape[1]):
        d = fma(x[:, k, None], y[None, :, k], d)
    return d


def wide(a: Codes, b: Codes, c: Single, fa: Format, fb: Format) -> Single:
    """The exact sum over all of K, rounded to float64 and then to float32."""
    p = decode(a, fa)[:, None, :] * decode(b, fb)[None, :, :]
    return sum_(np.concatenate([p, c[..., None].astype(np.float64)], -1)).astype(np.float32)


def variants(base: Variant, changes: dict[str, tuple[str, dict[str, object]]]) -> tuple[Variant, ...]:
    """Rows that differ from `base` in some fields: name -> (text, fields)."""
    return tuple(replace(base, name=name, text=text, **fields) for name, (text, fields) in changes.items())  # type: ignore[arg-type]


def _operand(codes: Codes, fmt: Format, v: Variant) -> tuple[Array, NDArray[np.int64]]:
    value = decode(codes, fmt)
    if v.flush:
        value = np.where(np.abs(value) < fmt.smallest_normal, 0.0, value)
    exponent = np.maximum(np.frexp(value)[1] - 1, fmt.smallest_exponent)
    return value, np.where(value == 0, fmt.smallest_exponent, exponent).astype(np.int64)


def _step(p: Array, exponents: NDArray[np.int64], c: Array, v: Variant) -> Array:
    own = np.where(c == 0, _NONE, np.maximum(np.frexp(c)[1] - 1, -126))
    emax = exponents.max(-1)
    emax = np.maximum(emax, own) if v.fused else emax
    emax = emax if v.lowest is None else np.maximum(emax, v.lowest)
    shift = np.where(emax == _NONE, 0, v.fraction - emax)
    cut = np.trunc if v.align == "zero" else np.rint
    total = cut(np.ldexp(p, shift[..., None])).sum(-1)  # integers: exact
    if v.fused:
        total = total + cut(np.ldexp(c, shift))
    fmt = FP16 if v.half else replace(FP32, fraction_bits=v.kept)
    d = round_to(np.ldexp(total, -shift), fmt, v.store) + 0.0
    return d if v.fused else (c.astype(np.float32) + d.astype(np.float32)).astype(np.float64)
