"""Number formats: rounding to them, and their codes.  SPEC FORMAT-1 to FORMAT-5.

A format with f fraction bits and the smallest normal exponent e has the values

    +-(1 + m 2^-f) 2^E,  e <= E,   and   +-m 2^(e-f),   0 <= m < 2^f,        up to its largest value.

FORMAT-1, rounding.  round_to(x) is the value nearest to x, ties to the even code, straight from float64: one
rounding, never two (float64 -> float32 -> bf16 differs).  What would round above the largest value, if
exponents went on, becomes `overflow` with the sign of x, and so does an infinity where there is none.  A
zero keeps its sign.  What else a cast can do at the edges is in `casts`.

FORMAT-2, codes.  From the top: sign, E - e + 1 (zero for the values without the leading 1), m.

FORMAT-3, special codes.  A NaN rounds to NaN and is encoded as the format's `nan`.  By kind:
    ieee    the highest exponent is infinity (m = 0) and NaN
    fn      finite and NaN only: NaN has all bits set, with either sign
    fnuz    NaN is the code of the negative zero, and there is no negative zero; e is one lower
    scale   powers of two: no sign, no zero, no m; the code is E - e, and its highest value is NaN.
            Zero rounds to the smallest value, what is negative to NaN

FORMAT-4, other directions.  `zero`: the next value toward zero, and for finite x never beyond the largest.
`away`: the next value away from zero.

FORMAT-5, stochastic.  With d in [0, 1) the distance of |x| from the value below it, in steps, and r the
element's random number of 32 bits, |x| is rounded up if floor(2^32 d) + r >= 2^32 and else down: up with the
probability d, less than 2^-32 too low, and what is exact stays.  r of element i, counted in C order, is the
32-bit number at bits 32 (i mod 2) and up of word i div 2 of the stream (RAND-1).
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refimpl.errors import Invalid
from refimpl.numerics import generator

Array = NDArray[np.float64]
Codes = NDArray[np.unsignedinteger]

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
    nan: int  # the code of NaN
    kind: str = "ieee"  # which codes are special: FORMAT-3

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return (self.kind != "scale") + self.exponent_bits + self.fraction_bits

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

    @property
    def sign(self) -> int:
        """The sign bit of a code, 0 if there is none."""
        return 0 if self.kind == "scale" else 1 << self.bits - 1

    @property
    def top(self) -> int:
        """The code of the largest value."""
        above = {"ieee": 1 << self.fraction_bits, "fn": 1, "fnuz": 0, "scale": 1}[self.kind]
        return (self.sign or 1 << self.bits) - 1 - above


_INF, _NAN = math.inf, math.nan
FORMATS = {
    row.name: row
    for row in (
        # name, exponent bits, fraction bits, smallest exponent, largest value, overflow, NaN
        Format("fp32", 8, 23, -126, float.fromhex("0x1.fffffep+127"), _INF, 0x7FC0_0000),
        Format("tf32", 8, 10, -126, float.fromhex("0x1.ffcp+127"), _INF, 0x3_FE00),
        Format("bf16", 8, 7, -126, float.fromhex("0x1.fep+127"), _INF, 0x7FC0),
        Format("fp16", 5, 10, -14, float.fromhex("0x1.ffcp+15"), _INF, 0x7E00),
        Format("e5m2", 5, 2, -14, 57344.0, _INF, 0x7E),
        Format("e4m3", 4, 3, -6, 448.0, _NAN, 0x7F, "fn"),
        # The report has E5M6, 12 bits, for the input of the projection after attention, and says neither its
        # bias nor its special codes.  e5m6 is fp16 with a shorter fraction; e5m6fn is what E4M3 is to that.
        # With a power-of-two scale for its own range either keeps the same 7 bits of a normal value.
        Format("e5m6", 5, 6, -14, 65024.0, _INF, 0x7E0),
        Format("e5m6fn", 5, 6, -14, 129024.0, _NAN, 0x7FF, "fn"),
        Format("e4m3fnuz", 4, 3, -7, 240.0, _NAN, 0x80, "fnuz"),
        Format("e5m2fnuz", 5, 2, -15, 57344.0, _NAN, 0x80, "fnuz"),
        Format("ue8m0", 8, 0, -127, 2.0**127, _NAN, 0xFF, "scale"),
    )
}
FP32, TF32, BF16, FP16 = (FORMATS[name] for name in ("fp32", "tf32", "bf16", "fp16"))
E5M2, E4M3, E5M6, E5M6FN = (FORMATS[name] for name in ("e5m2", "e4m3", "e5m6", "e5m6fn"))
E4M3FNUZ, E5M2FNUZ, UE8M0 = (FORMATS[name] for name in ("e4m3fnuz", "e5m2fnuz", "ue8m0"))

ROUNDINGS = ("nearest", "zero", "away")


@dataclass(frozen=True)
class Stochastic:
    """Rounding by the random numbers of the stream `name` under `seed`, from element `start` on."""

    seed: int
    name: str
    start: int = 0

    def numbers(self, first: int, count: int) -> NDArray[np.int64]:
        """The 32-bit numbers of elements first to first + count - 1 of the array.  SPEC FORMAT-5."""
        word, skip = divmod(self.start + first, 2)
        words = generator.words(generator.tensor_key(self.seed, self.name), word, (skip + count + 1) // 2)
        return words.astype("<u8", copy=False).view("<u4")[skip : skip + count].astype(np.int64)


Rounding = str | Stochastic


def named(name: str) -> Format:
    """The format of a name.  Raises Invalid."""
    if name not in FORMATS:
        raise Invalid(f"the format is {name!r}, but it must be one of {', '.join(FORMATS)}.")
    return FORMATS[name]


def round_to(x: ArrayLike, fmt: Format, rounding: Rounding = "nearest") -> Array:
    """x (...)  ->  float64 (...): values of the format, by default the nearest.  SPEC FORMAT-1, -4, -5.

    Raises Invalid for a rounding that is neither of ROUNDINGS nor Stochastic.
    """
    if not isinstance(rounding, Stochastic) and rounding not in ROUNDINGS:
        raise Invalid(
            f"rounding is {rounding!r}, but it must be one of {', '.join(ROUNDINGS)} or Stochastic."
        )
    with np.errstate(all="ignore"):  # a signalling NaN of another type warns when it is converted
        x = np.asarray(x, np.float64)
        flat = np.ascontiguousarray(x).reshape(-1)
        result = np.empty_like(flat)
        for at in range(0, flat.size, _BLOCK):
            some = flat[at : at + _BLOCK]
            rounded = _nearest(some, fmt) if rounding == "nearest" else _directed(some, fmt, rounding, at)
            result[at : at + _BLOCK] = _edges(some, rounded, fmt, rounding == "zero")
    return result.reshape(x.shape)


def encode(x: ArrayLike, fmt: Format, rounding: Rounding = "nearest") -> Codes:
    """x (...)  ->  codes (...) of `round_to(x, fmt, rounding)`.  SPEC FORMAT-2."""
    return codes_of(round_to(x, fmt, rounding), fmt)


def codes_of(values: Array, fmt: Format) -> Codes:
    """Values that the format has, float64 (...)  ->  their codes (...), without rounding.  SPEC FORMAT-2."""
    flat = np.ascontiguousarray(values).reshape(-1)
    codes = np.empty(flat.size, fmt.code_type)
    for at in range(0, flat.size, _BLOCK):
        codes[at : at + _BLOCK] = _codes_of(flat[at : at + _BLOCK], fmt)
    return codes.reshape(values.shape)


def decode(codes: ArrayLike, fmt: Format) -> Array:
    """Codes (...)  ->  their values, float64 (...), exactly.  SPEC FORMAT-2, FORMAT-3.

    Raises Invalid for what is not an integer of the format's bits.
    """
    given = np.asarray(codes)
    require_codes(given, fmt)
    code = given.astype(np.int64)
    magnitude = code & ((fmt.sign or 1 << fmt.bits) - 1)
    drop = 52 - fmt.fraction_bits
    value = ((magnitude << drop) + (_field_offset(fmt) << 52)).view(np.float64)
    if fmt.kind != "scale":
        value = np.where(magnitude < 1 << fmt.fraction_bits, magnitude * fmt.smallest, value)
    special = magnitude > fmt.top
    if fmt.kind == "fnuz":
        special = code == fmt.nan
    if special.any():
        infinite = (magnitude == fmt.top + 1) & (fmt.kind == "ieee")
        value = np.where(special, np.where(infinite, np.inf, np.nan), value)
    negative = (code != magnitude) & ~np.isnan(value)
    return np.where(negative, -value, value)


def require_codes(codes: NDArray[np.generic], fmt: Format, what: str = "codes") -> None:
    """Raises Invalid unless they are integers of the format's bits."""
    if codes.dtype.kind not in "iu":
        raise Invalid(f"{what} have the type {codes.dtype}, but they must be integers of {fmt.bits} bits.")
    wide = codes.dtype.kind == "i" or codes.dtype.itemsize * 8 > fmt.bits
    if wide and codes.size and not 0 <= int(codes.min()) <= int(codes.max()) < 1 << fmt.bits:
        worst = int(codes.min()) if int(codes.min()) < 0 else int(codes.max())
        raise Invalid(
            f"{what} have the value {worst}, but those of {fmt.name} must be 0 to {(1 << fmt.bits) - 1}."
        )


