"""Products of several groups, one per expert, as DeepGEMM has them.  SPEC GEMM-5 to GEMM-7.

Every group is a product of its own, of the arithmetic of `gemm`; the layouts are these:

GEMM-5, contiguous: the tokens of all experts one after another, a (T, K), and for each the expert it goes to,
group (T,), or -1 for padding.  A tile of `alignment` rows has tokens of one expert, with padding after them.
Rows of padding are +0 here; kernels leave or fill them as they like.
GEMM-6, masked: a (G, T, K), of which expert g has the first counts[g] rows; the others are +0 here.
GEMM-7, along K, for weight gradients: the reduction is over the tokens of each expert, a (M, K) and b (N, K)
with K split into parts of sizes[g], multiples of 128 of which the last block is padded with zeros.  Both have
a scale for 128 codes of a row.  The result is added to an accumulator c (G, M, N) in float32: RN(c + a b^T).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from refimpl.errors import Invalid
from refimpl.numerics.float32 import Single, canonical
from refimpl.numerics.gemm import BLOCK, gemm_fp8
from refimpl.numerics.tensorcore import Codes

Result = Single | NDArray[np.uint16]


def contiguous(
    a: Codes,
    a_scale: Single,
    b: Codes,
    b_scale: Single,
    group: NDArray[np.integer],
    kernel: str = "deepgemm",
    *,
    alignment: int = BLOCK,
    out: str = "fp32",
) -> Result:
    """a (T, K), b (G, N, K) with their scales, group (T,)  ->  (T, N).  SPEC GEMM-5.  Raises Invalid."""
    experts = _check_experts(b, b_scale)
    _check_groups(group, len(a), experts, alignment)
    _check_length("a_scale", a_scale, len(a))
    result = np.zeros((len(a), b.shape[1]), np.uint16 if out == "bf16" else np.float32)
    for g in range(experts):
        rows = np.flatnonzero(group == g)
        if rows.size:
            result[rows] = gemm_fp8(a[rows], a_scale[rows], b[g], b_scale[g], kernel, out=out)
    return result


def masked(
    a: Codes,
    a_scale: Single,
    b: Codes,
    b_scale: Single,
    counts: Sequence[int] | NDArray[np.integer],
    kernel: str = "deepgemm",
    *,
    out: str = "fp32",
) -> Result:
    """a (G, T, K), b (G, N, K) with their scales, counts (G,)  ->  (G, T, N).  SPEC GEMM-6.

    Raises Invalid."""
    experts = _check_experts(b, b_scale)
    if a.ndim != 3 or len(a) != experts:
        raise Invalid(f"a has the shape {a.shape}, but for {experts} groups it must be ({experts}, T, K).")
    _check_length("a_scale", a_scale, experts)
    _check_length("counts", counts, experts)
    result = np.zeros((*a.shape[:2], b.shape[1]), np.uint16 if out == "bf16" else np.float32)
    for g, count in enumerate(counts):
        if not 0 <= count <= a.shape[1]:
            raise Invalid(f"counts[{g}] is {count}, but group {g} has from 0 to {a.shape[1]} rows.")
        if count:
            result[g, :count] = gemm_fp8(a[g, :count], a_scale[g, :count], b[g], b_scale[g], kernel, out=out)
    return result


def along_k(
    a: Codes,
    a_scale: Single,
    b: Codes,
    b_scale: Single,
    sizes: Sequence[int],
    c: Single | None = None,
    kernel: str = "deepgemm",
) -> Single:
    """a (M, K), b (N, K), scales (M, K/128), (N, K/128), c (G, M, N)  ->  float32 (G, M, N).

    A group of size 0 leaves c as it is.  SPEC GEMM-7.  Raises Invalid.
    """
    if any(size < 0 or size % BLOCK for size in sizes):
        raise Invalid(f"sizes is {list(sizes)}, but every part of K must be a multiple of {BLOCK}.")
    if sum(sizes) != a.shape[-1]:
        raise Invalid(f"sizes add up to {sum(sizes)}, but K of a is {a.shape[-1]} and they must be equal.")
    if np.shape(b_scale) != (len(b), a.shape[-1] // BLOCK):
        raise Invalid(
            f"b_scale has the shape {np.shape(b_scale)}, but it must be {(len(b), a.shape[-1] // BLOCK)}."
        )
    shape = (len(sizes), len(a), len(b))
    if c is not None and (c.dtype != np.float32 or c.shape != shape):
        raise Invalid(f"c is {c.dtype} of shape {c.shape}, but it must be float32 of shape {shape}.")
    result = np.zeros(shape, np.float32) if c is None else c.copy()
    at = 0
    for g, size in enumerate(sizes):
        part, blocks = slice(at, at + size), slice(at // BLOCK, (at + size) // BLOCK)
        at += size
        if size:
            product = gemm_fp8(a[:, part], a_scale[:, blocks], b[:, part], b_scale[:, blocks], kernel)
            with np.errstate(all="ignore"):
                result[g] += product
    return canonical(result)


def _check_experts(b: Codes, b_scale: Single) -> int:
    if b.ndim != 3:
        raise Invalid(f"b has the shape {b.shape}, but it must have three axes, groups, rows and K.")
    _check_length("b_scale", b_scale, len(b))
    return len(b)


def _check_length(name: str, x: Sequence[int] | NDArray[np.generic], length: int) -> None:
    if len(x) != length:
        raise Invalid(f"{name} has the length {len(x)}, but it must be {length}.")


def _check_groups(group: NDArray[np.integer], tokens: int, experts: int, alignment: int) -> None:
    if group.shape != (tokens,) or not np.issubdtype(group.dtype, np.integer):
        raise Invalid(
            f"group is {group.dtype} of shape {group.shape}, but it must be {tokens} integers, one for a row."
        )
    if group.size and not -1 <= group.min() <= group.max() < experts:
        raise Invalid(
            f"group has values from {group.min()} to {group.max()}, but they must be -1 or below {experts}."
        )
    for at in range(0, tokens, alignment):
        tile = group[at : at + alignment]
        used = np.count_nonzero(tile >= 0)
        if used and not ((tile[:used] == tile[0]).all() and tile[0] >= 0):
            raise Invalid(
                f"group mixes experts or padding in rows {at} to {at + len(tile) - 1}, but a tile of "
                f"{alignment} rows must have tokens of one expert and then padding."
            )
