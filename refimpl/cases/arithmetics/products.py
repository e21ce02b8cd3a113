"""Arithmetics of a scaled FP8 product: units, promotion, order of scaling.  SPEC CASE-13, GEMM-1, GEMM-3."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from refimpl.cases.arithmetics.instructions import FP8, FP8_CHANGES
from refimpl.cases.arithmetics.question import Alternative, Question
from refimpl.cases.instruments import Data, Outputs, product
from refimpl.numerics import casts, tensorcore, variants
from refimpl.numerics.arithmetic import Array
from refimpl.numerics.float32 import Single, canonical, fma
from refimpl.numerics.formats import BF16, FORMATS, encode
from refimpl.numerics.gemm import BLOCK, KERNELS, gemm_fp8

_PRODUCT = (
    "A port may have any of the arithmetics that add exactly, or in 24 bits, or promote at least every 128 "
    "products; it is named.  What accumulates 14 bits over all of K, or rounds dequantised operands to "
    "BF16, is named and does not pass."
)
Unit = Callable[[Array, Array], Single]  # codes a (M, K), b (N, K)  ->  (M, N)
Promote = Callable[[Single, Single, Single, Single], Single]  # p, sa, sb, acc  ->  acc
Call = Callable[[Data], Single]


def _first_apart(p: Single, sa: Single, sb: Single, acc: Single) -> Single:
    return acc + (sa * sb) * p


def _after_apart(p: Single, sa: Single, sb: Single, acc: Single) -> Single:
    return acc + (p * sa) * sb


def _after_b(p: Single, sa: Single, sb: Single, acc: Single) -> Single:
    return fma(p * sb, sa, acc)


def _unit(kernel: str) -> Unit:
    """The matrix unit of a kernel, over one block."""
    row, fmt = KERNELS[kernel], FORMATS["e4m3"]
    return lambda a, b: row.partial(row.decode(a, fmt=fmt), row.decode(b, fmt=fmt))


def _changed(name: str) -> Unit:
    """wgmma with one thing changed, over any length."""
    (v,), fmt = variants.variants(FP8, {name: FP8_CHANGES[name]}), FORMATS["e4m3"]
    return lambda a, b: variants.multiply(a, b, np.zeros((len(a), len(b)), np.float32), fmt, fmt, v)


def _promoted(unit: Unit, promote: Promote, d: Data) -> Single:
    """Blocks of 128 by a matrix unit, promoted in some way."""
    a, sa, b, sb = d.codes["a"], d.single("a_scale"), d.codes["b"], d.single("b_scale")
    sb = sb if len(sb) == len(b) else sb[np.arange(len(b)) // BLOCK]
    acc = np.zeros((len(a), len(b)), np.float32)
    for k in range(a.shape[1] // BLOCK):
        part = slice(k * BLOCK, (k + 1) * BLOCK)
        acc = promote(unit(a[:, part], b[:, part]), sa[:, k, None], sb[None, :, k], acc)
    return acc


def _dequantised(d: Data, bf16: bool, fused: bool) -> Single:
    """Operands are dequantised to float32 (and BF16), and multiplied and added one after the other."""
    x, y = (_values(d, name) for name in "ab")
    if bf16:
        return tensorcore.wgmma_bf16(encode(x, BF16), encode(y, BF16))
    acc = np.zeros((len(x), len(y)), np.float32)
    for k in range(x.shape[1]):
        left, right = x[:, k, None], y[None, :, k]
        acc = fma(left, right, acc) if fused else acc + left * right
    return acc


def _values(d: Data, name: str) -> Single:
    codes, scale = d.codes[name], d.single(f"{name}_scale")
    each = scale if len(scale) == len(codes) else scale[np.arange(len(codes)) // BLOCK]
    values: Single = casts.widen(codes, FORMATS["e4m3"]) * np.repeat(each, BLOCK, axis=1)
    return values


def block_scaled(d: Data) -> Question:
    """Scales of tiles and blocks."""

    def kernel(name: str, **more: Any) -> Call:
        def call(given: Data) -> Single:
            operands = given.codes["a"], given.single("a_scale"), given.codes["b"], given.single("b_scale")
            return gemm_fp8(*operands, name, **more).view(np.float32)

        return call

    wgmma, f16, total = _unit("deepgemm"), _unit("triton_mma"), _unit("promote_fp32")
    first, after = KERNELS["deepgemm"].promote, KERNELS["triton_wgmma"].promote
    nearest, wide = _changed("aligned-to-nearest"), _changed("25-bits")
    passing: dict[str, tuple[str, Call]] = {
        "deepgemm": ("DeepGEMM, cuBLAS in one part: acc = fma(RN(sa sb), p, acc)", kernel("deepgemm")),
        "cublas-split-2": ("cuBLAS with K in two parts", kernel("cublas", split=2)),
        "cublas-split-4": ("cuBLAS with K in four parts", kernel("cublas", split=4)),
        "triton-wgmma": ("Triton, 64 rows: acc = fma(RN(p sa), sb, acc)", kernel("triton_wgmma")),
        "triton-mma": ("Triton, 16 or 32 rows: the same, p from FP16 units", kernel("triton_mma")),
        "promote-fp32": ("as deepgemm, p is the exact sum, rounded", kernel("promote_fp32")),
        "exact": ("the exact sum of everything, rounded once", kernel("exact")),
        "deepgemm-apart": ("as deepgemm, rounded apart", partial(_promoted, wgmma, _first_apart)),
        "triton-wgmma-apart": ("as triton-wgmma, rounded apart", partial(_promoted, wgmma, _after_apart)),
        "triton-mma-apart": ("as triton-mma, rounded apart", partial(_promoted, f16, _after_apart)),
        "promote-fp32-apart": ("as promote-fp32, rounded apart", partial(_promoted, total, _first_apart)),
        "promote-fp32-after": ("as triton-wgmma, p is the exact sum", partial(_promoted, total, after)),
        "wgmma-b-first": ("wgmma, acc = fma(RN(p sb), sa, acc)", partial(_promoted, wgmma, _after_b)),
        "f16-scales-first": ("FP16 units, acc = fma(RN(sa sb), p, acc)", partial(_promoted, f16, first)),
        "aligned-to-nearest": ("as deepgemm, addends rounded to nearest", partial(_promoted, nearest, first)),
        "25-bits": ("as deepgemm, 25 fraction bits in the unit", partial(_promoted, wide, first)),
        "fp32-sequential": (
            "operands in float32, fused multiply-adds one after the other",
            partial(_dequantised, bf16=False, fused=True),
        ),
        "fp32-sequential-apart": (
            "operands in float32, products and sums rounded apart",
            partial(_dequantised, bf16=False, fused=False),
        ),
    }
    text = "operands are dequantised to BF16 and multiplied by BF16 units"
    failing: dict[str, tuple[str, Call]] = {
        "bf16-operands": (text, partial(_dequantised, bf16=True, fused=True))
    }
    return _question(passing, failing)


def tensor_scaled(d: Data) -> Question:
    """One scale for each operand: here accumulation need not be promoted at all."""
    a, b = d.codes["a"], d.codes["b"]
    scale = d.single("a_scale").reshape(()) * d.single("b_scale").reshape(())
    fmt, zero = FORMATS["e4m3"], np.zeros((len(a), len(b)), np.float32)

    def kernel(accumulation: str, split: int) -> Call:
        def call(given: Data) -> Single:
            operands = a, given.single("a_scale"), b, given.single("b_scale")
            more: dict[str, Any] = {"accumulation": accumulation, "split": split}
            return gemm_fp8(*operands, "cublas_tensor", **more).view(np.float32)

        return call

    def scaled(unit: Unit) -> Call:
        return lambda _: unit(a, b) * scale

    passing: dict[str, tuple[str, Call]] = {
        "promoted-128": (
            "every 128 products added in float32 (cuBLAS, fast accumulation off)",
            kernel("blocks", 1),
        ),
        "promoted-128-split-2": ("the same with K in two parts", kernel("blocks", 2)),
        "25-bits": ("25 fraction bits over all of K, steps of 32", scaled(_changed("25-bits"))),
        "mma.sync": ("unpacked to FP16, every 32 products added in float32", scaled(tensorcore.mma_fp8)),
        "fp32-sequential": (
            "fused multiply-adds in float32, one after the other",
            scaled(lambda a, b: variants.sequential(a, b, zero, fmt, fmt)),
        ),
        "float64": (
            "the exact sum, rounded to float64, float32, and scaled",
            scaled(lambda a, b: variants.wide(a, b, zero, fmt, fmt)),
        ),
    }
    failing: dict[str, tuple[str, Call]] = {
        "unpromoted": ("14 bits over all of K (cuBLAS, fast accumulation on)", kernel("fast", 1)),
        "unpromoted-split-2": ("the same with K in two parts", kernel("fast", 2)),
        "unpromoted-nearest": (
            "unpromoted, addends rounded to nearest",
            scaled(_changed("aligned-to-nearest")),
        ),
        "unpromoted-15-bits": ("unpromoted, 14 fraction bits", scaled(_changed("14-bits"))),
    }
    return _question(passing, failing)


def _question(passing: dict[str, tuple[str, Call]], failing: dict[str, tuple[str, Call]]) -> Question:
    rows = [_product(name, text, True, call) for name, (text, call) in passing.items()]
    rows += [_product(name, text, False, call) for name, (text, call) in failing.items()]
    return Question(_PRODUCT, rows)


def _product(name: str, text: str, allowed: bool, call: Call) -> Alternative:
    def compute(d: Data) -> Outputs:
        with np.errstate(all="ignore"):
            return product(canonical(np.ascontiguousarray(call(d))))

    return Alternative(name, text, allowed, compute)
