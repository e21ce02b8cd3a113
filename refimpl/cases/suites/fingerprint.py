"""Suite fingerprint: inputs on which every arithmetic gives other bits.  SPEC CASE-13.

Most rows are drawn so that everything matters at once.  Before them come rows that ask one question each,
since what they ask about is rare: each puts a large product beside small ones that are kept, or cut, just
where the alternatives differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from refimpl.cases.bits import Bits, Codes, Drawn, Source, Whole
from refimpl.cases.definition import SEED
from refimpl.cases.instruments import DTYPE_OF
from refimpl.cases.suites import adversaries, flags
from refimpl.cases.suites.quantise import edge_tiles
from refimpl.numerics import generator
from refimpl.numerics.arithmetic import Array
from refimpl.numerics.formats import FORMATS, decode, encode

_M, _N = 64, 8
_FINITE = ("finite", "one exponent", "sparse", "subnormal", "edges", "pairs", "opposites", "near")

# Values of a by position in K, beside b = 1.  What is asked is said by the alternatives that differ there.
_BITS_16: tuple[Mapping[int, float], ...] = (
    {0: 1.0} | dict.fromkeys(range(1, 3), 2.0**-24),  # kept with 24 fraction bits: 1 + 2^-23
    {0: 1.0} | dict.fromkeys(range(1, 5), 2.0**-25),  # with 25
    {0: 1.0} | dict.fromkeys(range(1, 9), 2.0**-26),  # with 26
    {0: 1.0} | dict.fromkeys(range(1, 5), 1.5 * 2.0**-26),  # only if addends are rounded to 25
    {0: 1.0, 1: 2.0**-24, 2: 2.0**-25},  # only if the sum is rounded
    {0: 1.0, 1: -1.0, 2: 2.0**-24},  # cancels, and what was kept is left
    {0: 1.0, 1: -1.0, 5: 2.0**-14},
    {0: 2.0**10, 1: -(2.0**10), 4: 2.0**-16},  # survives in steps of 4
    {0: 2.0**10, 1: -(2.0**10), 8: 2.0**-16},  # in steps of 8
    {0: 2.0**10, 1: -(2.0**10), 16: 2.0**-16},  # in steps of 16
)
# bf16 only: a and b are the same power each; the sums reach 2^-149 if the last two are kept.
_TINY: tuple[int, ...] = (158, 159, 160, 161)


def _crafted(format: str, k: int) -> tuple[Array, Array]:
    """Values of a (M, K) and b (N, K), zero where they are to be drawn."""
    a, b = np.zeros((_M, k)), np.zeros((_N, k))
    b[0] = 1.0
    for row, values in enumerate(_BITS_16):
        for at, value in values.items():
            a[row, at] = value
    if format == "bf16":
        b[1] = 2.0**-75
        for row, last in enumerate(_TINY, len(_BITS_16)):
            powers = [*range(150, last), last - 1]
            a[row, : len(powers)] = [2.0 ** (75 - power) for power in powers]
        # a zero beside 2^100, and a product that is cut if that zero counts
        b[2, :2] = 2.0**100, 2.0**-30
        a[len(_BITS_16) + len(_TINY), 1] = 2.0**-30
    return a, b


def _half(format: str, k: int) -> Bits:
    fmt, dtype = FORMATS[format], DTYPE_OF[format]
    a, b = _crafted(format, k)
    left = adversaries.codes(f"fingerprint {format} a", fmt, _M, k, _FINITE)
    right = adversaries.codes(f"fingerprint {format} b", fmt, _N, k, _FINITE)
    if format == "bf16":  # codes of all exponents would overflow, and show nothing but that
        left, right = (_narrow(codes, fmt.fraction_bits) for codes in (left, right))
    rows = len(_BITS_16) + (len(_TINY) + 1 if format == "bf16" else 0)
    left[:rows] = encode(a[:rows], fmt)
    crafted = (b != 0).any(1)
    right[crafted] = encode(b[crafted], fmt)
    return Bits(
        f"fingerprint/wgmma-{format}",
        f"Which arithmetic multiplies {format}: c + a b^T for K = {k}",
        ("TENSOR-1", "TENSOR-2", "TENSOR-3", "CASE-13"),
        f"wgmma_{format}",
        {
            "a": Codes(left, dtype),
            "b": Codes(right, dtype),
            "c": Codes(_accumulators(f"{format} c", rows), "F32"),
        },
        fingerprint=f"wgmma_{format}",
    )


def _narrow(codes: Array, fraction_bits: int) -> Array:
    """The exponents of bf16 taken modulo 32, around 1; subnormal values stay."""
    exponent = (codes >> fraction_bits) & 0xFF
    narrow = np.where(exponent == 0, 0, 112 + exponent % 32)
    return ((codes & ~np.uint16(0xFF << fraction_bits)) | (narrow << fraction_bits)).astype(np.uint16)


def _accumulators(stream: str, zero_rows: int) -> Array:
    codes = adversaries.accumulators(f"fingerprint {stream}", _M, _N, special=False)
    codes[:zero_rows] = 0
    return codes


def _fp8(a: str, b: str, k: int) -> Bits:
    return Bits(
        f"fingerprint/wgmma-fp8-{a}-{b}",
        f"Which arithmetic multiplies {a} by {b}: c + a b^T for K = {k}",
        ("TENSOR-1", "TENSOR-2", "TENSOR-3", "CASE-13"),
        "wgmma_fp8",
        {
            "a": Codes(adversaries.codes(f"fingerprint {a} a", FORMATS[a], _M, k, _FINITE), DTYPE_OF[a]),
            "b": Codes(adversaries.codes(f"fingerprint {b} b", FORMATS[b], _N, k, _FINITE), DTYPE_OF[b]),
            "c": Codes(_accumulators(f"{a} {b} c", 16), "F32"),
        },
        {"a_format": a, "b_format": b},
        fingerprint="wgmma_fp8",
    )


def _scales(shape: tuple[int, ...]) -> Whole:
    return Whole(shape, "F32", 1 << 20, 1 << 24, 2.0**-34)


def _uneven(stream: str, rows: int, k: int) -> Codes:
    """E4M3 whose exponents go with the row and the block of 128, so that sums of blocks differ in size."""
    shape = (rows, k // 128, 1)
    field = generator.integers(SEED, f"bits uneven {stream} exponent", shape, 0, 15)
    rest = generator.integers(SEED, f"bits uneven {stream} rest", (rows, k // 128, 128), 0, 16)
    return Codes((field * 8 + rest % 8 + rest // 8 * 128).reshape(rows, k).astype(np.uint8), "F8_E4M3")


_GEMM = Bits(
    "fingerprint/gemm-fp8",
    "Which arithmetic a block-scaled product has: (64, 1024) by (128, 1024)",
    ("GEMM-1", "GEMM-2", "CASE-13"),
    "gemm_fp8",
    {
        "a": Whole((64, 1024), "F8_E4M3", 0, 0x7F),
        "a_scale": _scales((64, 8)),
        "b": Drawn((128, 1024)),
        "b_scale": _scales((1, 8)),
    },
    fingerprint="gemm_fp8",
)
_GEMM_TENSOR = Bits(
    "fingerprint/gemm-fp8-tensor",
    "Whether a product with one scale for each operand promotes its sums: (64, 512) by (32, 512)",
    ("GEMM-3", "CASE-13"),
    "gemm_fp8",
    {
        "a": _uneven("a", 64, 512),
        "a_scale": _scales((1,)),
        "b": _uneven("b", 32, 512),
        "b_scale": _scales((1,)),
    },
    flags=(flags.SHORT_ACCUMULATOR,),
    fingerprint="gemm_fp8_tensor",
)


def _cast(format: str) -> Bits:
    """Around the largest value, ties, subnormal values, infinities and NaN of both signs, and where two
    roundings give another code than one."""
    fmt = FORMATS[format]
    step, top = 2.0**-fmt.fraction_bits, fmt.largest
    gap = math.ldexp(step, math.frexp(top)[1] - 1)  # from the largest value down to the next
    x = [top, top + gap / 2 - gap / 16, top + gap / 2, top + gap / 2 + gap / 16, top + gap, 2 * top, 1e30]
    x += [1 + step / 2, 1 + 3 * step / 2, 1 + step / 2 + 2.0**-20, 1 + 3 * step / 2 - 2.0**-20]
    x += [1 + step / 2 + 2.0**-10, 1.0, 1 + step * 0.75, 0.0]
    x += [fmt.smallest * part for part in (0.5, 0.5 + 2.0**-20, 0.75, 1.0, 1.5, 2.5, 3.25)]
    both = np.array([*x, *(-value for value in x), np.inf, -np.inf], np.float32).view(np.uint32)
    codes = np.concatenate([both, np.array([0x7FC0_0000, 0xFFC0_0000, 0x7F80_0001, 0xFFFF_FFFF], np.uint32)])
    return Bits(
        f"fingerprint/cast-{format}",
        f"How float32 is cast to {format}",
        ("CAST-1", "CASE-13"),
        "cast",
        {"x": Codes(codes, "F32")},
        {"format": format},
        any_nan=False,
        fingerprint="cast",
    )


def _tiles() -> Array:
    """(40, 128) float32: edges, tiles of all sizes, some whose scale is beside a power of two, and some whose
    quotients are beside the middle between two codes."""
    edges = edge_tiles()[[0, 3, 4, 7, 9, 10, 11, 14]].astype(np.uint32) << np.uint32(16)
    x = generator.tensor(SEED, "bits fingerprint tiles", (32, 128), 2.0**-24, 3).astype(np.float32)
    x = x * np.ldexp(np.float32(1), np.arange(32) % 7 - 3)[:, None]
    for row in range(12):  # 448 (1 + n ulp) times a power of two
        x[row, 17] = np.float32(448.0 * 2.0 ** (row % 3 - 6) * (1.0 + (row // 3 - 1) * 2.0**-23))
    for row in range(12, 16):  # a few ulp above, far from 1: the logarithm rounds down
        x[row] *= np.float32(2.0**-8)
        x[row, 17] = np.float32(448.0 * 2.0**-17 * (1.0 + (row - 11) * 2.0**-23))
    values = decode(np.arange(8, 0x7F), FORMATS["e4m3"])
    middle = ((values[1:] + values[:-1]) / 2)[:100].reshape(4, 25).repeat(5, axis=1)  # (4, 125)
    for row in range(16, 32):
        largest = np.abs(x[row]).max()
        near = (middle[row % 4] * (largest / np.float32(448))).astype(np.float32).view(np.uint32)
        x[row, :125] = (near + np.tile(np.arange(-2, 3), 25).astype(np.uint32)).view(np.float32)
        x[row, 125:] = largest
    return np.concatenate([edges, x.astype(np.float32).view(np.uint32)])


_QUANTISE: dict[str, Source] = {"x": Codes(_tiles(), "F32")}

CASES: tuple[Bits, ...] = (
    _fp8("e4m3", "e4m3", 128),
    _fp8("e5m2", "e4m3", 128),
    _half("bf16", 64),
    _half("fp16", 64),
    _GEMM,
    _GEMM_TENSOR,
    _cast("e4m3"),
    _cast("e5m2"),
    _cast("e4m3fnuz"),
    Bits(
        "fingerprint/quantise",
        "By which recipe tiles of 1x128 are quantised",
        ("SCALE-1", "SCALE-3", "SCALE-4", "SCALE-6", "CASE-13"),
        "quantise",
        _QUANTISE,
        flags=(flags.ZERO_TILE, flags.UE8M0_LOG2),
        fingerprint="quantise",
    ),
)
