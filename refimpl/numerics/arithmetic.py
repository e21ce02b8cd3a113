"""What it means to compute: the arithmetics.  SPEC EXACT-1 to EXACT-5, EXACT-7.

Layers are written once, against the `Arithmetic` protocol; what an operation rounds, and where, is decided
here.  Between two sites a layer uses `+ - * /` and indexing on the arrays that the arithmetic hands out, and
whatever contracts, sums or is transcendental goes through the methods below.

    Exact      every contraction and every elementary function is correctly rounded to float64
    Floating   float64 or float32 on BLAS and NumPy, fast, with the bits of the platform (floating.py)

A `Recipe` (recipe.py) is one of these with roundings at sites (rounded.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from refimpl.numerics import contraction, functions
from refimpl.numerics.blockscale import Quantised

Array = npt.NDArray[Any]
Item = TypeVar("Item")
Out = TypeVar("Out")


class Kept(Protocol):
    """A value saved for the backward pass, in whatever form the recipe keeps it."""

    @property
    def nbytes(self) -> int: ...
    def value(self) -> Array: ...


@dataclass(frozen=True)
class Plain:
    """Kept as it is."""

    array: Array

    @property
    def nbytes(self) -> int:
        return int(self.array.nbytes)

    def value(self) -> Array:
        return self.array


@dataclass(frozen=True)
class Dropped:
    """Not kept: computed again in backward, by the layer that has it.  `probe` is for a trace alone."""

    probe: Array | None = None
    nbytes: int = 0

    def value(self) -> Array:
        if self.probe is None:
            raise AssertionError("a value that was not kept was read before it was computed again")
        return self.probe


class Operand:
    """The input of linears, (T, K): prepared once, read by Fprop now and by Wgrad later."""

    def __init__(self, value: Array) -> None:
        self._value = value

    @property
    def value(self) -> Array:
        """(T, K) as plain numbers."""
        return self._value

    @property
    def shape(self) -> tuple[int, ...]:
        return self._value.shape

    @property
    def kept(self) -> Operand | Dropped:
        """What is saved of it for Wgrad."""
        return self

    @property
    def nbytes(self) -> int:
        """What it takes while it is saved."""
        return int(self._value.nbytes)

    @cached_property
    def prepared(self) -> contraction.Prepared:
        """Sliced along K, for exact contractions with weights."""
        return contraction.prepare(self.value)

    def rows(self, index: Array) -> Operand:
        """The rows of some tokens, (n, K)."""
        return Operand(self.value[index])


@dataclass(frozen=True)
class Weight:
    """The weight of a linear, (N, K): prepared once for each side it is contracted on.

    site: the name that its linear's sites begin with; stored: its codes and scales, where it is FP8.
    """

    value: Array
    site: str = ""
    stored: Quantised | None = None

    @cached_property
    def for_fprop(self) -> contraction.Prepared:
        return contraction.prepare(self.value)

    @cached_property
    def for_dgrad(self) -> contraction.Prepared:
        return contraction.prepare(self.value.T)


class Arithmetic(Protocol):
    """All that a layer may ask of numbers.  T tokens, K contracted width, M and N any."""

    name: str
    order_free: bool  # whether contractions are exact, so that any split and order gives the same bits
    reads_codes: bool  # whether linears read weights as codes and scales

    def array(self, x: npt.ArrayLike) -> Array:
        """A constant, table or weight in the carrier's dtype."""

    def zeros(self, shape: tuple[int, ...]) -> Array:
        """An array to be filled, in the carrier's dtype."""

    def decide(self, x: Array) -> Array:
        """The plain real numbers on which a discrete decision (mask, top-k) is taken."""

    def at(self, site: str, x: Array) -> Array:
        """A value that crosses a boundary, rounded as the recipe says."""

    def fused(self, site: str, x: Array) -> Array:
        """A value inside of an operation, at the site "fused." + site: rounded if the recipe stores it."""

    def stores(self, site: str) -> bool:
        """Whether the recipe rounds at "fused." + site; sums are then taken term by term."""

    def reads_source(self, site: str) -> bool:
        """Whether the gradient of what made a value reads it as it was before it was rounded."""

    def keep(self, site: str, x: Array) -> Kept: ...
    def operand(self, site: str, x: Array) -> Operand: ...
    def weight(self, w: Array) -> Weight: ...

    def fprop(self, x: Operand, w: Weight) -> Array:
        """x (T, K), w (N, K)  ->  x w^T (T, N)."""

    def dgrad(self, dy: Operand, w: Weight) -> Array:
        """dy (T, N), w (N, K)  ->  dy w (T, K)."""

    def wgrad(self, dy: Operand, x: Operand) -> Array:
        """dy (T, N), x (T, K)  ->  dy^T x (N, K), summed over tokens."""

    def matmul(self, a: Array, b: Array) -> Array:
        """a (..., M, K), b (..., N, K)  ->  a b^T (..., M, N): attention, gate and head."""

    def dot(self, a: Array, b: Array) -> Array:
        """Sum over the last axis of a * b."""

    def sum(self, x: Array, axis: int = -1) -> Array: ...
    def mean(self, x: Array, axis: int = -1) -> Array: ...
    def max(self, x: Array, axis: int = -1) -> Array: ...
    def exp(self, x: Array) -> Array: ...
    def log(self, x: Array) -> Array: ...
    def sqrt(self, x: Array) -> Array: ...
    def sin(self, x: Array) -> Array: ...
    def cos(self, x: Array) -> Array: ...
    def sigmoid(self, x: Array) -> Array: ...

    def softmax(self, x: Array) -> Array:
        """exp(x - max) / sum, over the last axis."""

    def dsoftmax(self, p: Array, dp: Array) -> Array:
        """p (dp - <dp, p>), over the last axis: the gradient of the argument, from softmax p."""

    def segment_sum(self, x: Array, ids: Array, n: int) -> Array:
        """x (T, D), ids (T,)  ->  (n, D): sums of the rows that share an id."""

    def product_sum(self, a: Array, b: Array) -> Array:
        """a, b (T, D)  ->  (D,): the gradient of a gain, the sum over tokens of a * b."""

    def row_sum(self, x: Array, ids: Array, n: int) -> Array:
        """x (T, D), ids (T,)  ->  (n, D): the gradient of an embedding, the sums of rows that share an id."""

    def each(self, call: Callable[[Item], Out], items: Iterable[Item]) -> list[Out]:
        """`[call(item) for item in items]`, on as many threads as pay off."""

    def gradient(self, g: Array) -> Array:
        """A weight's gradient, or a sum of such, as it is stored."""

    def recomputes(self, *sites: str) -> bool:
        """Whether a value at any of these sites is not kept, but computed again in backward."""

    @property
    def keeping(self) -> Arithmetic:
        """The same arithmetic, in which everything is kept: for computing again."""


