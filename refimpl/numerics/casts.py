"""Casts to FP8 and back as hardware and libraries do them.  SPEC CAST-1 to CAST-3.

CAST-1.  All round as FORMAT-1 says and differ at the edges only: what becomes of finite values that round
beyond the largest one, of infinities, and of NaN.  A behaviour is a name; what it does to a format is a row
of the table, as the three codes for positive input.  Negative input adds the sign bit, to the code of a NaN
only where the row says so.

CAST-2.  Casts to UE8M0 that libraries have look at the float32 code of x: the exponent field, plus 1 if the
fraction is at least half (a fraction of half does not count in the field 0).  So ties go up, and everything
between 2^-127 and 2^-126 does.

CAST-3.  Widening to float32 is exact; a row says which float32 a NaN becomes, with the code's sign.

Input of at most 32 bits is read from a table of 2^16 codes, by its upper 16 bits as a float32, the last of
which is set if any lower bit is: rounding to odd, after which rounding to 5 or fewer bits is that of the
float32 itself.  `cast` without it, for float64, is the plain twin.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refimpl.errors import Invalid, Unsupported
from refimpl.numerics import formats
from refimpl.numerics.formats import Codes, Format, Rounding

_BLOCK = 8192  # values at a time, for the cache


@dataclass(frozen=True)
class Cast:
    """A row: the codes that a behaviour gives to what a format has not, for positive input."""

    behaviour: str
    format: str
    overflow: int  # finite, and beyond the largest value
    infinity: int
    nan: int
    nan_sign: bool  # whether a NaN's sign is kept
    widened_nan: int  # float32 code of a NaN that is widened; modelled for ptx, bf16 and torch-2.11's ue8m0
    evidence: str  # "recorded" (H100 or the library itself), or "modelled"


CASTS = {
    (row.behaviour, row.format): row
    for row in (
        # PTX cvt.rn.satfinite, which Triton and CUDA kernels use.
        Cast("ptx", "e4m3", 0x7E, 0x7E, 0x7F, False, 0x7FFF_FFFF, "recorded"),
        Cast("ptx", "e5m2", 0x7B, 0x7B, 0x7F, False, 0x7FFF_FFFF, "recorded"),
        # torch's .to(), by version: CUDA and CPU agree in 2.11; bf16's NaN is that of CUDA.
        Cast("torch-2.11", "e4m3", 0x7F, 0x7F, 0x7F, True, 0x7FF0_0000, "recorded"),
        Cast("torch-2.11", "e5m2", 0x7C, 0x7C, 0x7F, True, 0x7FFF_FFFF, "recorded"),
        Cast("torch-2.11", "ue8m0", 0xFF, 0xFF, 0xFF, False, 0x7FC0_0000, "recorded"),
        Cast("torch-2.11", "bf16", 0x7F80, 0x7F80, 0x7FFF, False, 0x7FC0_0000, "recorded"),
        # The CPU build; its NaN of e5m2 widens with the payload, here with the most frequent one.
        Cast("torch-2.13", "e4m3", 0x7E, 0x7E, 0x7F, True, 0x7FF0_0000, "recorded"),
        Cast("torch-2.13", "e5m2", 0x7C, 0x7C, 0x7F, True, 0x7FE0_0000, "recorded"),
        Cast("torch-2.13", "e4m3fnuz", 0x80, 0x80, 0x80, False, 0x7F80_0001, "recorded"),
        Cast("torch-2.13", "e5m2fnuz", 0x80, 0x80, 0x80, False, 0x7F80_0001, "recorded"),
        Cast("torch-2.13", "ue8m0", 0xFF, 0xFF, 0xFF, False, 0x7F80_0001, "recorded"),
        Cast("ml_dtypes-0.6", "e4m3", 0x7F, 0x7F, 0x7F, True, 0x7FC0_0000, "recorded"),
        Cast("ml_dtypes-0.6", "e5m2", 0x7C, 0x7C, 0x7E, True, 0x7FC0_0000, "recorded"),
        Cast("ml_dtypes-0.6", "e4m3fnuz", 0x80, 0x80, 0x80, False, 0xFFC0_0000, "recorded"),
        Cast("ml_dtypes-0.6", "e5m2fnuz", 0x80, 0x80, 0x80, False, 0xFFC0_0000, "recorded"),
        Cast("ml_dtypes-0.6", "ue8m0", 0xFF, 0xFF, 0xFF, False, 0x7FC0_0000, "recorded"),
        Cast("ml_dtypes-0.6", "bf16", 0x7F80, 0x7F80, 0x7FC0, True, 0x7FC0_0000, "recorded"),
    )
}
_LIBRARY_SCALE = (
    "torch-2.11",
    "torch-2.13",
)  # CAST-2 with the sign dropped; ml_dtypes gives NaN below 2^-149


def behaviour(name: str, fmt: Format) -> Cast:
    """The row of a behaviour: of the table, or `format` (as FORMAT-1), or `saturate` (never overflows).

    Raises Invalid for an unknown name, Unsupported if the behaviour has no row for the format.
    """
    if name == "format":
        above = fmt.nan if fmt.kind != "ieee" else fmt.top + 1
        return Cast(name, fmt.name, above, above, fmt.nan, False, 0x7FC0_0000, "modelled")
    if name == "saturate":
        return Cast(name, fmt.name, fmt.top, fmt.top, fmt.nan, False, 0x7FC0_0000, "modelled")
    if (name, fmt.name) in CASTS:
        return CASTS[name, fmt.name]
    known = sorted({row for row, _ in CASTS} | {"format", "saturate"})
    if name not in known:
        raise Invalid(f"the behaviour of the cast is {name!r}, but it must be one of {', '.join(known)}.")
    formats_of = [of for row, of in CASTS if row == name]
    raise Unsupported(f"the cast {name} is to {fmt.name}, but it must be to one of {', '.join(formats_of)}.")


def cast(x: ArrayLike, fmt: Format, name: str = "ptx", rounding: Rounding = "nearest") -> Codes:
    """x (...) of floats  ->  codes (...), as the named behaviour casts them.  SPEC CAST-1, CAST-2.

    Raises Invalid, Unsupported (see `behaviour`).
    """
    row = behaviour(name, fmt)
    values = np.asarray(x)
    if values.dtype.kind != "f":
        raise Invalid(f"x has the type {values.dtype}, but what is cast to {fmt.name} must be floats.")
    if rounding == "nearest" and values.dtype.itemsize <= 4 and fmt.bits <= 8:
        return _by_table(values, _table(row, fmt))
    return _plain(values, row, fmt, rounding)


def widen(codes: ArrayLike, fmt: Format, name: str = "format") -> NDArray[np.float32]:
    """Codes (...) of at most 16 bits  ->  float32 (...), exactly; a NaN becomes what the behaviour says.

    SPEC CAST-3.  Raises Invalid, Unsupported.
    """
    given = np.asarray(codes)
    formats.require_codes(given, fmt)
    values: NDArray[np.float32] = _widened(behaviour(name, fmt), fmt).take(given)
    return values


def _plain(values: NDArray[np.floating], row: Cast, fmt: Format, rounding: Rounding) -> Codes:
    with np.errstate(all="ignore"):
        x = values.astype(np.float64)
    if fmt.kind == "scale" and row.behaviour not in ("format", "saturate"):
        return _scale_codes(x, row)
    rounded = formats.round_to(x, fmt, rounding)
    codes = formats.codes_of(rounded, fmt)
    special = ~np.isfinite(rounded)
    if special.any():
        codes[special] = _edge_codes(x[special], row, fmt)
    return codes


def _edge_codes(x: NDArray[np.float64], row: Cast, fmt: Format) -> Codes:
    """What became infinity or NaN, before it was rounded (n,)  ->  its codes (n,).  SPEC CAST-1."""
    sign = np.where(np.signbit(x), fmt.sign, 0)
    nan = np.isnan(x)
    if fmt.kind == "scale":  # what is negative is NaN there
        nan |= x < 0
    codes = np.where(np.isinf(x), row.infinity | sign, row.overflow | sign)
    return np.where(nan, row.nan | (sign if row.nan_sign else 0), codes).astype(fmt.code_type)


def _scale_codes(x: NDArray[np.float64], row: Cast) -> Codes:
    size = np.abs(x)
    part, exponent = np.frexp(size)  # part in [1/2, 1)
    codes = exponent + 126 + (part >= 0.75)
    codes = np.where(size < 2.0**-126, size > 2.0**-127, codes)
    codes = np.where(np.isfinite(x), np.minimum(codes, 0xFF), 0xFF)
    if row.behaviour not in _LIBRARY_SCALE:
        codes = np.where(x > 0, codes, 0xFF)
    return codes.astype(np.uint8)


@cache
def _table(row: Cast, fmt: Format) -> NDArray[np.uint8]:
    patterns = (np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)).view(np.float32)
    return _plain(patterns, row, fmt, "nearest").astype(np.uint8)


def _by_table(values: NDArray[np.floating], table: NDArray[np.uint8]) -> Codes:
    with np.errstate(all="ignore"):
        single = np.ascontiguousarray(values, np.float32).reshape(-1)
    bits = single.view(np.uint32)
    codes = np.empty(bits.size, np.uint8)
    half, low = np.uint32(16), np.uint32(0xFFFF)
    for at in range(0, bits.size, _BLOCK):
        some = bits[at : at + _BLOCK]
        index = some & low
        index += low  # carries into bit 16 unless all lower bits are zero
        index |= some
        index >>= half
        np.take(table, index, out=codes[at : at + _BLOCK], mode="wrap")  # cannot be out of range
    return codes.reshape(values.shape)


@cache
def _widened(row: Cast, fmt: Format) -> NDArray[np.float32]:
    if fmt.bits > 16:
        raise Unsupported(f"codes of {fmt.name} are to be widened, but they must have at most 16 bits.")
    codes = np.arange(1 << fmt.bits)
    values = formats.decode(codes, fmt)
    bits = values.astype(np.float32).view(np.uint32)
    sign = (
        np.where(codes & fmt.sign, np.uint32(1 << 31), np.uint32(0)) if fmt.kind != "fnuz" else np.uint32(0)
    )
    table = np.where(np.isnan(values), np.uint32(row.widened_nan) | sign, bits).view(np.float32)
    table.flags.writeable = False
    return table
