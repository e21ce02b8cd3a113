"""Block-scaled FP8 products of matrices, as kernels for Hopper compute them.  SPEC GEMM-1 to GEMM-4.

GEMM-1.  a (M, K) and b (N, K) are FP8 codes.  a has a float32 scale for 128 codes of a row, sa (M, K/128);
b has one for a block of 128x128, sb (ceil(N/128), K/128), or for 128 codes of a row as well, sb (N, K/128).
p_k is the product over the 128 codes of block k, and all additions happen in the order of k, from +0:

    kernel         p_k                                       acc <-
    deepgemm       4 steps of wgmma from zero                fma(RN(sa sb), p_k, acc)
    cublas         the same                                  the same, in `split` equal parts of K, whose
                                                             results are added in their order
    triton_wgmma   the same                                  fma(RN(p_k sa), sb, acc)
    triton_mma     8 steps of FP16 mma from zero (TENSOR-4)  fma(RN(p_k sa), sb, acc)
    promote_fp32   RN of the exact sum                       fma(RN(sa sb), p_k, acc)

`unpromoted` has no acc in float32: the tensor core's register runs on through all blocks (unpromoted.py).

GEMM-2.  `exact` is RN of the exact sum over all of K of the products (sa a) (sb b).

GEMM-3, `cublas_tensor`, one scale for all of a and one for all of b: with accumulation "fast" a wgmma chain
over all of K; with "blocks" acc <- RN(acc + p_k); `split` as above; then RN(acc RN(sa sb)).

GEMM-4.  The result is float32, or BF16 by rounding it to nearest even.

cublas is the library's product of tiles 1x128 by blocks 128x128; its product of tiles by tiles, which Wgrad
uses, adds as triton_wgmma does.  deepgemm, triton_wgmma, triton_mma, cublas with one and two parts and
cublas_tensor with scales of 1 were compared with the hardware.  Which of the Triton kernels runs, the
autotuner decides by timing; how many parts cuBLAS makes, its heuristic.  promote_fp32 and exact are what the
others are approximations of; the former has a faster form (promoted.py), of which the row in the table is the
plain twin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.errors import Invalid
from refimpl.numerics import promoted, unpromoted
from refimpl.numerics.contraction import contract, dot
from refimpl.numerics.float32 import Single, canonical, fma, to_bf16
from refimpl.numerics.formats import Format
from refimpl.numerics.tensorcore import (
    HMMA,
    QGMMA,
    Array,
    Codes,
    Panel,
    chain,
    check_operands,
    decoded,
    fp8,
    panel,
    unpacked,
    values,
    wgmma_fp8,
)

BLOCK = 128  # codes that share a scale

_EXACT = 1 << 20  # codes of an operand of `exact` at a time


@dataclass(frozen=True)
class Kernel:
    """A row of the table of GEMM-1."""

    decode: Callable[..., Any]  # codes (R, 128), fmt  ->  operand of `partial`
    partial: Callable[[Any, Any], Single]  # p_k (M, N)
    promote: Callable[[Single, Single, Single, Single], Single]  # p_k, sa (M, 1), sb (1, N), acc  ->  acc
    height: int = 0  # rows of a tile, if not what suits the tensor cores


def gemm_fp8(
    a: Codes,
    a_scale: Single,
    b: Codes,
    b_scale: Single,
    kernel: str,
    *,
    out: str = "fp32",
    a_format: str = "e4m3",
    b_format: str = "e4m3",
    split: int = 1,
    accumulation: str = "fast",
) -> Single | NDArray[np.uint16]:
    """a (M, K), b (N, K) FP8 codes and their scales  ->  (M, N), float32 or codes of BF16.

    K is a multiple of 128.  `out` is fp32 or bf16; `split` is for cublas and cublas_tensor, `accumulation`
    (fast or blocks) for cublas_tensor.  SPEC GEMM-1 to GEMM-4.  Raises Invalid.
    """
    _check_choice("kernel", kernel, NAMES)
    _check_choice("out", out, OUTPUTS)
    _check_choice("accumulation", accumulation, ("fast", "blocks"))
    fa, fb = fp8(a_format, "a_format"), fp8(b_format, "b_format")
    m, n, k = check_operands(a, b, fa, fb, BLOCK)
    parts = _parts(k, split, kernel)
    with np.errstate(all="ignore"):
        if kernel == "cublas_tensor":
            scale = _scalar("a_scale", a_scale) * _scalar("b_scale", b_scale)
            result = (
                _added(_one_scale(a[:, part], b[:, part], fa, fb, accumulation) for part in parts) * scale
            )
        else:
            b_scale = _check_scales(a_scale, b_scale, m, n, k)
            if kernel == "exact":
                result = _exact(a, a_scale, b, b_scale, fa, fb)
            else:
                result = _added(_part(kernel, a, a_scale, b, b_scale, fa, fb, part) for part in parts)
    canonical(result)
    return to_bf16(result) if out == "bf16" else result


def _part(
    kernel: str, a: Codes, sa: Single, b: Codes, sb: Single, fa: Format, fb: Format, part: slice
) -> Single:
    if kernel == "unpromoted":
        return unpromoted.product(a, sa, b, sb, fa, fb)
    fast = kernel == "promote_fp32"
    if fast and promoted.suits(a, sa, fa) and promoted.suits(b, sb, fb):
        return promoted.product(a, sa, b, sb, fa, fb)
    return by_blocks(_for_formats(KERNELS[kernel], fa.name, fb.name), a, sa, b, sb, fa, fb, part)


def by_blocks(
    kernel: Kernel, a: Codes, sa: Single, b: Codes, sb: Single, fa: Format, fb: Format, part: slice
) -> Single:
    """GEMM-1 over a part of K, as the table says; sb has a row for every row of b."""
    acc = np.zeros((len(a), len(b)), np.float32)
    first = part.start // BLOCK
    decode_a, decode_b = partial(kernel.decode, fmt=fa), partial(kernel.decode, fmt=fb)
    for rows, columns, k, pa, pb in decoded(a[:, part], b[:, part], decode_a, decode_b, BLOCK, kernel.height):
        block = first + k.start // BLOCK
        p = kernel.partial(pa, pb)
        acc[rows, columns] = kernel.promote(
            p, sa[rows, block, None], sb[None, columns, block], acc[rows, columns]
        )
    return acc


def _one_scale(a: Codes, b: Codes, fa: Format, fb: Format, accumulation: str) -> Single:
    if accumulation == "fast":
        return wgmma_fp8(a, b, None, fa.name, fb.name)
    return _added(
        wgmma_fp8(a[:, k : k + BLOCK], b[:, k : k + BLOCK], None, fa.name, fb.name)
        for k in range(0, a.shape[1], BLOCK)
    )


def _added(parts: Iterator[Single]) -> Single:
    total = next(parts)
    for part in parts:
        total += part
    return total


def _scales_first(p: Single, sa: Single, sb: Single, acc: Single) -> Single:
    return fma(sa * sb, p, acc)


def _scales_after(p: Single, sa: Single, sb: Single, acc: Single) -> Single:
    return fma(p * sa, sb, acc)


def _qgmma_panel(codes: Codes, fmt: Format) -> Panel:
    return panel(codes, fmt, QGMMA)


def _wgmma(a: Panel, b: Panel) -> Single:
    return chain(a, b, None, QGMMA)


def _mma(a: Panel, b: Panel) -> Single:
    return chain(a, b, None, HMMA)


def _sum(a: Array, b: Array) -> Single:
    # Products of E4M3 values are multiples of 2^-18 below 2^18, so that 128 add exactly in any order.
    return (a @ b.T).astype(np.float32)


def _nearest(a: Array, b: Array) -> Single:
    """a (M, K), b (N, K)  ->  float32 (M, N) nearest to the exact sums of exact products.

    What `contract` rounded to the middle of two float32 values is told by the sign of the rest.
    """
    near = contract(a, b)
    result = near.astype(np.float32)
    value = np.where(np.isfinite(near) & np.isinf(result), np.copysign(2.0**128, near), result)
    other = np.nextafter(result, np.where(near > value, np.inf, -np.inf).astype(np.float32))
    middle = (near != value) & (near - value == other - near)
    for i, j in zip(*np.nonzero(middle), strict=True):
        rest = dot(np.append(a[i], near[i, j]), np.append(b[j], -1.0))
        if rest and (rest > 0) == (other[i, j] > result[i, j]):
            result[i, j] = other[i, j]
    return result


def _exact(a: Codes, sa: Single, b: Codes, sb: Single, fa: Format, fb: Format) -> Single:
    result = np.empty((len(a), len(b)), np.float32)
    height = max(1, _EXACT // a.shape[1])

    def scaled(codes: Codes, scale: Single, fmt: Format) -> Array:
        return values(codes, fmt) * np.repeat(scale, BLOCK, axis=1)

    for j in range(0, len(b), height):
        columns = scaled(b[j : j + height], sb[j : j + height], fb)
        for i in range(0, len(a), height):
            rows = scaled(a[i : i + height], sa[i : i + height], fa)
            result[i : i + height, j : j + height] = _nearest(rows, columns)
    return result


KERNELS = {
    "deepgemm": Kernel(_qgmma_panel, _wgmma, _scales_first),
    "cublas": Kernel(_qgmma_panel, _wgmma, _scales_first),
    "triton_wgmma": Kernel(_qgmma_panel, _wgmma, _scales_after),
    "triton_mma": Kernel(unpacked, _mma, _scales_after),
    "promote_fp32": Kernel(values, _sum, _scales_first, 256),
}
NAMES = (*KERNELS, "unpromoted", "cublas_tensor", "exact")
OUTPUTS = ("fp32", "bf16")


def _for_formats(kernel: Kernel, *formats: str) -> Kernel:
    # with the range of E5M2 the sums of promote_fp32 are no longer exact in float64
    inexact = kernel.partial is _sum and "e5m2" in formats
    return replace(kernel, partial=_nearest) if inexact else kernel


def _parts(k: int, split: int, kernel: str) -> list[slice]:
    blocks = k // BLOCK
    if split != 1 and not kernel.startswith("cublas"):
        raise Invalid(f"split is {split}, but with the kernel {kernel} it must be 1.")
    if split < 1 or blocks % split:
        raise Invalid(f"split is {split}, but it must be a divisor of the {blocks} blocks of K = {k}.")
    size = k // split
    return [slice(at, at + size) for at in range(0, k, size)]


def _check_choice(name: str, value: str, allowed: Any) -> None:
    if value not in allowed:
        raise Invalid(f"{name} is {value!r}, but it must be one of {', '.join(allowed)}.")


def _check_scales(a_scale: Single, b_scale: Single, m: int, n: int, k: int) -> Single:
    """The scales of b for every row of b, (N, K/128); raises Invalid if a grid does not fit."""
    blocks = k // BLOCK
    grids = {
        "a_scale": (a_scale, [(m, blocks)]),
        "b_scale": (b_scale, [(-(-n // BLOCK), blocks), (n, blocks)]),
    }
    for name, (scale, shapes) in grids.items():
        _check_single(name, scale)
        if scale.shape not in shapes:
            fitting = " or ".join(str(s) for s in shapes)
            raise Invalid(f"{name} has the shape {scale.shape}, but for these a and b it must be {fitting}.")
    return b_scale if len(b_scale) == n else b_scale[np.arange(n) // BLOCK]


def _check_single(name: str, scale: Single) -> None:
    found = getattr(scale, "dtype", type(scale).__name__)
    if found != np.float32:
        raise Invalid(f"{name} holds {found}, but scales must be an array of float32.")


def _scalar(name: str, scale: Single) -> Single:
    scale = np.asarray(scale)
    _check_single(name, scale)
    if scale.size != 1:
        raise Invalid(f"{name} has the shape {scale.shape}, but the kernel cublas_tensor takes one scale.")
    return scale.reshape(())
