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

from refimpl.cases.format import upwards
from refimpl.numerics import functions
from refimpl.numerics.arithmetic import Array, Kept, Operand, Plain, Weight
from refimpl.numerics.contraction import contract, sum_

STORAGE, PRODUCT, ACCUMULATE, PENDING = range(4)
Parts = tuple[Array | None, Array | None, Array | None, Array | None]
Item = TypeVar("Item")
Out = TypeVar("Out")

NONE: Parts = (None, None, None, None)


class Bounded:
    """A float64 array with the coefficients of its error bound; None stands for zeros."""

    __slots__ = ("parts", "plain")

    def __init__(self, value: Array, parts: Parts = NONE) -> None:
        self.plain = value
        self.parts = parts

    # Shape, which errors share with their values.

    @property
    def shape(self) -> tuple[int, ...]:
        return self.plain.shape

    @property
    def ndim(self) -> int:
        return self.plain.ndim

    @property
    def size(self) -> int:
        return self.plain.size

    @property
    def nbytes(self) -> int:
        return self.plain.nbytes

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.plain.dtype

    @property
    def T(self) -> Bounded:  # noqa: N802 - the name that arrays have
        return self.each(np.transpose)

    def __len__(self) -> int:
        return len(self.plain)

    def each(self, call: Callable[[Array], Array]) -> Bounded:
        """The same rearrangement of the value and of its errors."""
        a, b, c, d = (None if part is None else call(part) for part in self.parts)
        return Bounded(call(self.plain), (a, b, c, d))

    def reshape(self, *shape: Any) -> Bounded:
        return self.each(lambda x: x.reshape(*shape))

    def swapaxes(self, a: int, b: int) -> Bounded:
        return self.each(lambda x: x.swapaxes(a, b))

    def __getitem__(self, index: Any) -> Bounded:
        return self.each(lambda x: np.asarray(x[index]))

    def __setitem__(self, index: Any, given: Any) -> None:
        other = lift(given)
        self.plain[index] = other.plain
        self.parts = _filled(self, other, lambda part, new: part.__setitem__(index, new))

    # Operations.

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if method != "__call__" or kwargs.pop("out", None) is not None:
            return NotImplemented
        if ufunc in _RULES:
            return _RULES[ufunc](*map(lift, inputs))
        if ufunc in _PLAIN:
            return ufunc(*(x.plain if isinstance(x, Bounded) else x for x in inputs), **kwargs)
        return NotImplemented

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return _STRUCTURE[func](*args, **kwargs) if func in _STRUCTURE else NotImplemented

    def __add__(self, other: Any) -> Bounded:
        return _added(self, lift(other))

    def __radd__(self, other: Any) -> Bounded:
        return _added(lift(other), self)

    def __sub__(self, other: Any) -> Bounded:
        return _subtracted(self, lift(other))

    def __rsub__(self, other: Any) -> Bounded:
        return _subtracted(lift(other), self)

    def __mul__(self, other: Any) -> Bounded:
        return _multiplied(self, lift(other))

    def __rmul__(self, other: Any) -> Bounded:
        return _multiplied(lift(other), self)

    def __truediv__(self, other: Any) -> Bounded:
        return _divided(self, lift(other))

    def __rtruediv__(self, other: Any) -> Bounded:
        return _divided(lift(other), self)

    def __neg__(self) -> Bounded:
        return Bounded(-self.plain, self.parts)


def lift(x: Any) -> Bounded:
    """x as a value without error, unless it has one."""
    return x if isinstance(x, Bounded) else Bounded(np.asarray(x, np.float64))


def given_exactly(x: Bounded) -> bool:
    """Whether nothing was computed yet: inputs and weights."""
    return all(part is None for part in x.parts)


def settled(x: Bounded) -> Bounded:
    """Pending roundings become storage roundings: the value is stored."""
    s, p, a, pending = x.parts
    return Bounded(x.plain, (_add(s, pending), p, a, None))


