"""float32 with a stated order of every sum.  SPEC EXACT-8.

    Emulated(order, read, stored)

An arithmetic on float32 arrays: `+ - * / sqrt` are IEEE's, exp, log, sin, cos are the exact ones rounded to
float32, and every contraction and sum adds its terms in the order that `order` states, one rounding each.  It
computes what an implementation with that order would, and has the same bits everywhere.

    order     the terms in which groups, each added one by one, and how the groups' sums are joined
    read      how a matrix product reads its operands: as they are, in tf32, in bf16, ...
    stored    site -> the format in which values that cross it are stored

A `Fine` order is none: the sum is correctly rounded in float64, and once more to float32, as if the
accumulator were as wide as it has to be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt

from refimpl.numerics import contraction, float32, functions
from refimpl.numerics.arithmetic import Array, KeepsAll, Kept, Operand, Plain, Weight, dsoftmax, softmax

BLOCK: Final = 1 << 16  # results at a time, so that they stay in the cache
Item = TypeVar("Item")
Out = TypeVar("Out")
Rounding = Callable[[Array], Array]
Groups = Callable[[int], Sequence[range]]


@dataclass(frozen=True)
class Order:
    """How n terms are added.  groups(n): ranges of terms, each added one by one from its first; their sums
    are joined one by one, or as neighbours in a tree."""

    groups: Groups
    tree: bool = False
    fused: bool = False  # whether a term that is a product is added by one fused multiply-add
    cut: int = 0  # if not 0: that many terms are added exactly at a time, and the result is cut to float32


@dataclass(frozen=True)
class Fine:
    """Sums that are correctly rounded."""


def one_by_one(n: int) -> Sequence[range]:
    return [range(n)]


def reversed_(n: int) -> Sequence[range]:
    return [range(n - 1, -1, -1)]


def parts(count: int) -> Groups:
    """Contiguous parts, as in split-K."""
    return lambda n: [
        range(n * i // min(n, count), n * (i + 1) // min(n, count)) for i in range(min(n, count))
    ]


def lanes(count: int) -> Groups:
    """Every count-th term, as the lanes of a vector unit."""
    return lambda n: [range(i, n, count) for i in range(min(count, n))]


def chunks(size: int) -> Groups:
    """Contiguous parts of that size."""
    return lambda n: [range(i, min(i + size, n)) for i in range(0, n, size)]


ORDERS: Final[dict[str, Order | Fine]] = {
    "one by one": Order(one_by_one),
    "reversed": Order(reversed_),
    "tree": Order(chunks(1), tree=True),
    "split-K 2": Order(parts(2)),
    "split-K 8": Order(parts(8)),
    "lanes": Order(lanes(16), tree=True),
    "chunks": Order(chunks(128)),
    "fused": Order(one_by_one, fused=True),
    "fused chunks": Order(chunks(32), tree=True, fused=True),
    "cut": Order(one_by_one, cut=16),
    "fine": Fine(),
}


class Emulated(KeepsAll):
    """See the module's text."""

    order_free = False

    def __init__(
        self,
        order: str = "one by one",
        read: Rounding | None = None,
        stored: Callable[[str], Rounding | None] = lambda site: None,
    ) -> None:
        self.name = f"float32, {order}"
        self.order, self._read, self._stored = ORDERS[order], read, stored

    def array(self, x: npt.ArrayLike) -> Array:
        return np.asarray(x, np.float32)

    def zeros(self, shape: tuple[int, ...]) -> Array:
        return np.zeros(shape, np.float32)

    def decide(self, x: Array) -> Array:
        return x

    def at(self, site: str, x: Array) -> Array:
        rounding = self._stored(site)
        return x if rounding is None else rounding(x)

    def keep(self, site: str, x: Array) -> Kept:
        return Plain(x)

    def operand(self, site: str, x: Array) -> Operand:
        return Operand(self._operand(self.at(site, x)))

    def weight(self, w: Array) -> Weight:
        return Weight(self._operand(self.array(w)))

    def fprop(self, x: Operand, w: Weight) -> Array:
        return self._product(x.value, w.value)

    def dgrad(self, dy: Operand, w: Weight) -> Array:
        return self._product(dy.value, w.value.T)

    def wgrad(self, dy: Operand, x: Operand) -> Array:
        return self._product(dy.value.T, x.value.T)

    def matmul(self, a: Array, b: Array) -> Array:
        return self._product(self._operand(a), self._operand(b))

    def dot(self, a: Array, b: Array) -> Array:
        return self.sum(a * b)

    def sum(self, x: Array, axis: int = -1) -> Array:
        if isinstance(self.order, Fine):
            return single(contraction.sum_(x.astype(np.float64), axis))
        terms = np.ascontiguousarray(np.moveaxis(x, axis, 0))
        return _sum(self.order, len(terms), _Given(terms))

    def mean(self, x: Array, axis: int = -1) -> Array:
        return np.asarray(self.sum(x, axis) / np.float32(x.shape[axis]))

    def max(self, x: Array, axis: int = -1) -> Array:
        return np.asarray(x.max(axis))

    def exp(self, x: Array) -> Array:
        return single(functions.exp(x.astype(np.float64)))

    def log(self, x: Array) -> Array:
        return single(functions.log(x.astype(np.float64)))

    def sqrt(self, x: Array) -> Array:
        return np.sqrt(x)

    def sin(self, x: Array) -> Array:
        return single(functions.sin(x.astype(np.float64)))

    def cos(self, x: Array) -> Array:
        return single(functions.cos(x.astype(np.float64)))

    def sigmoid(self, x: Array) -> Array:
        e = self.exp(-np.abs(x))
        one = np.float32(1.0)
        return np.where(x >= 0, one, e) / (one + e)

    def softmax(self, x: Array) -> Array:
        return softmax(self, x)

    def dsoftmax(self, p: Array, dp: Array) -> Array:
        return dsoftmax(self, p, dp)

    def segment_sum(self, x: Array, ids: Array, n: int) -> Array:
        out = self.zeros((n, x.shape[-1]))
        for row, id in zip(x, ids, strict=True):
            out[id] += row
        return out

    def each(self, call: Callable[[Item], Out], items: Iterable[Item]) -> list[Out]:
        return [call(item) for item in items]

    def _operand(self, x: Array) -> Array:
        return x if self._read is None else self._read(x)

    def _product(self, a: Array, b: Array) -> Array:
        """a (..., M, K), b (..., N, K)  ->  (..., M, N)."""
        if isinstance(self.order, Fine):
            return single(contraction.contract(a.astype(np.float64), b.astype(np.float64)))
        first = np.ascontiguousarray(np.moveaxis(a, -1, 0))  # (K, ..., M)
        second = np.ascontiguousarray(np.moveaxis(b, -1, 0))  # (K, ..., N)
        out = np.empty((*a.shape[:-1], b.shape[-2]), np.float32)
        rows = max(1, BLOCK // max(1, out.size // max(1, out.shape[-2])))
        for at in range(0, out.shape[-2], rows):
            terms = _Products(first[..., at : at + rows, None], second[..., None, :], self.order)
            out[..., at : at + rows, :] = _sum(self.order, len(first), terms)
        return out


class _Given:
    """Terms that are there."""

    def __init__(self, terms: Array) -> None:
        self._terms = terms
        self._acc: Array = np.empty(0, np.float32)

    def first(self, k: int) -> Array:
        return np.array(self._terms[k])

    def add(self, acc: Array, k: int) -> Array:
        acc += self._terms[k]
        return acc

    def exact(self, ks: Sequence[int]) -> Array:
        """The sum of some terms in float64, to which few terms of float32 are short."""
        total = self._terms[ks[0]].astype(np.float64)
        for k in ks[1:]:
            total += self._terms[k]
        return np.asarray(total)


class _Products:
    """Terms that are products of two float32."""

    def __init__(self, a: Array, b: Array, order: Order) -> None:
        self._a, self._b, self._fused = a, b, order.fused
        self._buffer = np.empty(np.broadcast_shapes(a.shape[1:], b.shape[1:]), np.float32)

    def first(self, k: int) -> Array:
        return np.asarray(self._a[k] * self._b[k])

    def add(self, acc: Array, k: int) -> Array:
        if self._fused:
            return float32.fma(self._a[k], self._b[k], acc)
        np.multiply(self._a[k], self._b[k], out=self._buffer)
        acc += self._buffer
        return acc

    def exact(self, ks: Sequence[int]) -> Array:
        total = self._a[ks[0]].astype(np.float64) * self._b[ks[0]]
        for k in ks[1:]:
            total += self._a[k].astype(np.float64) * self._b[k]
        return np.asarray(total)


def _sum(order: Order, n: int, terms: _Given | _Products) -> Array:
    """The terms 0 to n - 1, added in the order."""
    if n == 0:
        return np.zeros_like(terms.first(0))
    sums = (_group(order, group, terms) for group in order.groups(n))
    return _tree(sums) if order.tree else _chain(sums)


def _group(order: Order, group: range, terms: _Given | _Products) -> Array:
    if order.cut:
        total = np.zeros(())
        for at in range(0, len(group), order.cut):
            total = cut(total + terms.exact(list(group[at : at + order.cut])))
        return single(total)
    acc = terms.first(group[0])
    for k in group[1:]:
        acc = terms.add(acc, k)
    return acc


def _chain(sums: Iterator[Array]) -> Array:
    total = next(sums)
    for own in sums:
        total = total + own
    return total


def _tree(sums: Iterator[Array]) -> Array:
    """Neighbours first: two sums of as many groups are joined as soon as both are there."""
    waiting: list[tuple[int, Array]] = []
    for own in sums:
        size = 1
        while waiting and waiting[-1][0] == size:
            own = waiting.pop()[1] + own
            size *= 2
        waiting.append((size, own))
    total = waiting.pop()[1]
    while waiting:
        total = waiting.pop()[1] + total
    return total


def single(x: Array) -> Array:
    """float64  ->  float32, to nearest."""
    with np.errstate(over="ignore"):
        return np.asarray(x, np.float32)


def cut(x: Array) -> Array:
    """float64  ->  float64 with the significand of float32: toward zero."""
    bits = np.asarray(x, np.float64).view(np.int64)
    return (bits & ~np.int64((1 << 29) - 1)).view(np.float64)


def to_bf16(x: Array) -> Array:
    """float32  ->  float32 that are bf16: to nearest even.  Infinities stay."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) & np.uint32(0xFFFF_0000)
    return rounded.view(np.float32)


def to_tf32(x: Array) -> Array:
    """float32  ->  float32 with 10 fraction bits: to nearest, ties away from zero, as `cvt.rna` does."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFF_E000)).view(np.float32)


def cut_to_tf32(x: Array) -> Array:
    """float32  ->  float32 with 10 fraction bits: the others are dropped."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    return (bits & np.uint32(0xFFFF_E000)).view(np.float32)


def to_fp16(x: Array) -> Array:
    """float32  ->  float32 that are fp16: to nearest even."""
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float32)
