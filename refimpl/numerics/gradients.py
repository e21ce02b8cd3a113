"""Where gradients of weights are collected, now or later.  SPEC EXACT-6.

Whatever sums over tokens arrives as operands.  In an order-free arithmetic the operands of all microbatches
are joined and contracted once, when the gradient is read, so that neither the order of microbatches nor the
split of the batch can change a bit.  In the other arithmetics each contribution is contracted by itself and
the results are added in the order of the microbatches, each sum rounded as gradients are stored.

Weight gradients of linears may wait (`deferred`): `run(n)` does the oldest n of them, first in, first out,
which is the W of zero-bubble pipeline schedules.  One that waits keeps its place among the contributions to
its parameter, so that waiting changes no bit in any arithmetic.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, cast

import numpy as np

from refimpl.numerics.arithmetic import Arithmetic, Array, Operand


@dataclass(frozen=True)
class Weighted:
    """dy (T, N), x (T, K): the operands of one Wgrad."""

    dy: Operand
    x: Operand

    def total(self, ar: Arithmetic) -> Array:
        return ar.wgrad(self.dy, self.x)

    @staticmethod
    def join(parts: list[Weighted]) -> Weighted:
        return Weighted(
            Operand(np.concatenate([p.dy.value for p in parts])),
            Operand(np.concatenate([p.x.value for p in parts])),
        )


@dataclass(frozen=True)
class Products:
    """a (T, D), b (T, D): a gradient that is the sum over tokens of a * b, as for gains."""

    a: Array
    b: Array

    def total(self, ar: Arithmetic) -> Array:
        return ar.product_sum(self.a, self.b)

    @staticmethod
    def join(parts: list[Products]) -> Products:
        return Products(np.concatenate([p.a for p in parts]), np.concatenate([p.b for p in parts]))


@dataclass(frozen=True)
class Rows:
    """dy (T, D), ids (T,): a gradient whose row i is the sum of the dy with id i, as for embeddings."""

    ids: Array
    dy: Array
    n: int

    def total(self, ar: Arithmetic) -> Array:
        return ar.row_sum(self.dy, self.ids, self.n)

    @staticmethod
    def join(parts: list[Rows]) -> Rows:
        ids, dy = np.concatenate([p.ids for p in parts]), np.concatenate([p.dy for p in parts])
        return Rows(ids, dy, parts[0].n)


Part = Weighted | Products | Rows


@dataclass
class _Contribution:
    """What a microbatch adds to a parameter, at the place at which it arrived."""

    microbatch: int
    part: Part | Array


class Gradients:
    """Collects contributions by checkpoint name and microbatch; see the module's text."""

    def __init__(
        self, ar: Arithmetic, deferred: bool = False, aliases: Mapping[str, str] | None = None
    ) -> None:
        self.ar = ar
        self.deferred = deferred
        self.aliases = aliases or {}  # a shared parameter's other name -> the name its gradient has
        self._parts: dict[str, list[_Contribution]] = {}
        self._waiting: deque[_Contribution] = deque()

    @property
    def waiting(self) -> tuple[Any, ...]:
        """The operands of the weight gradients that wait, oldest first."""
        return tuple(one.part for one in self._waiting)

    @property
    def held(self) -> tuple[Any, ...]:
        """All that is held: what waits, other operands, and gradients of single microbatches."""
        return tuple(one.part for parts in self._parts.values() for one in parts)

    def weight(self, name: str, microbatch: int, dy: Operand, x: Operand) -> None:
        """A linear's weight: dy^T x over the tokens of a microbatch."""
        self._waiting.append(self._place(name, microbatch, Weighted(dy, x)))
        if not self.deferred:
            self.run()

    def product_sum(self, name: str, microbatch: int, a: Array, b: Array) -> None:
        """A gain: the sum over tokens of a * b, both (T, D)."""
        self._contract(self._place(name, microbatch, Products(a, b)))

    def rows(self, name: str, microbatch: int, ids: Array, dy: Array, n: int) -> None:
        """An embedding of n rows: dy (T, D) added to the rows ids (T,)."""
        self._contract(self._place(name, microbatch, Rows(ids, dy, n)))

    def add(self, name: str, microbatch: int, g: Array) -> None:
        """A gradient that is reduced already; not in an order-free arithmetic, which rounds but once."""
        assert not self.ar.order_free
        self._place(name, microbatch, g)

    def run(self, n: int | None = None) -> int:
        """Do the oldest n waiting weight gradients, all of them by default; returns how many were done."""
        count = len(self._waiting) if n is None else min(n, len(self._waiting))
        for _ in range(count):
            self._contract(self._waiting.popleft())
        return count

    def branch(self) -> Gradients:
        """An empty collector of the same kind, for one thread; `merge` takes it back."""
        return Gradients(self.ar, self.deferred, self.aliases)

    def merge(self, branch: Gradients) -> None:
        """Take over what a branch collected."""
        for name, parts in branch._parts.items():
            self._parts.setdefault(name, []).extend(parts)
        self._waiting.extend(branch._waiting)

    def reduce(self) -> dict[str, Array]:
        """Checkpoint name -> gradient, for every name that received a contribution."""
        return dict(self.drain())

    def drain(self) -> Iterator[tuple[str, Array]]:
        """(name, gradient) one by one; what a gradient was made of is released once it is handed out."""
        self.run()
        for name in list(self._parts):
            parts = [one.part for one in sorted(self._parts.pop(name), key=attrgetter("microbatch"))]
            yield name, self._total(parts)

    def _place(self, name: str, microbatch: int, part: Part | Array) -> _Contribution:
        one = _Contribution(microbatch, part)
        self._parts.setdefault(self.aliases.get(name, name), []).append(one)
        return one

    def _contract(self, one: _Contribution) -> None:
        """Operands become their gradient, unless they have to wait for those of all microbatches."""
        if not self.ar.order_free:
            one.part = self.ar.gradient(cast(Part, one.part).total(self.ar))

    def _total(self, parts: list[Part | Array]) -> Array:
        """The sum: one contraction over operands, or contributions added in order."""
        if self.ar.order_free:
            return self.ar.gradient(_join(cast(list[Part], parts), self.ar).total(self.ar))
        arrays = cast(list[Array], parts)
        total = arrays[0]
        for array in arrays[1:]:
            total = self.ar.gradient(total + array)
        return total


def _join(parts: list[Part], ar: Arithmetic) -> Part:
    """Contributions to one parameter as one.  A tied embedding receives rows and products: rows are the
    product with a matrix of zeros and ones."""
    if len({type(part) for part in parts}) > 1:
        parts = [_as_product(part, ar) if isinstance(part, Rows) else part for part in parts]
    join: Callable[[list[Any]], Part] = type(parts[0]).join
    return join(parts)


def _as_product(rows: Rows, ar: Arithmetic) -> Weighted:
    hot = ar.array(rows.ids[:, None] == np.arange(rows.n))  # (T, n)
    return Weighted(Operand(hot), Operand(rows.dy))
