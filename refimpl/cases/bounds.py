"""How far a correct implementation may be off, per element.  SPEC VERDICT-3.

An operation is computed once more, exactly, on arrays that carry an error bound beside each value.  Every
rule is the first-order propagation of absolute errors, plus the rounding that the step itself may add:

    x + y       err x + err y                                 + u |x + y|
    x y         |x| err y + |y| err x                         + u |x y|
    x / y       err x / |y| + |x| err y / y^2                 + u |x / y|
    sum of n    sum of err x                                  + u n sum |x|
    a b^T       |a| err b^T + err a |b|^T                     + u n |a| |b|^T
    f(x)        |f'(x)| err x                                 + u (4 |f(x)| + |x f'(x)|)

n u bounds every order of summation.  The function's rule allows four roundings of the result and one of the
argument, which covers the fast forms of accelerators.  Bounds are linear in the roundoffs, so they are kept
as coefficients of the three roundoffs of a claim (`claims.PARTS`), and one bound serves every claim.

A fourth coefficient is pending: one storage rounding per elementary operation since the last boundary,
because an implementation may run a step as several kernels that each store their result.  It becomes part
of `storage` at the boundary, and is dropped by what every implementation computes in float32: the arguments
of elementary functions, and sums.

What these bounds leave out: terms of second order in u, underflow, and the discrete decisions of the gate,
which are forced to the exact ones (a case says separately how close those were).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from refimpl.cases.bounded import (
    ACCUMULATE,
    PRODUCT,
    Bounded,
    add,
    finite,
    given_exactly,
    lift,
    settled,
    stored,
)
from refimpl.cases.format import upwards
from refimpl.numerics import functions
from refimpl.numerics.arithmetic import Array, KeepsAll, Kept, Operand, Plain, Weight, dsoftmax, softmax
from refimpl.numerics.contraction import contract, sum_

Item = TypeVar("Item")
Out = TypeVar("Out")


class Bounding(KeepsAll):
    """The arithmetic of `Bounded` arrays: exact, so values and bounds are the same everywhere."""

    name = "bounding"
    order_free = False

    def array(self, x: npt.ArrayLike | Bounded) -> Any:
        return lift(x)

    def zeros(self, shape: tuple[int, ...]) -> Any:
        return Bounded(np.zeros(shape))

    def decide(self, x: Any) -> Array:
        value: Array = lift(x).plain
        return value

    def at(self, site: str, x: Any) -> Any:
        return stored(lift(x))

    def keep(self, site: str, x: Any) -> Kept:
        return Plain(x)

    def operand(self, site: str, x: Any) -> Operand:
        return Operand(self._operand(lift(x)))  # type: ignore[arg-type]

    def weight(self, w: Any) -> Weight:
        return Weight(lift(w))  # type: ignore[arg-type]

    def fprop(self, x: Operand, w: Weight) -> Any:
        return self.matmul(x.value, w.value)

    def dgrad(self, dy: Operand, w: Weight) -> Any:
        return self.matmul(dy.value, w.value.T)

    def wgrad(self, dy: Operand, x: Operand) -> Any:
        return self.matmul(dy.value.T, x.value.T)

    def matmul(self, a: Any, b: Any) -> Any:
        x, y = self._operand(lift(a)), self._operand(lift(b))
        computed = sum(not given_exactly(z) for z in (x, y))  # operands that need not be exact in bf16
        big, other = _size(x.plain), _size(y.plain)
        both = contract(big, other)
        parts: list[Array | None] = []
        for part, opposite in zip(x.parts[:3], y.parts[:3], strict=True):
            left = None if part is None else contract(_size(part), other)
            right = None if opposite is None else contract(big, _size(opposite))
            parts.append(add(left, right))
        parts[PRODUCT] = add(parts[PRODUCT], computed * both) if computed else parts[PRODUCT]
        parts[ACCUMULATE] = add(parts[ACCUMULATE], float(x.shape[-1]) * both)
        return Bounded(contract(x.plain, y.plain), (parts[0], parts[1], parts[2], None))

    def dot(self, a: Any, b: Any) -> Any:
        x, y = settled(lift(a)), settled(lift(b))
        product = x * y
        return self._total(product, -1, 1.0)

    def sum(self, x: Any, axis: int = -1) -> Any:
        return self._total(lift(x), axis, 1.0)

    def mean(self, x: Any, axis: int = -1) -> Any:
        given = lift(x)
        return self._total(given, axis, 1.0 / given.shape[axis])

    def max(self, x: Any, axis: int = -1) -> Any:
        """Without error: layers use it only as a shift that cancels, whatever its value is."""
        return Bounded(lift(x).plain.max(axis))

    def exp(self, x: Any) -> Any:
        value = functions.exp(lift(x).plain)
        return _function(lift(x), value, value)

    def log(self, x: Any) -> Any:
        return _function(lift(x), functions.log(lift(x).plain), 1.0 / lift(x).plain)

    def sqrt(self, x: Any) -> Any:
        value = np.sqrt(lift(x).plain)
        return _function(lift(x), value, 0.5 / value)

    def sin(self, x: Any) -> Any:
        return _function(lift(x), functions.sin(lift(x).plain), functions.cos(lift(x).plain), _FREQUENCY)

    def cos(self, x: Any) -> Any:
        return _function(lift(x), functions.cos(lift(x).plain), functions.sin(lift(x).plain), _FREQUENCY)

    def sigmoid(self, x: Any) -> Any:
        given = lift(x)
        e = functions.exp(-np.abs(given.plain))
        value = np.where(given.plain >= 0, 1.0, e) / (1.0 + e)
        return _function(given, value, e / (1.0 + e) ** 2)

    def softmax(self, x: Any) -> Any:
        return softmax(self, x)

    def dsoftmax(self, p: Any, dp: Any) -> Any:
        return dsoftmax(self, p, dp)

    def segment_sum(self, x: Any, ids: Array, n: int) -> Any:
        given = settled(lift(x))
        hot = (np.arange(n)[:, None] == ids).astype(np.float64)  # (n, T)
        counts = np.count_nonzero(hot, 1)[:, None]
        s, p, a, _ = (None if part is None else contract(hot, part.T) for part in given.parts)
        size = contract(hot, np.abs(given.plain).T)
        return Bounded(contract(hot, given.plain.T), (s, p, add(a, counts * size), None))

    def each(self, call: Callable[[Item], Out], items: Iterable[Item]) -> list[Out]:
        return [call(item) for item in items]

    def _operand(self, x: Bounded) -> Bounded:
        return settled(x)

    def _total(self, x: Bounded, axis: int, factor: float) -> Bounded:
        s, p, a, _ = (None if part is None else factor * sum_(part, axis) for part in x.parts)
        size = factor * float(x.shape[axis]) * sum_(np.abs(x.plain), axis)
        return Bounded(factor * sum_(x.plain, axis), (s, p, add(a, size), None))


# An angle is a position times a frequency, and the frequency itself is a power computed in float32.
_FREQUENCY = 8.0


def _function(x: Bounded, value: Array, derivative: Array, argument: float = 1.0) -> Bounded:
    slope = np.abs(derivative)
    s, p, a, _ = (None if part is None else slope * part for part in x.parts)
    size, given = np.abs(value), finite(x.plain)
    own = 4.0 * size + argument * given * slope
    return Bounded(value, (s, p, add(a, own), size))


def _size(x: Array) -> Array:
    """|x|, rounded up to few bits: it stays a bound, and its contractions cost a fifth."""
    return upwards(np.abs(x))