class KeepsAll:
    """How an arithmetic without a recipe treats gradients and saved values: as they are."""

    reads_codes = False

    def fused(self, site: str, x: Array) -> Array:
        return x

    def stores(self, site: str) -> bool:
        return False

    def reads_source(self, site: str) -> bool:
        return False

    def product_sum(self: Any, a: Array, b: Array) -> Array:
        total: Array = self.dot(a.T, b.T)
        return total

    def row_sum(self: Any, x: Array, ids: Array, n: int) -> Array:
        total: Array = self.segment_sum(x, ids, n)
        return total

    def gradient(self, g: Array) -> Array:
        return g

    def recomputes(self, *sites: str) -> bool:
        return False

    @property
    def keeping(self) -> Any:
        return self


class Exact(KeepsAll):
    """Defined by mathematics: correctly rounded contractions and functions in float64.  SPEC EXACT-1."""

    name = "exact"
    order_free = True

    def array(self, x: npt.ArrayLike) -> Array:
        return np.asarray(x, np.float64)

    def zeros(self, shape: tuple[int, ...]) -> Array:
        return np.zeros(shape)

    def decide(self, x: Array) -> Array:
        return x

    def at(self, site: str, x: Array) -> Array:
        return x

    def keep(self, site: str, x: Array) -> Kept:
        return Plain(x)

    def operand(self, site: str, x: Array) -> Operand:
        return Operand(self.at(site, x))

    def weight(self, w: Array) -> Weight:
        return Weight(self.array(w))

    def fprop(self, x: Operand, w: Weight) -> Array:
        return contraction.contract(x.prepared, w.for_fprop)

    def dgrad(self, dy: Operand, w: Weight) -> Array:
        return contraction.contract(dy.prepared, w.for_dgrad)

    def wgrad(self, dy: Operand, x: Operand) -> Array:
        return contraction.contract(dy.value.T, x.value.T)

    def matmul(self, a: Array, b: Array) -> Array:
        return contraction.contract(a, b)

    def dot(self, a: Array, b: Array) -> Array:
        return contraction.dot(a, b)

    def sum(self, x: Array, axis: int = -1) -> Array:
        return contraction.sum_(x, axis)

    def mean(self, x: Array, axis: int = -1) -> Array:
        return contraction.mean(x, axis)

    def max(self, x: Array, axis: int = -1) -> Array:
        return np.asarray(x.max(axis))

    def exp(self, x: Array) -> Array:
        return functions.exp(x)

    def log(self, x: Array) -> Array:
        return functions.log(x)

    def sqrt(self, x: Array) -> Array:
        return np.sqrt(x)

    def sin(self, x: Array) -> Array:
        return functions.sin(x)

    def cos(self, x: Array) -> Array:
        return functions.cos(x)

    def sigmoid(self, x: Array) -> Array:
        """1 / (1 + e) where x >= 0, else e / (1 + e), with e = exp(-|x|): no overflow, three roundings."""
        e = self.exp(-np.abs(x))
        return np.where(x >= 0, 1.0, e) / (1.0 + e)

    def softmax(self, x: Array) -> Array:
        return softmax(self, x)

    def dsoftmax(self, p: Array, dp: Array) -> Array:
        return dsoftmax(self, p, dp)

    def segment_sum(self, x: Array, ids: Array, n: int) -> Array:
        return contraction.segment_sum(x, ids, n)

    def each(self, call: Callable[[Item], Out], items: Iterable[Item]) -> list[Out]:
        return [call(item) for item in items]


def softmax(ar: Arithmetic, x: Array) -> Array:
    """The formula of `Arithmetic.softmax`, step by step."""
    e = ar.exp(x - ar.max(x)[..., None])
    p: Array = e / ar.sum(e)[..., None]
    return p


def dsoftmax(ar: Arithmetic, p: Array, dp: Array) -> Array:
    """The formula of `Arithmetic.dsoftmax`, step by step."""
    dx: Array = p * (dp - ar.dot(dp, p)[..., None])
    return dx
