"""Partial sums promoted to float32, fast.  SPEC GEMM-1, kernel promote_fp32.

acc <- fma(RN(sa sb), p_k, acc) with p_k = RN of the exact sum, to the bit what `gemm` computes tile by tile.
`gemm.by_blocks` is the plain twin.  What makes it fast, and why it may:

Sums.  A product of matrices in float64 adds 128 products exactly if its operands' ranges allow: with values
that are multiples of 2^q below 2^t, and as much for the other operand, t - q + t' - q' + 7 <= 53.  E4M3 has
t - q = 18.  E5M2 has 32 and is cut in two at a power of two, small values apart, which are seldom there: then
p_k = RN(x + y) of two exact sums.

Rounding.  RN(sa sb) p_k is exact in float64.  Its sum with acc is rounded there and again to float32, which
goes wrong only where the first rounding has reached the middle between two float32 values, or below the
normal ones (float32.py).  The former shows in the low 29 bits.  The latter cannot be if scales are zero or at
least 2^-33: then all terms are multiples of 2^-121, and what they add up to is zero or normal.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from refimpl.numerics import threads
from refimpl.numerics.float32 import Single, sum_to_odd
from refimpl.numerics.formats import Codes, Format
from refimpl.numerics.tensorcore import values

Array = NDArray[np.float64]

BLOCK: Final = 128  # codes that share a scale
# Rows and columns of a tile: alone, what is made of one stays in the second cache; beside other threads, that
# wait for Python's lock between operations, they are longer.
ALONE: Final = (64, 256)
BESIDE: Final = (128, 512)
SPLIT: Final = 1 << 26  # multiplications from which threads over rows pay off
SMALLEST: Final = 2.0**-33  # of scales that are not zero

_ABOVE = 35  # bits of a float64 over those that a float32 lacks
_MIDDLE = np.iinfo(np.int64).min  # those bits of a middle, shifted to the top

# Values below are the small part of E5M2, beside the other format.
_CUT: Final = {"e4m3": 2.0**-10, "e5m2": 2.0**-5}


def suits(codes: Codes, scale: Single, fmt: Format) -> bool:
    """Whether this holds for an operand: no scale is tiny, infinite or NaN, and no value of E5M2 is."""
    size = np.abs(scale)
    if not ((size == 0) | ((size >= SMALLEST) & np.isfinite(size))).all():
        return False
    return fmt.name == "e4m3" or not ((codes & np.uint8(0x7F)) > fmt.top).any()


def product(a: Codes, sa: Single, b: Codes, sb: Single, fa: Format, fb: Format) -> Single:
    """a (M, K), b (N, K) FP8 codes, sa (M, K/128), sb (N, K/128) that suit  ->  float32 (M, N)."""
    (m, k), n = a.shape, len(b)
    acc = np.zeros((m, n), np.float32)
    pieces = threads.width() if m * n * k >= SPLIT else 1
    cuts = [m * i // pieces for i in range(pieces + 1)]
    threads.each(lambda part: _rows(a[part], sa[part], b, sb, fa, fb, acc[part]), map(slice, cuts, cuts[1:]))
    return acc


def _rows(a: Codes, sa: Single, b: Codes, sb: Single, fa: Format, fb: Format, acc: Single) -> None:
    m, n = acc.shape
    height, width = ALONE if threads.width() == 1 else BESIDE
    room = _Room(min(m, height) * min(n, width))
    for block, at in enumerate(range(0, a.shape[1], BLOCK)):
        part = slice(at, at + _used(a[:, at : at + BLOCK], b[:, at : at + BLOCK]))
        if part.start == part.stop:
            continue
        pa, pb = _Panel(a[:, part], fa, fb), _Panel(b[:, part], fb, fa)
        for i in range(0, m, height):
            for j in range(0, n, width):
                rows, columns = slice(i, i + height), slice(j, j + width)
                p = room.tile(min(height, m - i), min(width, n - j))
                p.sums(pa, pb, rows, columns)
                p.promote(sa[rows, block], sb[columns, block], acc[rows, columns])


def _used(a: Codes, b: Codes) -> int:
    """How many columns of a block are not padding: zeros at the end of both operands."""
    if a[:, -1].any() or b[:, -1].any():
        return int(a.shape[1])
    used = np.flatnonzero(a.any(axis=0) | b.any(axis=0))
    return int(used[-1]) + 1 if used.size else 0


class _Panel:
    """A block of an operand, decoded: (R, 128) in float64, and its small part where there is any."""

    def __init__(self, codes: Codes, fmt: Format, other: Format) -> None:
        self.large = values(codes, fmt)
        self.small: Array | None = None
        if fmt.name == "e5m2":
            size = np.abs(self.large)
            small = np.where(size < _CUT[other.name], self.large, 0.0)
            if small.any():
                self.small = small
                self.large = self.large - small


class _Room:
    """Arrays that every tile uses anew."""

    def __init__(self, size: int) -> None:
        self.wide, self.other = np.empty(size), np.empty(size)
        self.single, self.scale = np.empty(size, np.float32), np.empty(size, np.float32)

    def tile(self, m: int, n: int) -> _Tile:
        def cut(x: NDArray[Any]) -> NDArray[Any]:
            return x[: m * n].reshape(m, n)

        return _Tile(cut(self.wide), cut(self.other), cut(self.single), cut(self.scale))


class _Tile:
    """The partial sums of one tile and block."""

    def __init__(self, wide: Array, other: Array, single: Single, scale: Single) -> None:
        self.wide, self.other, self.single, self.scale = wide, other, single, scale

    def sums(self, a: _Panel, b: _Panel, rows: slice, columns: slice) -> None:
        """p_k, float32 (M, N)."""
        np.matmul(a.large[rows], b.large[columns].T, out=self.wide)
        rest = _rest(a, b, rows, columns)
        if rest is not None:
            x = self.wide.copy()
            np.add(x, rest, out=self.wide)
            self._odd(x, rest)
        np.copyto(self.single, self.wide, casting="same_kind")

    def promote(self, sa: Single, sb: Single, acc: Single) -> None:
        """acc (M, N) <- RN(RN(sa sb) p_k + acc)."""
        np.multiply(sa[:, None], sb, out=self.scale)
        np.copyto(self.wide, self.single)
        np.copyto(self.other, self.scale)
        np.multiply(self.wide, self.other, out=self.wide)
        np.add(self.wide, acc, out=self.wide)
        self._odd(None, acc)
        np.copyto(acc, self.wide, casting="same_kind")

    def _odd(self, x: Array | None, y: NDArray[Any]) -> None:
        """Sums x + y, to odd where a second rounding would go wrong; x is p_k with its scale if None."""
        low = self.other.view(np.int64)
        np.left_shift(self.wide.view(np.int64), _ABOVE, out=low)
        if low.min() != _MIDDLE:
            return
        at = np.divmod(np.flatnonzero(low == _MIDDLE), low.shape[1])
        first = x[at] if x is not None else self.single[at].astype(np.float64) * self.scale[at]
        self.wide[at] = sum_to_odd(first, y[at])


def _rest(a: _Panel, b: _Panel, rows: slice, columns: slice) -> Array | None:
    """The sums of products that have a small factor: exact as well."""
    rest: Array | None = None
    pairs = [(a.large, b.small), (a.small, b.large), (a.small, b.small)]
    for x, y in pairs:
        if x is not None and y is not None:
            more = np.matmul(x[rows], y[columns].T)
            rest = more if rest is None else rest + more
    return rest
