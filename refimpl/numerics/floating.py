"""float64 and float32 on BLAS and NumPy: fast, with the bits of the platform.  SPEC EXACT-7."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from scipy import sparse

from refimpl.numerics import threads
from refimpl.numerics.arithmetic import Array, KeepsAll, Kept, Operand, Plain, Weight

STACKED = 1 << 18  # multiplications of a matrix in a stack from which threads over the stack pay off
SPLIT = 1 << 26  # multiplications of a matrix from which threads over its rows pay off

Item = TypeVar("Item")
Out = TypeVar("Out")


class Floating(KeepsAll):
    """float64 or float32 on BLAS and NumPy.  Fast; its bits are the platform's.  SPEC EXACT-7."""

    order_free = False

    def __init__(self, dtype: npt.DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        self.name = self.dtype.name

    def array(self, x: npt.ArrayLike) -> Array:
        return np.asarray(x, self.dtype)

    def zeros(self, shape: tuple[int, ...]) -> Array:
        return np.zeros(shape, self.dtype)

    def decide(self, x: Array) -> Array:
        return x

    def at(self, site: str, x: Array) -> Array:
        return x

    def keep(self, site: str, x: Array) -> Kept:
        return Plain(x)

    def operand(self, site: str, x: Array) -> Operand:
        return Operand(x)

    def weight(self, w: Array) -> Weight:
        return Weight(self.array(w))

    def fprop(self, x: Operand, w: Weight) -> Array:
        return self.matmul(x.value, w.value)

    def dgrad(self, dy: Operand, w: Weight) -> Array:
        return self.matmul(dy.value, w.value.T)

    def wgrad(self, dy: Operand, x: Operand) -> Array:
        return self.matmul(dy.value.T, x.value.T)

    def matmul(self, a: Array, b: Array) -> Array:
        bt = b.swapaxes(-1, -2)
        if a.ndim == 2:
            return self._rows(a, bt)
        if a.shape[:-2] != b.shape[:-2] or a.shape[-2] * bt.shape[-2] * bt.shape[-1] < STACKED:
            return np.asarray(a @ bt)
        out = np.empty((*a.shape[:-1], b.shape[-2]), self.dtype)
        self.each(lambda at: np.matmul(a[at], bt[at], out=out[at]), np.ndindex(a.shape[:-2]))
        return out

    def _rows(self, a: Array, bt: Array) -> Array:
        """a (M, K), bt (K, N)  ->  (M, N): outer threads over blocks of rows waste less than BLAS's own."""
        pieces = threads.width()
        if pieces == 1 or a.size * bt.shape[1] < SPLIT:
            return np.asarray(a @ bt)
        cuts = [len(a) * i // pieces for i in range(pieces + 1)]
        out = np.empty((len(a), bt.shape[1]), self.dtype)
        self.each(lambda at: np.matmul(a[at], bt, out=out[at]), map(slice, cuts, cuts[1:]))
        return out

    def dot(self, a: Array, b: Array) -> Array:
        return np.asarray(np.einsum("...k,...k->...", a, b))

    def sum(self, x: Array, axis: int = -1) -> Array:
        return np.asarray(x.sum(axis))

    def mean(self, x: Array, axis: int = -1) -> Array:
        return np.asarray(x.mean(axis))

    def max(self, x: Array, axis: int = -1) -> Array:
        return np.asarray(x.max(axis))

    def exp(self, x: Array) -> Array:
        return np.exp(x)

    def log(self, x: Array) -> Array:
        return np.log(x)

    def sqrt(self, x: Array) -> Array:
        return np.sqrt(x)

    def sin(self, x: Array) -> Array:
        return np.sin(x)

    def cos(self, x: Array) -> Array:
        return np.cos(x)

    def sigmoid(self, x: Array) -> Array:
        with np.errstate(over="ignore"):  # exp(-x) = inf gives 0
            e = np.exp(-x)
        e += 1.0
        return np.reciprocal(e, out=e)

    def softmax(self, x: Array) -> Array:
        e = x - self.max(x)[..., None]
        np.exp(e, out=e)
        e /= self.sum(e)[..., None]
        return e

    def dsoftmax(self, p: Array, dp: Array) -> Array:
        dx = dp - self.dot(dp, p)[..., None]
        dx *= p
        return dx

    def segment_sum(self, x: Array, ids: Array, n: int) -> Array:
        hot = sparse.csr_array((np.ones(len(ids), x.dtype), (ids, np.arange(len(ids)))), (n, len(ids)))
        return np.asarray(hot @ x)

    def each(self, call: Callable[[Item], Out], items: Iterable[Item]) -> list[Out]:
        return threads.each(call, items)
