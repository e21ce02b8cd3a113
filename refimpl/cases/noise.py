"""The noise floor: what independent roundings really do to a result.  SPEC VERDICT-4.

A bound adds up the worst of every rounding, so it grows with the length n of a sum, and true errors with
its square root.  The noise floor is measured: the case runs in the exact arithmetic with every rounding of
one kind (storage, product, accumulate) replaced by a random relative change of at most one small roundoff.
The difference from the undisturbed run, divided by that roundoff, is the noise per unit of roundoff, and a
claim's noise joins its three kinds.

Storage roundings are to nearest, hence symmetric.  Products and sums may also be cut, as matrix units do,
so every second run moves them towards zero only.  The error of a sum of n terms t_1 ... t_n is drawn with
the standard deviation sqrt(n) u sqrt(sum t^2 + (sum t)^2), which is at least that of adding them one by
one: the partial sums of terms of random sign grow like sqrt(i) t, of equal ones like i t, so that one by
one gives sqrt(n / 6) u sqrt(sum t^2) and sqrt(n / 9) u |sum t|.

Random numbers come from the generator and all the rest is exact or one IEEE operation, so the noise of a
case has the same bits wherever it is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np

from refimpl.cases.claims import PARTS
from refimpl.numerics import generator
from refimpl.numerics.arithmetic import Array, Exact, Operand, Weight
from refimpl.numerics.contraction import contract, sum_
from refimpl.numerics.formats import BF16, round_to

UNIT = 2.0**-24  # of the disturbance: small, so that the response is linear, and far above float64's own
FREQUENCY = 4.0  # roundings of an angle, whose frequency is a power computed in float32
SCALED = ("attention.query",)  # what some scale before a product, which then reads a value of many bits
COMPUTED = 1.0 + 2.0**-50  # nothing beside UNIT, and no value has few bits after it
Item = TypeVar("Item")
Out = TypeVar("Out")


class Noisy(Exact):
    """The exact arithmetic with one kind of rounding disturbed."""

    order_free = False  # contributions are contracted where they arise, as implementations do

    def __init__(self, kind: str, seed: int) -> None:
        assert kind in PARTS
        self.name = f"noise of {kind}"
        self.kind = kind
        self.towards_zero = kind != "storage" and seed % 2 == 1
        self._seed = seed
        self._calls = 0

    def at(self, site: str, x: Array) -> Array:
        if self.kind == "storage":
            return x + UNIT * np.where(np.isfinite(x), x, 0.0) * self._draw(x.shape)
        if self.kind == "product" and site in SCALED:
            return x * COMPUTED
        return self._step(x)

    def operand(self, site: str, x: Array) -> Operand:
        return Operand(self._read(x))

    def fprop(self, x: Operand, w: Weight) -> Array:
        return self._product(x.value, w.value)

    def dgrad(self, dy: Operand, w: Weight) -> Array:
        return self._product(dy.value, w.value.T)

    def wgrad(self, dy: Operand, x: Operand) -> Array:
        return self._product(dy.value.T, x.value.T)

    def matmul(self, a: Array, b: Array) -> Array:
        return self._product(self._read(a), self._read(b))

    def dot(self, a: Array, b: Array) -> Array:
        return self.sum(a * b)

    def sum(self, x: Array, axis: int = -1) -> Array:
        total = sum_(x, axis)
        if self.kind != "accumulate":
            return total
        total = total + self._drift(x, axis, total)
        return total + self._spread(x.shape[axis], sum_(x * x, axis), total)

    def mean(self, x: Array, axis: int = -1) -> Array:
        average: Array = self.sum(x, axis) / x.shape[axis]
        return average

    def exp(self, x: Array) -> Array:
        value = super().exp(x)
        disturbed: Array = value + value * self._argument(x, x)
        return disturbed

    def log(self, x: Array) -> Array:
        return self._step(super().log(x))

    def sqrt(self, x: Array) -> Array:
        return self._step(super().sqrt(x))

    def sin(self, x: Array) -> Array:
        return super().sin(x + FREQUENCY * self._argument(x, x))

    def cos(self, x: Array) -> Array:
        return super().cos(x + FREQUENCY * self._argument(x, x))

    def sigmoid(self, x: Array) -> Array:
        value = super().sigmoid(x)
        disturbed: Array = self._step(value) + value * (1.0 - value) * self._argument(x, x)
        return disturbed

    def dsoftmax(self, p: Array, dp: Array) -> Array:
        """<dp, p> is also formed as <do, o>, whose roundings do not cancel against those of dp."""
        terms = dp * p
        if self.kind != "accumulate":
            terms = terms + UNIT * terms * self._draw(terms.shape)
        dx: Array = p * (dp - self.sum(terms)[..., None])
        return dx

    def segment_sum(self, x: Array, ids: Array, n: int) -> Array:
        hot = self.array(np.arange(n)[:, None] == ids)  # (n, T)
        return self._product(hot, x.T)

    def each(self, call: Callable[[Item], Out], items: Iterable[Item]) -> list[Out]:
        return [call(item) for item in items]  # in order: every call draws the next random numbers

    def _draw(self, shape: tuple[int, ...]) -> Array:
        """Uniform in [-1, 1), or in [-1, 0) where roundings are towards zero."""
        self._calls += 1
        key = generator.tensor_key(self._seed, f"noise {self.kind} {self._calls}")
        raw = generator.words(key, 0, int(np.prod(shape, dtype=np.int64)))
        unit: Array = (raw >> np.uint64(11)).astype(np.float64).reshape(shape) * 2.0**-53
        return unit - 1.0 if self.towards_zero else 2.0 * unit - 1.0

    def _step(self, x: Array) -> Array:
        """One operation inside of a step."""
        if self.kind != "accumulate":
            return x
        return x + UNIT * np.where(np.isfinite(x), x, 0.0) * self._draw(np.shape(x))

    def _drift(self, x: Array, axis: int, total: Array) -> Array:
        """What sums of squares of few bits lose when they are added one by one, in every row alike.

        A square is 0 or 1 modulo 4.  Where the last bit of a partial sum stands for 4 units of the terms,
        half of the terms lose one unit: an eighth of an ulp on average, at most a quarter of the roundoff
        of the partial sum, which is n / 8 roundoffs of the total.
        """
        bits = np.ascontiguousarray(x, np.float64).view(np.uint64)
        if (bits & np.uint64((1 << 37) - 1)).any() or x.min() < 0.0:
            return np.zeros_like(total)
        return np.asarray(UNIT * (x.shape[axis] / 8.0) * total * self._draw((1,))[0])

    def _argument(self, x: Array, scale: Array) -> Array:
        """The rounding of an elementary function's argument, which the function magnifies."""
        if self.kind != "accumulate":
            return np.zeros_like(x)
        return UNIT * (np.where(np.isfinite(scale), np.abs(scale), 0.0) + 1.0) * self._draw(x.shape)

    def _read(self, x: Array) -> Array:
        """A value as a matrix product reads it: what is exact in bfloat16 loses nothing."""
        if self.kind != "product":
            return x
        bits = np.ascontiguousarray(x, np.float64).view(np.uint64)
        computed = (bits & np.uint64((1 << 45) - 1)) != 0
        if not computed.any():
            return x
        return np.where(computed, x + UNIT * x * self._draw(x.shape), x)

    def _product(self, a: Array, b: Array) -> Array:
        y = contract(a, b)
        if self.kind != "accumulate":
            return y
        # few bits are enough for a deviation, and are contracted fast
        squares = contract(round_to(a * a, BF16), round_to(b * b, BF16))
        return y + self._spread(a.shape[-1], squares, y)

    def _spread(self, n: int, squares: Array, total: Array) -> Array:
        size = np.sqrt(n * (squares + total * total))
        drawn = self._draw(np.shape(total))
        return np.asarray(UNIT * size * (np.sign(total) * drawn if self.towards_zero else drawn))
