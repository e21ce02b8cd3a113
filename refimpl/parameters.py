"""Weights, ready for an arithmetic: converted and prepared once, kept while there is room."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from refimpl.checkpoint.weights import Weights
from refimpl.numerics.arithmetic import Arithmetic, Array, Weight

LIMIT = 4 << 30  # bytes
PREPARED = 9  # an exact operand is kept with up to four slices for each of two sides


class CachedParameters:
    """The weights as arrays and as prepared operands, with a bounded cache, least recently used out first."""

    def __init__(self, weights: Weights, ar: Arithmetic, limit: int = LIMIT) -> None:
        self._weights, self._ar, self._limit = weights, ar, limit
        self._held: OrderedDict[tuple[str, bool], tuple[Any, int]] = OrderedDict()
        self._bytes = 0

    def array(self, name: str) -> Array:
        """A weight in the carrier's dtype."""
        held = self._held.get((name, False))
        if held is not None:
            array: Array = held[0]
            return array
        array = self._ar.array(self._weights[name])
        self._hold((name, False), array, array.nbytes)
        return array

    def weight(self, name: str) -> Weight:
        """A weight prepared for contractions."""
        held = self._held.get((name, True))
        if held is not None:
            self._held.move_to_end((name, True))
            weight: Weight = held[0]
            return weight
        weight = self._ar.weight(self._weights[name])
        self._hold((name, True), weight, weight.value.nbytes * (PREPARED if self._ar.order_free else 1))
        return weight

    def _hold(self, key: tuple[str, bool], value: Any, size: int) -> None:
        if size > self._limit:
            return
        self._held[key] = (value, size)
        self._bytes += size
        while self._bytes > self._limit:
            _, (_, freed) = self._held.popitem(last=False)
            self._bytes -= freed