def stored(x: Bounded) -> Bounded:
    """Settled, and rounded once more to the storage format."""
    s, p, a, pending = x.parts
    return Bounded(x.plain, (_add(_add(s, pending), _finite(x.plain)), p, a, None))


def _finite(x: Array) -> Array:
    """|x|; an infinity stands for a masked entry, which no rounding changes."""
    size = np.abs(x)
    return size if np.isfinite(size).all() else np.where(np.isfinite(size), size, 0.0)


def _size(x: Array) -> Array:
    """|x|, rounded up to few bits: it stays a bound, and its contractions cost a fifth."""
    return upwards(np.abs(x))


def _add(a: Array | None, b: Array | None) -> Array | None:
    return b if a is None else a if b is None else a + b


def _times(factor: Array | float, part: Array | None) -> Array | None:
    return None if part is None else factor * part


def _filled(x: Bounded, other: Bounded, put: Callable[[Array, Array], None]) -> Parts:
    parts: list[Array | None] = []
    for part, new in zip(x.parts, other.parts, strict=True):
        if part is None and new is None:
            parts.append(None)
            continue
        part = np.zeros(x.shape) if part is None else np.array(part)  # broadcast views cannot be written
        put(part, np.zeros(other.shape) if new is None else new)
        parts.append(part)
    return (parts[0], parts[1], parts[2], parts[3])


def _step(value: Array, pairs: Iterable[tuple[Array | float, Bounded]]) -> Bounded:
    """An elementary operation: |derivative| times each operand's errors, and one rounding."""
    parts: list[Array | None] = [None, None, None, None]
    for factor, x in pairs:
        for i, part in enumerate(x.parts):
            parts[i] = _add(parts[i], _times(factor, part))
    size = _finite(value)
    parts[ACCUMULATE] = _add(parts[ACCUMULATE], size)
    parts[PENDING] = _add(parts[PENDING], size)
    full = [None if part is None else np.broadcast_to(part, value.shape) for part in parts]
    return Bounded(value, (full[0], full[1], full[2], full[3]))


def _added(x: Bounded, y: Bounded) -> Bounded:
    return _step(x.plain + y.plain, [(1.0, x), (1.0, y)])


def _subtracted(x: Bounded, y: Bounded) -> Bounded:
    return _step(x.plain - y.plain, [(1.0, x), (1.0, y)])


def _multiplied(x: Bounded, y: Bounded) -> Bounded:
    return _step(x.plain * y.plain, [(np.abs(y.plain), x), (np.abs(x.plain), y)])


def _divided(x: Bounded, y: Bounded) -> Bounded:
    inverse = 1.0 / np.abs(y.plain)
    value = x.plain / y.plain
    return _step(value, [(inverse, x), (np.abs(value) * inverse, y)])


_RULES: dict[Any, Callable[..., Bounded]] = {
    np.add: _added,
    np.subtract: _subtracted,
    np.multiply: _multiplied,
    np.true_divide: _divided,
    np.negative: Bounded.__neg__,
}
_PLAIN = {np.greater, np.greater_equal, np.less, np.less_equal, np.equal, np.not_equal, np.isfinite, np.isnan}


def _together(call: Callable[..., Array]) -> Callable[..., Bounded]:
    """A function of a sequence of arrays that only moves elements: applied to values and to errors alike."""

    def joined(arrays: Iterable[Any], *args: Any, **kwargs: Any) -> Bounded:
        items = [lift(x) for x in arrays]
        parts: list[Array | None] = []
        for i in range(4):
            some = any(item.parts[i] is not None for item in items)
            each = [np.zeros(x.shape) if x.parts[i] is None else x.parts[i] for x in items]
            parts.append(call(each, *args, **kwargs) if some else None)
        values = call([x.plain for x in items], *args, **kwargs)
        return Bounded(values, (parts[0], parts[1], parts[2], parts[3]))

    return joined


