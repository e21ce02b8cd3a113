"""What a port claims about its precision.  SPEC VERDICT-2.

A claim says how large one rounding may be, relative to what is rounded, in three places:

    storage      a value that crosses a boundary between two steps, or is the result of a matrix product
    product      a computed value at the moment in which a matrix product reads it
    accumulate   every addition inside of a sum, and every operation inside of a step

Given inputs and weights are exact in bfloat16 and lose nothing when they are read.  Steps compute in float32
whatever they store, so `accumulate` stays near 2^-24.  Matrix units drop low bits where a processor rounds:
their truncation of an accumulator is 2^-23, and of a float32 operand read as tf32 it is 2^-10.
"""

import math
import re
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from refimpl.errors import Invalid

BITS: Final = "bits"  # the claim of cases of that kind: no roundoff, the bits themselves
PARTS: Final = ("storage", "product", "accumulate")


@dataclass(frozen=True)
class Claim:
    """A precision: its three roundoffs, and the significand and smallest exponent in which ulps are
    counted."""

    name: str
    storage: float
    product: float
    accumulate: float
    bits: int
    lowest: int

    @property
    def roundoffs(self) -> tuple[float, float, float]:
        """In the order of `PARTS`."""
        return self.storage, self.product, self.accumulate

    def ulp(self, value: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """The distance between neighbours at `value` in the claim's storage format."""
        exponent = np.frexp(np.asarray(value, np.float64))[1] - 1
        step: npt.NDArray[np.float64] = np.ldexp(1.0, np.maximum(exponent, self.lowest) - (self.bits - 1))
        return step


CLAIMS: Final[dict[str, Claim]] = {
    claim.name: claim
    for claim in (
        Claim("fp32", 2.0**-24, 2.0**-24, 2.0**-24, 24, -126),
        Claim("tf32", 2.0**-24, 2.0**-10, 2.0**-23, 24, -126),
        Claim("fp16", 2.0**-11, 2.0**-11, 2.0**-23, 11, -14),
        Claim("bf16", 2.0**-8, 2.0**-8, 2.0**-23, 8, -126),
    )
}

# Offered by cases of a recipe alone, which say themselves what is exact and what a value may be off.
FP8: Final = Claim("fp8", 2.0**-4, 2.0**-4, 2.0**-13, 4, -6)

_CUSTOM = re.compile(r"u=(?:2\^-(\d{1,2})|([0-9.]+(?:[eE]-?\d+)?))")


def claim(text: str) -> Claim:
    """The claim of that name, or `u=2^-11` (or `u=0.0005`): one roundoff for everything.

    Raises Invalid for another text.
    """
    if text in CLAIMS:
        return CLAIMS[text]
    if text == FP8.name:
        return FP8
    found = _CUSTOM.fullmatch(text)
    if not found:
        raise Invalid(f"the claim is {text[:40]!r}; {', '.join(CLAIMS)}, or u=2^-11 is required")
    try:
        u = 2.0 ** -int(found[1]) if found[1] else float(found[2])
    except ValueError:
        u = math.nan
    if not 2.0**-52 <= u <= 0.25:
        raise Invalid(f"the claim is {text[:40]!r}; a roundoff from 2^-52 to 2^-2 is required")
    return Claim(text, u, u, u, max(1, round(-math.log2(u))), -126)
