"""Suite tensorcore: matrix instructions of Hopper, alone and chained.  SPEC TENSOR-1 to TENSOR-4."""

from __future__ import annotations

from refimpl.cases.bits import Bits, Codes, Source, Whole
from refimpl.cases.instruments import DTYPE_OF
from refimpl.cases.suites import adversaries
from refimpl.numerics.formats import FORMATS

_MIXES = (("e4m3", "e4m3"), ("e4m3", "e5m2"), ("e5m2", "e4m3"), ("e5m2", "e5m2"))
_M, _N = 64, 16


def _hard(stream: str, a: str, b: str, k: int) -> dict[str, Source]:
    return {
        "a": Codes(adversaries.codes(f"{stream} a", FORMATS[a], _M, k), DTYPE_OF[a]),
        "b": Codes(adversaries.codes(f"{stream} b", FORMATS[b], _N, k), DTYPE_OF[b]),
        "c": Codes(adversaries.accumulators(f"{stream} c", _M, _N), "F32"),
    }


def _fp8(component: str, words: str, clauses: tuple[str, ...], k: int) -> tuple[Bits, ...]:
    return tuple(
        Bits(
            f"tensorcore/{component.replace('_', '-')}-{a}-{b}-k{k}",
            f"{words}, {a} by {b}, K = {k}: operands that cancel, are cut, zero, subnormal or special",
            clauses,
            component,
            _hard(f"{a} {b} {k}", a, b, k),
            {"a_format": a, "b_format": b},
        )
        for a, b in _MIXES
    )


def _half(format: str, k: int) -> Bits:
    name, dtype = {"bf16": "BF16", "fp16": "FP16"}[format], DTYPE_OF[format]
    assert dtype in ("BF16", "F16")
    return Bits(
        f"tensorcore/wgmma-{format}-k{k}",
        f"wgmma or mma.sync of {name}, K = {k}: operands that cancel, are cut, zero, subnormal or special",
        ("TENSOR-1", "TENSOR-2", "TENSOR-3"),
        f"wgmma_{format}",
        _hard(f"{format} {k}", format, format, k),
    )


def _long(a: str, b: str, k: int) -> Bits:
    """Any finite code: those below 2 to the 7 without the special ones, that is, positive, so nothing
    cancels and what is cut adds up; the second operand has both signs."""
    below = {"e4m3": 0x7F, "e5m2": 0x7C}
    return Bits(
        f"tensorcore/wgmma-fp8-{a}-{b}-k{k}",
        f"A chain of {k // 32} instructions on positive {a} and {b}",
        ("TENSOR-1", "TENSOR-3"),
        "wgmma_fp8",
        {"a": Whole((64, k), DTYPE_OF[a], 0, below[a]), "b": Whole((64, k), DTYPE_OF[b], 0, below[b])},
        {"a_format": a, "b_format": b},
    )


CASES: tuple[Bits, ...] = (
    *_fp8("wgmma_fp8", "One wgmma", ("TENSOR-1", "TENSOR-2"), 32),
    *_fp8("wgmma_fp8", "A chain of wgmma", ("TENSOR-1", "TENSOR-2", "TENSOR-3"), 128),
    *_fp8("mma_fp8", "mma.sync of FP8 on Hopper", ("TENSOR-1", "TENSOR-4"), 64),
    _half("bf16", 16),
    _half("bf16", 64),
    _half("fp16", 16),
    _half("fp16", 64),
    *(_long(a, b, 4096) for a, b in _MIXES[:2]),
)
