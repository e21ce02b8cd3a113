"""Arrays that carry an error bound beside each value.  SPEC VERDICT-3.

The rules of `bounds`, for elementary operations and for what only moves elements: layers run on these arrays
as on others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from refimpl.numerics.arithmetic import Array

STORAGE, PRODUCT, ACCUMULATE, PENDING = range(4)
Parts = tuple[Array | None, Array | None, Array | None, Array | None]

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
    return Bounded(x.plain, (add(s, pending), p, a, None))


def stored(x: Bounded) -> Bounded:
    """Settled, and rounded once more to the storage format."""
    s, p, a, pending = x.parts
    return Bounded(x.plain, (add(add(s, pending), finite(x.plain)), p, a, None))


def finite(x: Array) -> Array:
    """|x|; an infinity stands for a masked entry, which no rounding changes."""
    size = np.abs(x)
    return size if np.isfinite(size).all() else np.where(np.isfinite(size), size, 0.0)


def add(a: Array | None, b: Array | None) -> Array | None:
    return b if a is None else a if b is None else a + b


def _times(factor: Array | float, part: Array | None) -> Array | None:
    return None if part is None else factor * part


def _filled(x: Bounded, other: Bounded, put: Callable[[Array, Array], None]) -> Parts:
    parts: list[Array | None] = []
    for part, new in zip(x.parts, other.parts, strict=True):
        if part is None and new is None:
            parts.append(None)
            continue
        part = np.zeros(x.shape) if part is None else part
        part = part if part.flags.writeable else np.array(part)  # a broadcast view
        put(part, np.zeros(other.shape) if new is None else new)
        parts.append(part)
    return (parts[0], parts[1], parts[2], parts[3])


def _step(value: Array, pairs: Iterable[tuple[Array | float, Bounded]]) -> Bounded:
    """An elementary operation: |derivative| times each operand's errors, and one rounding."""
    parts: list[Array | None] = [None, None, None, None]
    for factor, x in pairs:
        for i, part in enumerate(x.parts):
            parts[i] = add(parts[i], _times(factor, part))
    size = finite(value)
    parts[ACCUMULATE] = add(parts[ACCUMULATE], size)
    parts[PENDING] = add(parts[PENDING], size)
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
