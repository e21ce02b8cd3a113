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
from refimpl.numerics.float32 import Single, canonical, fma
from refimpl.numerics.formats import BF16, FORMATS, encode
from refimpl.numerics.gemm import BLOCK, KERNELS, gemm_fp8

_PRODUCT = (
    "A port may have any of the arithmetics that add exactly, or in 24 bits, or promote at least every 128 "
    "products; it is named.  What accumulates 14 bits over all of K, or rounds dequantised operands to "
    "BF16, is named and does not pass."
)
Promote = Callable[[Single, Single, Single, Single], Single]


def _first_apart(p: Single, sa: Single, sb: Single, acc: Single) -> Single:
    return acc + (sa * sb) * p


def _after_apart(p: Single, sa: Single, sb: Single, acc: Single) -> Single:
    return acc + (p * sa) * sb


def _after_b(p: Single, sa: Single, sb: Single, acc: Single) -> Single:
    return fma(p * sb, sa, acc)


def _promoted(kernel: str, promote: Promote, d: Data) -> Single:
    """Blocks of 128 by a kernel's matrix unit, promoted in another way."""
    a, sa, b, sb = d.codes["a"], d.single("a_scale"), d.codes["b"], d.single("b_scale")
    row, fmt = KERNELS[kernel], FORMATS["e4m3"]
    sb = sb if len(sb) == len(b) else sb[np.arange(len(b)) // BLOCK]
    acc = np.zeros((len(a), len(b)), np.float32)
    for k in range(a.shape[1] // BLOCK):
        part = slice(k * BLOCK, (k + 1) * BLOCK)
        p = row.partial(row.decode(a[:, part], fmt=fmt), row.decode(b[:, part], fmt=fmt))
        acc = promote(p, sa[:, k, None], sb[None, :, k], acc)
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

    def kernel(name: str, **more: Any) -> Callable[[Data], Single]:
        def call(given: Data) -> Single:
            operands = given.codes["a"], given.single("a_scale"), given.codes["b"], given.single("b_scale")
            return gemm_fp8(*operands, name, **more).view(np.float32)

        return call

    rows: list[tuple[str, str, bool, Callable[[Data], Single]]] = [
        (
            "deepgemm",
            "DeepGEMM, cuBLAS with one part: acc = fma(RN(sa sb), p, acc)",
            True,
            kernel("deepgemm"),
        ),
        ("cublas-split-2", "cuBLAS with K in two parts", True, kernel("cublas", split=2)),
        ("cublas-split-4", "the same with four", True, kernel("cublas", split=4)),
        ("triton-wgmma", "Triton, 64 rows: acc = fma(RN(p sa), sb, acc)", True, kernel("triton_wgmma")),
        ("triton-mma", "Triton, 16 or 32 rows: p from FP16 units", True, kernel("triton_mma")),
        ("promote-fp32", "p is the exact sum: acc = fma(RN(sa sb), p, acc)", True, kernel("promote_fp32")),
        ("exact", "the exact sum of everything, rounded once", True, kernel("exact")),
        (
            "deepgemm-apart",
            "as deepgemm, multiplication and addition rounded apart",
            True,
            partial(_promoted, "deepgemm", _first_apart),
        ),
        (
            "triton-wgmma-apart",
            "as triton-wgmma, rounded apart",
            True,
            partial(_promoted, "triton_wgmma", _after_apart),
        ),
        (
            "triton-mma-apart",
            "as triton-mma, rounded apart",
            True,
            partial(_promoted, "triton_mma", _after_apart),
        ),
        (
            "promote-fp32-apart",
            "as promote-fp32, rounded apart",
            True,
            partial(_promoted, "promote_fp32", _first_apart),
        ),
        (
            "wgmma-b-first",
            "wgmma, acc = fma(RN(p sb), sa, acc)",
            True,
            partial(_promoted, "deepgemm", _after_b),
        ),
        (
            "mma-scales-first",
            "FP16 units, acc = fma(RN(sa sb), p, acc)",
            True,
            partial(_promoted, "triton_mma", KERNELS["deepgemm"].promote),
        ),
        (
            "fp32-sequential",
            "operands in float32, fused multiply-adds one after the other",
            True,
            partial(_dequantised, bf16=False, fused=True),
        ),
        (
            "fp32-sequential-apart",
            "the same, rounded apart",
            True,
            partial(_dequantised, bf16=False, fused=False),
        ),
        (
            "bf16-operands",
            "operands are dequantised to BF16 and multiplied by BF16 units",
            False,
            partial(_dequantised, bf16=True, fused=True),
        ),
    ]
    return Question(_PRODUCT, [_product(*row) for row in rows])


def _product(name: str, text: str, allowed: bool, call: Callable[[Data], Single]) -> Alternative:
    def compute(d: Data) -> Outputs:
        with np.errstate(all="ignore"):
            return product(canonical(np.ascontiguousarray(call(d))))

    return Alternative(name, text, allowed, compute)


def tensor_scaled(d: Data) -> Question:
    """One scale for each operand: here accumulation need not be promoted at all."""
    a, b = d.codes["a"], d.codes["b"]
    scale = d.single("a_scale").reshape(()) * d.single("b_scale").reshape(())
    fmt, zero = FORMATS["e4m3"], np.zeros((len(a), len(b)), np.float32)

    def kernel(accumulation: str, split: int) -> Callable[[Data], Single]:
        def call(given: Data) -> Single:
            operands = a, given.single("a_scale"), b, given.single("b_scale")
            more: dict[str, Any] = {"accumulation": accumulation, "split": split}
            return gemm_fp8(*operands, "cublas_tensor", **more).view(np.float32)

        return call

    def changed(name: str) -> Callable[[Data], Single]:
        v = variants.variants(FP8, {name: FP8_CHANGES[name]})[0]
        return lambda _: variants.multiply(a, b, zero, fmt, fmt, v) * scale

    rows: list[tuple[str, str, bool, Callable[[Data], Single]]] = [
        (
            "promoted-128",
            "every 128 products added in float32 (cuBLAS, fast accumulation off)",
            True,
            kernel("blocks", 1),
        ),
        ("promoted-128-split-2", "the same with K in two parts", True, kernel("blocks", 2)),
        ("unpromoted", "14 bits over all of K (cuBLAS, fast accumulation on)", False, kernel("fast", 1)),
        ("unpromoted-split-2", "the same with K in two parts", False, kernel("fast", 2)),
        (
            "unpromoted-nearest",
            "unpromoted, addends rounded to nearest",
            False,
            changed("aligned-to-nearest"),
        ),
        ("unpromoted-15-bits", "unpromoted, 14 fraction bits", False, changed("14-bits")),
        ("bf16-units", "25 fraction bits over all of K, steps of 32", True, changed("25-bits")),
        (
            "mma.sync",
            "unpacked to FP16, every 32 products added in float32",
            True,
            lambda _: tensorcore.mma_fp8(a, b) * scale,
        ),
        (
            "fp32-sequential",
            "fused multiply-adds in float32, one after the other",
            True,
            lambda _: variants.sequential(a, b, zero, fmt, fmt) * scale,
        ),
        (
            "float64",
            "the exact sum, rounded to float64, float32, and scaled",
            True,
            lambda _: variants.wide(a, b, zero, fmt, fmt) * scale,
        ),
    ]
    return Question(_PRODUCT, [_product(*row) for row in rows])