def _where(condition: Array, x: Any, y: Any) -> Bounded:
    a, b = lift(x), lift(y)
    shape = np.broadcast_shapes(np.shape(condition), a.shape, b.shape)
    parts: list[Array | None] = []
    for one, two in zip(a.parts, b.parts, strict=True):
        some = one is not None or two is not None
        pick = np.where(condition, 0.0 if one is None else one, 0.0 if two is None else two) if some else None
        parts.append(None if pick is None else np.broadcast_to(pick, shape))
    return Bounded(np.where(condition, a.plain, b.plain), (parts[0], parts[1], parts[2], parts[3]))


def _put_along_axis(x: Bounded, index: Array, given: Any, axis: int) -> None:
    other = lift(given)
    np.put_along_axis(x.plain, index, other.plain, axis)
    x.parts = _filled(x, other, lambda part, new: np.put_along_axis(part, index, new, axis))


_STRUCTURE: dict[Any, Callable[..., Any]] = {
    np.concatenate: _together(np.concatenate),
    np.stack: _together(np.stack),
    np.where: _where,
    np.take_along_axis: lambda x, index, axis=-1: x.each(lambda y: np.take_along_axis(y, index, axis)),
    np.put_along_axis: _put_along_axis,
    np.zeros_like: lambda x, **_: Bounded(np.zeros(x.shape)),
    np.swapaxes: lambda x, a, b: x.swapaxes(a, b),
    np.transpose: lambda x: x.T,
    np.shape: lambda x: x.shape,
    np.broadcast_to: lambda x, shape: x.each(lambda y: np.broadcast_to(y, shape)),
}


class Bounding:
    """The arithmetic of `Bounded` arrays: exact, so values and bounds are the same everywhere."""

    name = "bounding"
    order_free = False

    def array(self, x: npt.ArrayLike | Bounded) -> Any:
        return lift(x)

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
            parts.append(_add(left, right))
        parts[PRODUCT] = _add(parts[PRODUCT], computed * both) if computed else parts[PRODUCT]
        parts[ACCUMULATE] = _add(parts[ACCUMULATE], float(x.shape[-1]) * both)
        return Bounded(contract(x.plain, y.plain), (parts[0], parts[1], parts[2], None))

    def dot(self, a: Any, b: Any) -> Any:
        x, y = settled(lift(a)), settled(lift(b))
        product = _multiplied(x, y)
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

    def segment_sum(self, x: Any, ids: Array, n: int) -> Any:
        given = settled(lift(x))
        hot = (np.arange(n)[:, None] == ids).astype(np.float64)  # (n, T)
        counts = np.count_nonzero(hot, 1)[:, None]
        s, p, a, _ = (None if part is None else contract(hot, part.T) for part in given.parts)
        size = contract(hot, np.abs(given.plain).T)
        return Bounded(contract(hot, given.plain.T), (s, p, _add(a, counts * size), None))

    def each(self, call: Callable[[Item], Out], items: Iterable[Item]) -> list[Out]:
        return [call(item) for item in items]

    def _operand(self, x: Bounded) -> Bounded:
        return settled(x)

    def _total(self, x: Bounded, axis: int, factor: float) -> Bounded:
        s, p, a, _ = (None if part is None else factor * sum_(part, axis) for part in x.parts)
        size = factor * float(x.shape[axis]) * sum_(np.abs(x.plain), axis)
        return Bounded(factor * sum_(x.plain, axis), (s, p, _add(a, size), None))


# An angle is a position times a frequency, and the frequency itself is a power computed in float32.
_FREQUENCY = 8.0


def _function(x: Bounded, value: Array, derivative: Array, argument: float = 1.0) -> Bounded:
    slope = np.abs(derivative)
    s, p, a, _ = (None if part is None else slope * part for part in x.parts)
    size, given = np.abs(value), _finite(x.plain)
    own = 4.0 * size + argument * given * slope
    return Bounded(value, (s, p, _add(a, own), size))
