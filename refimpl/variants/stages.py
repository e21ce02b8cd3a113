"""Pieces of changes: a step behind an operation, an operation inside of another one only, arithmetic with
other methods.

A step is `forward(c, y) -> (y', kept)` and `backward(c, dy', kept) -> dy`, so that what is changed has its
derivative beside it.  What the operation saved stays as it was: a port that reads a linear's result
wrongly has a right linear.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refimpl.layers.context import Context, Op, Ops, child
from refimpl.numerics.arithmetic import Array
from refimpl.variants.variation import Change, operations

Made = Callable[[Ops], Any]


@dataclass(frozen=True)
class Step:
    """forward(c, y) -> (y', kept);  backward(c, dy', kept) -> dy."""

    forward: Callable[[Context, Array], tuple[Array, Any]]
    backward: Callable[[Context, Array, Any], Array]


@dataclass(frozen=True)
class Stepped:
    inner: Any = child("")
    kept: Any = None  # None where the step was not taken
    taken: bool = False


def behind(name: str, step: Step, where: Callable[[Context], bool] = lambda c: True) -> dict[str, Made]:
    """Another operation of that name, for `operations` or `inside`: the step follows it, where it shall."""

    def made(ops: Ops) -> Op:
        op: Op = getattr(ops, name)

        def forward(c: Context, *given: Any) -> tuple[Array, Any]:
            y, saved = op.forward(c, *given)
            if not where(c):
                return y, Stepped(saved)
            y, kept = step.forward(c, y)
            return y, Stepped(saved, kept, True)

        def backward(c: Context, dy: Array, saved: Stepped, *given: Any) -> Any:
            dy = step.backward(c, dy, saved.kept) if saved.taken else dy
            return op.backward(c, dy, saved.inner, *given)

        return Op(forward, backward)

    return {name: made}


def named(*leaves: str) -> Callable[[Context], bool]:
    """Whether a module has one of these names."""
    return lambda c: c.leaf in leaves


def gathered(index: Callable[[Context, tuple[int, ...]], Array]) -> Step:
    """Elements read from other places: y'.flat[i] = y.flat[index[i]].  index has the shape of y."""

    def forward(c: Context, y: Array) -> tuple[Array, Any]:
        at = index(c, y.shape)
        return y.reshape(-1)[at], at

    def backward(c: Context, dy: Array, at: Array) -> Array:
        return c.ar.segment_sum(dy.reshape(-1, 1), at.reshape(-1), dy.size).reshape(dy.shape)

    return Step(forward, backward)


def columns(index: Callable[[Context, int], Array]) -> Step:
    """Columns of (T, N) read from other places of the row; places beyond it are those of the next rows."""

    def places(c: Context, shape: tuple[int, ...]) -> Array:
        rows, width = shape
        at = width * np.arange(rows)[:, None] + index(c, width)
        return np.asarray(at % (rows * width))

    return gathered(places)


def inside(outer: str, **made: Made) -> Change:
    """Operations replaced inside of another one only: inside("mla", norm=...) leaves other norms alone."""

    def wrapped(ops: Ops) -> Op:
        op: Op = getattr(ops, outer)

        def at(c: Context) -> Context:
            return replace(c, ops=replace(c.ops, **{name: make(c.ops) for name, make in made.items()}))

        return Op(
            lambda c, *given: op.forward(at(c), *given),
            lambda c, *given: op.backward(at(c), *given),
        )

    return operations(**{outer: wrapped})


def computing(name: str, wrap: Callable[..., Any]) -> Change:
    """An operation that computes in another arithmetic: wrap(ar, *what its forward is given); its backward
    has wrap(ar)."""

    def made(ops: Ops) -> Op:
        op: Op = getattr(ops, name)

        def forward(c: Context, *given: Any) -> Any:
            return op.forward(replace(c, ar=wrap(c.ar, *given)), *given)

        def backward(c: Context, *given: Any) -> Any:
            return op.backward(replace(c, ar=wrap(c.ar)), *given)

        return Op(forward, backward)

    return operations(**{name: made})


class Other:
    """An arithmetic with some methods replaced."""

    def __init__(self, ar: Any, **methods: Callable[..., Any]) -> None:
        self._ar = ar
        self.__dict__.update(methods)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ar, name)
