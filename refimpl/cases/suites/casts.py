"""Suite casts: to every format, in every behaviour and rounding.  SPEC FORMAT-1, FORMAT-4, FORMAT-5, CAST-1.

The inputs are all bf16 patterns, and float32 by classes: exponents around the boundaries of the format, each
with runs of ones and zeros and with what is just below, at and above the middle between two neighbours, for
every place where the fraction can be cut.
"""

from typing import Any

from refimpl.cases.bits import Bits, Classes, Every
from refimpl.cases.definition import SEED
from refimpl.numerics import generator
from refimpl.numerics.casts import CASTS
from refimpl.numerics.formats import FORMATS, Format


def _fractions() -> tuple[int, ...]:
    top = 1 << 23
    found = {0, 1, top - 1}
    for i in range(23):
        half, low = 1 << i, (1 << i) - 1
        found |= {half, low, top - half, half | low >> 1, top - half - 1}
        if i:
            found |= {half | 1, half - 1, top - half + 1}  # beside the middle, the digit above being 0 or 1
        found |= {3 * half, 3 * half + 1, 3 * half - 1} if 3 * half + 1 < top else set()
    return tuple(sorted(found))


def _exponents(fmt: Format) -> tuple[int, ...]:
    """Fields of float32: its own ends, 1, and from below the smallest value to above the largest one."""
    low = 127 + fmt.smallest_exponent
    high = 127 + (15 if fmt.largest < 2.0**17 else 127)
    high = 127 + 8 if fmt.largest < 512 else high
    high = high + 1 if fmt.name == "e5m6fn" else high
    found = {0, 1, 2, 126, 127, 128, 253, 254, 255}
    found |= set(range(low - fmt.fraction_bits - 2, low + 2)) | set(range(high - 1, high + 2))
    return tuple(sorted(e for e in found if 0 <= e <= 255))


def _case(format: str, behaviour: str, suffix: str = "", rounding: Any = "nearest", title: str = "") -> Bits:
    fmt = FORMATS[format]
    clause = "CAST-2" if format == "ue8m0" else "CAST-1"
    clauses = {"nearest": clause, "zero": "FORMAT-4", "away": "FORMAT-4"}
    own = clauses[rounding] if isinstance(rounding, str) else "FORMAT-5"
    return Bits(
        f"casts/{format}-{suffix or behaviour}",
        f"All bf16 patterns and classes of float32 to {format}, {title or f'as {behaviour} does'}",
        ("FORMAT-1", own),
        "cast",
        {"x_bf16": Every(16, "BF16"), "x_f32": Classes(_exponents(fmt), _fractions())},
        {"format": format, "behaviour": behaviour, "rounding": rounding},
        any_nan=behaviour in ("format", "saturate"),
    )


def _stochastic(format: str) -> Bits:
    stream = f"casts/{format}-stochastic"  # every input begins at its element 0
    rounding = {"seed": SEED, "stream": stream, "key": generator.tensor_key(SEED, stream).hex()}
    return _case(format, "saturate", "stochastic", rounding, "rounded stochastically, saturating")


_PLAIN = ("bf16", "fp16", "tf32", "e5m6", "e5m6fn", "ue8m0", "e4m3", "e5m2")

CASES: tuple[Bits, ...] = (
    *(_case(format, behaviour) for behaviour, format in CASTS),
    *(_case(f, "format", title="as the format says") for f in _PLAIN),
    *(_case(f, "saturate", title="saturating") for f in ("e5m6", "e5m6fn")),
    *(_case(f, "format", "toward-zero", "zero", "toward zero") for f in ("bf16", "e4m3", "e5m2", "e5m6")),
    *(_case(f, "saturate", "away", "away", "away from zero, saturating") for f in ("e4m3", "e5m2")),
    *(_stochastic(f) for f in ("bf16", "e4m3", "e5m2")),
)
