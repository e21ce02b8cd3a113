"""float64 with the roundings of a claim drawn at random: how far a program's numbers move.  SPEC VERDICT-19.

Every value that crosses a site moves by at most the claim's storage roundoff, what a product reads by the
product's, and sums and functions by the accumulator's.  Unlike the noise floor of a case this has the claim's
own size and runs on BLAS, so routing flips where it would, and a wrong program is measured as fast as it
runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np

from refimpl.cases.claims import Claim
from refimpl.numerics.arithmetic import Array, Operand
from refimpl.numerics.floating import Floating

FREQUENCY = 4.0  # roundings of an angle, whose frequency is a power computed in float32
_ODD = np.uint64(0x9E3779B97F4A7C15)
Item = TypeVar("Item")
Out = TypeVar("Out")


class Jittered(Floating):
    """The roundings are functions of the value, the place in the program and the seed."""

    def __init__(self, claim: Claim, seed: int) -> None:
        super().__init__(np.float64)
        self.name = f"{claim.name}, jittered"
        self._claim = claim
        self._key = seed << 32

    def at(self, site: str, x: Array) -> Array:
        return x + self._claim.storage * x * self._draw(x)

    def operand(self, site: str, x: Array) -> Operand:
        return Operand(self._read(x))

    def matmul(self, a: Array, b: Array) -> Array:
        a, b = self._read(a), self._read(b)
        y = super().matmul(a, b)
        return self._summed(y, super().matmul(a * a, b * b), a.shape[-1])

    def dot(self, a: Array, b: Array) -> Array:
        return self._summed(super().dot(a, b), super().dot(a * a, b * b), a.shape[-1])

    def sum(self, x: Array, axis: int = -1) -> Array:
        return self._summed(super().sum(x, axis), super().sum(x * x, axis), x.shape[axis])

    def mean(self, x: Array, axis: int = -1) -> Array:
        return np.asarray(self.sum(x, axis) / x.shape[axis])

    def exp(self, x: Array) -> Array:
        return self._step(super().exp(self._argument(x, 1.0)))

    def log(self, x: Array) -> Array:
        return self._step(super().log(x))

    def sqrt(self, x: Array) -> Array:
        return self._step(super().sqrt(x))

    def sin(self, x: Array) -> Array:
        return self._step(super().sin(self._argument(x, FREQUENCY)))

    def cos(self, x: Array) -> Array:
        return self._step(super().cos(self._argument(x, FREQUENCY)))

    def sigmoid(self, x: Array) -> Array:
        return self._step(super().sigmoid(self._argument(x, 1.0)))

    def softmax(self, x: Array) -> Array:
        return self._step(super().softmax(self._argument(x, 1.0)))

    def segment_sum(self, x: Array, ids: Array, n: int) -> Array:
        return self._step(super().segment_sum(x, ids, n))

    def each(self, call: Callable[[Item], Out], items: Iterable[Item]) -> list[Out]:
        return [call(item) for item in items]  # in order: every call draws the next numbers

    def _draw(self, x: Array) -> Array:
        """In [-1, 1), from the bits of x: a rounding repeats where the value does."""
        self._key += 1
        bits = np.asarray(x, np.float64).view(np.uint64)
        mixed = ((bits ^ (bits >> np.uint64(29))) + np.uint64(self._key)) * _ODD
        mixed = (mixed ^ (mixed >> np.uint64(32))) * _ODD
        unit: Array = mixed.view(np.int64) * 2.0**-63
        return unit

    def _read(self, x: Array) -> Array:
        """A value as a matrix product reads it: what is exact in bfloat16 loses nothing."""
        bits = np.asarray(x, np.float64).view(np.uint64)
        exact = (bits & np.uint64((1 << 45) - 1)) == 0
        return np.where(exact, x, x + self._claim.product * x * self._draw(x))

    def _step(self, x: Array) -> Array:
        """One operation inside of a step."""
        return x + self._claim.accumulate * x * self._draw(x)

    def _argument(self, x: Array, roundings: float) -> Array:
        finite = np.where(np.isfinite(x), x, 0.0)
        return x + self._claim.accumulate * roundings * (np.abs(finite) + 1.0) * self._draw(x)

    def _summed(self, y: Array, squares: Array, n: int) -> Array:
        """A sum of n terms with the error of adding them in some order, as the noise floor draws it."""
        size = np.sqrt(n * (squares + y * y))
        return np.asarray(y + self._claim.accumulate * size * self._draw(y))
