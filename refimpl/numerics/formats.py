"""Number formats: rounding to them, and their codes.  SPEC FORMAT-1 to FORMAT-3.

A format with f fraction bits and the smallest normal exponent e has the values

    +-(1 + m 2^-f) 2^E,  e <= E,   and   +-m 2^(e-f),   0 <= m < 2^f,        up to its largest value.

FORMAT-1, rounding.  round_to(x) is the value nearest to x, ties to the even m, straight from float64: one
rounding, never two (float64 -> float32 -> bf16 differs).  What would round above the largest value, if
exponents went on, becomes `overflow` with the sign of x.  A zero keeps its sign.

FORMAT-2, codes.  From the top: sign, E - e + 1 (zero for the values without the leading 1), m.

FORMAT-3, NaN.  A NaN rounds to NaN and is encoded as the format's positive quiet NaN; the codes above
infinity decode to NaN.  Payloads and signs of NaN carry nothing.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

_BLOCK = 8192  # values at a time, for the cache
_MAGNITUDE = np.int64(0x7FFF_FFFF_FFFF_FFFF)


@dataclass(frozen=True)
class Format:
    """A row of the table.  Codes are unsigned integers of `bits` bits, in the next wider integer type."""

    name: str
    exponent_bits: int
    fraction_bits: int
    smallest_exponent: int  # of normal values: the bias is 1 - this
    largest: float  # the largest finite value
    overflow: float  # what becomes of larger ones
    nan: int  # the code of NaN; codes between this format's infinity and the sign bit decode to NaN too

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 1 + self.exponent_bits + self.fraction_bits

    @property
    def smallest_normal(self) -> float:
        """The smallest positive value with a leading 1."""
        return math.ldexp(1.0, self.smallest_exponent)

    @property
    def smallest(self) -> float:
        """The smallest positive value, which is also the distance of the values below `smallest_normal`."""
        return math.ldexp(1.0, self.smallest_exponent - self.fraction_bits)

    @property
    def roundoff(self) -> float:
        """u: the largest relative error of rounding to a normal value."""
        return math.ldexp(1.0, -self.fraction_bits - 1)

    @property
    def code_type(self) -> np.dtype[np.unsignedinteger]:
        """The type of an array of codes."""
        return np.dtype(np.uint8 if self.bits <= 8 else np.uint16 if self.bits <= 16 else np.uint32)


FORMATS = {
    row.name: row
    for row in (
        # name, exponent bits, fraction bits, smallest exponent, largest value, overflow, NaN
        Format("fp32", 8, 23, -126, float.fromhex("0x1.fffffep+127"), math.inf, 0x7FC0_0000),
        Format("tf32", 8, 10, -126, float.fromhex("0x1.ffcp+127"), math.inf, 0x3_FE00),
        Format("bf16", 8, 7, -126, float.fromhex("0x1.fep+127"), math.inf, 0x7FC0),
        Format("fp16", 5, 10, -14, float.fromhex("0x1.ffcp+15"), math.inf, 0x7E00),
    )
}
FP32, TF32, BF16, FP16 = (FORMATS[name] for name in ("fp32", "tf32", "bf16", "fp16"))


def round_to(x: ArrayLike, fmt: Format) -> Array:
    """x (...)  ->  float64 (...): the nearest values of the format, ties to even.  SPEC FORMAT-1."""
    with np.errstate(all="ignore"):  # a signalling NaN of another type warns when it is converted
        x = np.asarray(x, np.float64)
        flat = np.ascontiguousarray(x).reshape(-1)
        result = np.empty_like(flat)
        for at in range(0, flat.size, _BLOCK):
            result[at : at + _BLOCK] = _round_block(flat[at : at + _BLOCK], fmt)
    return result.reshape(x.shape)


def encode(x: ArrayLike, fmt: Format) -> NDArray[np.unsignedinteger]:
    """x (...)  ->  codes (...) of `round_to(x, fmt)`.  SPEC FORMAT-2."""
    bits = round_to(x, fmt).reshape(np.shape(x)).view(np.int64)
    magnitude = bits & _MAGNITUDE
    drop = 52 - fmt.fraction_bits
    code = (magnitude >> drop) - ((1022 + fmt.smallest_exponent) << fmt.fraction_bits)
    small = magnitude.view(np.float64) < fmt.smallest_normal
    if small.any():  # they are multiples of the smallest value, which is the step above 2^52 of it
        shift = np.float64(math.ldexp(fmt.smallest, 52))
        code = np.where(
            small, (magnitude.view(np.float64) + shift).view(np.int64) - shift.view(np.int64), code
        )
    infinity = np.int64(0x7FF0_0000_0000_0000)
    code = np.where(magnitude == infinity, _infinity(fmt), code)
    code |= (bits < 0).astype(np.int64) << (fmt.bits - 1)
    return np.where(magnitude > infinity, fmt.nan, code).astype(fmt.code_type)


def decode(codes: ArrayLike, fmt: Format) -> Array:
    """Codes (...)  ->  their values, float64 (...), exactly.  SPEC FORMAT-2, FORMAT-3."""
    code = np.asarray(codes).astype(np.int64)
    magnitude = code & ((1 << fmt.bits - 1) - 1)
    drop = 52 - fmt.fraction_bits
    value = np.where(
        magnitude < 1 << fmt.fraction_bits,
        magnitude * fmt.smallest,
        ((magnitude << drop) + ((1022 + fmt.smallest_exponent) << 52)).view(np.float64),
    )
    infinity = _infinity(fmt)
    special = magnitude >= infinity
    if special.any():
        value = np.where(special, np.where(magnitude == infinity, np.inf, np.nan), value)
    negative = (code != magnitude) & ~np.isnan(value)
    return np.where(negative, -value, value)


def _round_block(x: Array, fmt: Format) -> Array:
    drop = 52 - fmt.fraction_bits
    bits = x.view(np.int64)
    # Half a step less one, plus one where the last kept bit is odd, then the dropped bits are cleared: a
    # carry runs into the exponent, as it should.
    up = bits >> drop
    up &= 1
    up += (1 << drop - 1) - 1
    up += bits
    up &= -1 << drop
    result = up.view(np.float64)
    size = np.abs(x)
    small = size < fmt.smallest_normal
    if small.any():
        # In [shift, 2 shift) float64 has the step of the values below the smallest normal one.
        shift = math.ldexp(fmt.smallest, 52)
        result = np.where(small, np.copysign((size + shift) - shift, x), result)
    fits = np.abs(result) <= fmt.largest
    fits &= x == x  # rounding the bits of a NaN can carry beyond them and leave a zero
    if not fits.all():
        beyond = np.where(np.isnan(x), np.nan, np.copysign(fmt.overflow, x))
        result = np.where(fits, result, beyond)
    return result


def _infinity(fmt: Format) -> int:
    # the code above all finite ones, as in IEEE 754
    return ((1 << fmt.exponent_bits) - 1) << fmt.fraction_bits
