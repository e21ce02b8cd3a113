"""The plain twin of `tensorcore` and `gemm`: one element at a time, in integers.  SPEC TENSOR-1, GEMM-1.

It is for reading and for tests: slow, without arrays or tricks, and it shares nothing with the fast forms
but the numbers of the tables.  Codes and float32 are given by their bits; NaN and infinities, once decoded,
are Python floats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from refimpl.numerics.formats import FORMATS, Format
from refimpl.numerics.tensorcore import HMMA, QGMMA, UNPACKED, Unit

NAN_BITS = 0x7FFFFFFF
ONE_BITS = 0x3F800000
FP32 = FORMATS["fp32"]


def parts(code: int, fmt: Format) -> tuple[int, int, int] | float:
    """(sign, m 2^fraction_bits, e) of a code: step 1.  NaN and infinity as floats."""
    sign, field = divmod(code, 1 << fmt.bits - 1)
    exponent, m = divmod(field, 1 << fmt.fraction_bits)
    highest = (1 << fmt.exponent_bits) - 1
    if fmt.kind == "fn" and field == (1 << fmt.bits - 1) - 1:
        return math.nan
    if fmt.kind == "ieee" and exponent == highest:
        return math.nan if m else math.copysign(math.inf, -sign or 1)
    if exponent:
        return sign, m + (1 << fmt.fraction_bits), fmt.smallest_exponent + exponent - 1
    return sign, m, fmt.smallest_exponent


def step(a: Sequence[int], b: Sequence[int], c: int, fa: Format, fb: Format, unit: Unit) -> int:
    """One instruction, of one element: codes a and b (products,), float32 bits c  ->  float32 bits."""
    # 1. Decode the operands.
    left, right, accumulator = [parts(x, fa) for x in a], [parts(x, fb) for x in b], parts(c, FP32)
    infinite = _special([*zip(left, right, strict=True)], accumulator)
    if infinite is not None:
        return infinite

    # 2, 3. Addends: sign, significand (as an integer), its fraction bits, exponent.
    addends = []
    for x, y in zip(left, right, strict=True):
        assert isinstance(x, tuple)
        assert isinstance(y, tuple)
        addends.append((x[0] ^ y[0], x[1] * y[1], fa.fraction_bits + fb.fraction_bits, x[2] + y[2]))
    assert isinstance(accumulator, tuple)
    addends.append((accumulator[0], accumulator[1], FP32.fraction_bits, accumulator[2]))

    # 4. The largest exponent of what is not zero.
    exponents = [e for _, m, _, e in addends if m]
    if not exponents:
        return 0
    emax = max(exponents)
    if unit is HMMA:
        emax = max(emax, unit.lowest)

    # 5, 6. Cut every addend toward zero to a multiple of 2^(emax - fraction), and add.
    total = 0
    for sign, m, bits, e in addends:
        shift = e - bits - (emax - unit.fraction)
        cut = m << shift if shift >= 0 else m >> -shift
        total += -cut if sign else cut

    # 7. Cut the sum toward zero.
    return cut_to_float32(total, emax - unit.fraction, unit.kept)


def cut_to_float32(n: int, exponent: int, kept: int) -> int:
    """n 2^exponent  ->  bits of a float32 with at most `kept` fraction bits, toward zero; a zero is +0."""
    size = abs(n)
    if size == 0:
        return 0
    leading = size.bit_length() - 1 + exponent
    if leading > 127:
        return _infinity(n < 0)
    drop = max(leading - kept, -149) - exponent  # bits below the last that is kept
    if drop > 0:
        size, exponent = size >> drop, exponent + drop
        if size == 0:
            return 0
    return float32_bits(Fraction(-size if n < 0 else size) * Fraction(2) ** exponent)


def chain(a: Sequence[int], b: Sequence[int], c: int, fa: Format, fb: Format, unit: Unit) -> int:
    """Consecutive instructions on one element: codes a and b (K,), float32 bits c  ->  float32 bits."""
    for at in range(0, len(a), unit.products):
        c = step(a[at : at + unit.products], b[at : at + unit.products], c, fa, fb, unit)
    return c


def mma_fp8(a: Sequence[int], b: Sequence[int], c: int, fa: Format, fb: Format) -> int:
    """TENSOR-4 for one element; K is a multiple of 32."""
    for at in range(0, len(a), 32):
        order = [at + int(k) for k in UNPACKED]
        h = chain([a[k] for k in order], [b[k] for k in order], 0, fa, fb, HMMA)
        c = fma(h, ONE_BITS, c)
    return c


def gemm(a: Sequence[int], sa: Sequence[int], b: Sequence[int], sb: Sequence[int], kernel: str) -> int:
    """GEMM-1 for one element: E4M3 codes a and b (K,), bits of the scales (K/128,)  ->  float32 bits."""
    acc, e4m3 = 0, FORMATS["e4m3"]
    for block, (left, right) in enumerate(zip(sa, sb, strict=True)):
        order = list(range(128 * block, 128 * block + 128))
        if kernel == "triton_mma":
            order = [at + int(k) for at in order[::32] for k in UNPACKED]
        unit = HMMA if kernel == "triton_mma" else QGMMA
        p = chain([a[k] for k in order], [b[k] for k in order], 0, e4m3, e4m3, unit)
        factors = (product(left, right), p) if kernel == "deepgemm" else (product(p, left), right)
        acc = fma(*factors, acc)
    return acc


def unpromoted(a: Sequence[int], sa: Sequence[int], b: Sequence[int], sb: Sequence[int]) -> int:
    """GEMM-1's kernel of that name for one element, arguments as of `gemm`."""
    acc, unit, e4m3 = 0, 0, FORMATS["e4m3"]
    for block, (left, right) in enumerate(zip(sa, sb, strict=True)):
        part, scale = slice(128 * block, 128 * block + 128), product(left, right)
        if scale & 0x7FFFFFFF:
            acc, unit = chain(a[part], b[part], in_units(acc, unit, scale), e4m3, e4m3, QGMMA), scale
        else:
            acc = fma(scale, chain(a[part], b[part], 0, e4m3, e4m3, QGMMA), acc)
    return fma(acc, unit, 0)