def _codes_of(values: Array, fmt: Format) -> NDArray[np.int64]:
    bits = values.view(np.int64)
    magnitude = bits & _MAGNITUDE
    code = magnitude >> 52 - fmt.fraction_bits
    code -= _field_offset(fmt) << fmt.fraction_bits
    size = magnitude.view(np.float64)
    small = size < fmt.smallest_normal
    if small.any():  # they are multiples of the smallest value, which is the step above 2^52 of it
        shift = np.float64(math.ldexp(fmt.smallest, 52))
        code = np.where(small, (size + shift).view(np.int64) - shift.view(np.int64), code)
    infinity = np.int64(0x7FF0_0000_0000_0000)
    special = magnitude >= infinity
    if special.any():
        code = np.where(special, fmt.top + 1, code)
    code |= (bits >> 63) & fmt.sign
    return np.where(magnitude > infinity, fmt.nan, code) if special.any() else code


def _field_offset(fmt: Format) -> int:
    # float64's exponent field less this is the format's
    return (1023 if fmt.kind == "scale" else 1022) + fmt.smallest_exponent


def _nearest(x: Array, fmt: Format) -> Array:
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
    return result


def _directed(x: Array, fmt: Format, rounding: Rounding, first: int) -> Array:
    drop = 52 - fmt.fraction_bits
    size = np.abs(x)
    bits = size.view(np.int64)
    low = bits & (-1 << drop)
    rest = bits - low  # in 2^-drop steps
    small = size < fmt.smallest_normal
    steps = size * (1.0 / fmt.smallest)
    below = np.floor(steps)
    if isinstance(rounding, Stochastic):
        # both distances in 2^-32 steps, cut; formats with more than 20 fraction bits drop fewer than 32
        distance = rest >> drop - 32 if drop >= 32 else rest << 32 - drop
        part = np.where(small, (steps - below) * 2.0**32, 0.0).astype(np.int64)
        up = (np.where(small, part, distance) + rounding.numbers(first, x.size)) >> 32
    elif rounding == "zero":
        up = np.zeros_like(low)
    else:
        up = np.where(small, steps > below, rest != 0).astype(np.int64)
    result = (low + (up << drop)).view(np.float64)
    result = np.where(small, (below + up) * fmt.smallest, result)
    result = np.where(np.isfinite(x), result, x)
    return np.copysign(result, x)


def _edges(x: Array, rounded: Array, fmt: Format, clamp: bool) -> Array:
    fits = np.abs(rounded) <= fmt.largest
    fits &= x == x  # rounding the bits of a NaN can carry beyond them and leave a zero
    if not fits.all():
        limit = np.where(clamp & np.isfinite(x), fmt.largest, fmt.overflow)
        beyond = np.where(np.isnan(x), np.nan, np.copysign(limit, x))
        rounded = np.where(fits, rounded, beyond)
    if fmt.kind == "fnuz":
        rounded = rounded + 0.0  # no negative zero
    if fmt.kind == "scale":
        rounded = np.where(rounded < fmt.smallest, fmt.smallest, rounded)
        rounded = np.where(x < 0, np.nan, rounded)
    return rounded
