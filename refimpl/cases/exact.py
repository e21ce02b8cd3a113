"""Whether bits are the right ones.  SPEC VERDICT-11.

The digest decides about the whole tensor, even where only samples of it are kept: they say where to look.
With `any_nan` every NaN is first replaced by that code, which is the one that the expected tensor has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from refimpl.cases import format
from refimpl.cases.folder import FORMAT_OF, as_codes
from refimpl.cases.format import Tensor
from refimpl.numerics.arithmetic import Array
from refimpl.numerics.formats import decode, encode

NAN_CODES: Final = {"F32": 0x7FFF_FFFF, "BF16": 0x7FFF, "F16": 0x7FFF}  # stand for all NaN of a type
WRONG: Final = ("zeros", "negated", "scaled", "rows")


@dataclass(frozen=True)
class Comparison:
    """Bits beside ours.  `at` is the flat position of the first kept element that differs, or -1."""

    holds: bool
    compared: int
    wrong: int  # of those compared
    at: int
    ours: int
    theirs: int

    @property
    def text(self) -> str:
        """What is wrong, in words."""
        if self.at >= 0:
            count = f"{self.wrong} of {self.compared} compared elements differ"
            return f"{count}, the first is {self.theirs:#x} instead of {self.ours:#x}"
        return "" if self.holds else f"the digest differs, though none of {self.compared} kept elements does"


def compare(t: Tensor, ours: Array, positions: Array | None, theirs: Array) -> Comparison:
    """ours (n,) at flat positions (None: all), theirs of the tensor's shape, codes  ->  the comparison."""
    if t.any_nan is not None:
        theirs = canonical(theirs, t.dtype, t.any_nan)
    if t.one_of:
        return _among(t, theirs.reshape(-1))
    flat = theirs.reshape(-1) if positions is None else theirs.reshape(-1)[positions]
    wrong = np.flatnonzero(flat != ours)
    holds = format.digest(theirs, t.dtype) == t.sha256
    if not wrong.size:
        return Comparison(holds, ours.size, 0, -1, 0, 0)
    first = int(wrong[0])
    at = first if positions is None else int(positions[first])
    return Comparison(holds, ours.size, int(wrong.size), at, int(ours[first]), int(flat[first]))


def _among(t: Tensor, theirs: Array) -> Comparison:
    """Every element has to be one of those that are right."""
    wrong = np.flatnonzero(~np.isin(theirs, t.one_of))
    at = int(wrong[0]) if wrong.size else -1
    first = int(theirs[at]) if wrong.size else 0
    return Comparison(not wrong.size, theirs.size, int(wrong.size), at, t.one_of[0], first)


def canonical(codes: Array, dtype: str, nan: int) -> Array:
    """codes (...) of a floating-point type  ->  (...) with every NaN as the code `nan`."""
    return np.where(np.isnan(decode(codes, FORMAT_OF[dtype])), codes.dtype.type(nan), codes)


def stored(array: Array, dtype: str, any_nan: bool) -> Array:
    """An output as codes; where any NaN is right, all are the one that stands for them."""
    codes, nan = as_codes(array), NAN_CODES.get(dtype)
    return canonical(codes, dtype, nan) if any_nan and nan is not None else codes


def spoiled(right: Array, t: Tensor) -> dict[str, Array]:
    """Outputs that are wrong on purpose: name -> codes.  Integers have no sign and no scale."""
    flat = right.reshape(-1, right.shape[-1]) if right.ndim > 1 else right
    found = {"zeros": np.zeros_like(right), "rows": np.roll(flat, 1, 0).reshape(right.shape)}
    if t.dtype not in FORMAT_OF:
        return found
    fmt, kind = FORMAT_OF[t.dtype], right.dtype.type
    if fmt.sign:
        found["negated"] = right ^ kind(fmt.sign)
    with np.errstate(over="ignore"):
        shrunk = encode(0.9 * decode(right, fmt), fmt)
    found["scaled"] = np.where(np.isnan(decode(right, fmt)), right, shrunk).astype(kind)
    return found