def in_units(acc: int, old: int, new: int) -> int:
    """acc old / new, cut toward zero to the fraction bits that QGMMA keeps; new is not zero."""
    if old == new:
        return acc
    u, v, w = number(acc), number(old), number(new)
    if isinstance(u, float) or isinstance(v, float) or isinstance(w, float):
        quotient = float(u) * float(v) / float(w)
        if quotient == 0:
            return 0
        return NAN_BITS if math.isnan(quotient) else _infinity(quotient < 0)
    return cut_to_float32(int(u * v / w * 2**200), -200, QGMMA.kept)


def product(x: int, y: int) -> int:
    """RN(x y) on bits of float32."""
    return fma(x, y, 1 << 31)  # -0, which leaves the sign of a product that is zero


def fma(x: int, y: int, z: int) -> int:
    """RN(x y + z) on bits of float32, NaN as 0x7fffffff.  SPEC SINGLE-2."""
    u, v, w = number(x), number(y), number(z)
    if isinstance(u, float) or isinstance(v, float) or isinstance(w, float):
        total = float(u) * float(v) + float(w)  # only which of NaN and the infinities it is matters
        return NAN_BITS if math.isnan(total) else _infinity(total < 0)
    exact = u * v + w
    if exact:
        return float32_bits(exact)
    # Only a sum of two zeros with the sign - is -0.
    return ((x ^ y) & z & 1 << 31) if u * v == 0 else 0


def number(bits: int) -> Fraction | float:
    """The value of a float32; a float only if it is NaN or infinite."""
    found = parts(bits, FP32)
    if isinstance(found, float):
        return found
    sign, m, e = found
    return Fraction(-m if sign else m) * Fraction(2) ** (e - FP32.fraction_bits)


def float32_bits(x: Fraction) -> int:
    """Bits of the float32 nearest to x, ties to even; x is not zero."""
    sign, size = (1 << 31 if x < 0 else 0), abs(x)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent  # 2^exponent <= size < 2^(exponent + 1)
    exponent = max(exponent, -126)
    scaled = size * Fraction(2) ** (23 - exponent)
    n = round(scaled)  # ties to even
    # A leading 1 adds one to the exponent field; so does a carry to the next power of two.
    bits = n + (exponent + 126 << 23)
    return sign | min(bits, 0x7F800000)


def _special(products: Sequence[tuple[object, object]], c: object) -> int | None:
    """The result if NaN or infinities take part: NaN, or the only infinity."""
    terms = [c if isinstance(c, float) else 0.0]
    for x, y in products:
        if isinstance(x, float) or isinstance(y, float):
            terms.append(_sign_or_special(x) * _sign_or_special(y))
    if all(math.isfinite(t) for t in terms):
        return None
    total = sum(terms)
    return NAN_BITS if math.isnan(total) else _infinity(total < 0)


def _sign_or_special(x: object) -> float:
    if isinstance(x, float):
        return x
    assert isinstance(x, tuple)
    return math.copysign(1.0 if x[1] else 0.0, -x[0] or 1)


def _infinity(minus: bool) -> int:
    return 0xFF800000 if minus else 0x7F800000
