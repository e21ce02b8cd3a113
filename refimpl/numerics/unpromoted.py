"""An accumulator that never leaves the tensor core.  SPEC GEMM-1, kernel unpromoted.

The register runs on through all blocks of K, as wide as the unit keeps it, and counts in units of the scale
s_k = RN(sa sb) of the block that is being added.  From one block to the next it is brought to the new unit:

    c <- acc s / s_k, cut toward zero to 13 fraction bits;  s <- s_k;  acc <- 4 steps of wgmma from c

and in the end the result is RN(acc s).  A block whose s_k is zero adds s_k p_k, which is nothing, and leaves
the unit.  With equal scales along K this is one wgmma chain over all of K, times the scale.  With powers of
two it is that chain with the scales in the exponents of the operands: bringing to another unit loses nothing.
With other scales it is a model, for no tensor core of Hopper takes any: one more cut where they change.
"""

from __future__ import annotations

from functools import partial
from typing import Final

import numpy as np

from refimpl.numerics.float32 import Single
from refimpl.numerics.formats import Codes, Format
from refimpl.numerics.tensorcore import QGMMA, Panel, chain, decoded, panel

BLOCK: Final = 128  # codes that share a scale


def product(a: Codes, sa: Single, b: Codes, sb: Single, fa: Format, fb: Format) -> Single:
    """a (M, K), b (N, K) FP8 codes, sa (M, K/128), sb (N, K/128)  ->  float32 (M, N); NaN are any NaN."""
    acc, unit = (np.zeros((len(a), len(b)), np.float32) for _ in range(2))
    decode_a, decode_b = partial(panel, fmt=fa, unit=QGMMA), partial(panel, fmt=fb, unit=QGMMA)
    for rows, columns, k, pa, pb in decoded(a, b, decode_a, decode_b, BLOCK):
        block, tile = k.start // BLOCK, (rows, columns)
        scale = sa[rows, block, None] * sb[None, columns, block]
        acc[tile] = _added(pa, pb, scale, acc[tile], unit[tile])
        unit[tile] = np.where(scale != 0, scale, unit[tile])
    result: Single = acc * unit
    result += np.float32(0)  # no negative zero
    return result


def _added(a: Panel, b: Panel, scale: Single, acc: Single, unit: Single) -> Single:
    """The register (M, N) after a block, in units of its scale."""
    counts = scale != 0
    after = chain(a, b, in_units(acc, unit, np.where(counts, scale, unit)), QGMMA)
    if counts.all():
        return after
    return np.where(counts, after, acc + scale * chain(a, b, None, QGMMA))  # NaN times zero is NaN


def in_units(acc: Single, old: Single, new: Single) -> Single:
    """acc old / new, cut toward zero as the unit cuts its sums (TENSOR-1, step 7).

    acc old has at most 38 bits, so that its quotient by 24 bits is a value of 14 bits or at least 2^-38 of it
    away from one: rounding it to float64 first does not change the cut.
    """
    wide = np.asarray(acc.astype(np.float64) * old / new.astype(np.float64))
    wide.view(np.int64)[...] &= -1 << 52 - QGMMA.kept
    size = np.abs(wide)
    wide = np.where(size < 2.0**-126, np.trunc(wide * 2.0**149) * 2.0**-149, wide)
    cut = np.where(size >= 2.0**128, np.copysign(np.inf, wide), wide) + 0.0
    return np.where(old == new, acc, cut.astype(np.float32))
