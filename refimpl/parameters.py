"""Weights, ready for an arithmetic: converted and prepared once, kept while there is room."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from threading import Lock
from typing import Any

from refimpl.checkpoint.weights import Weights
from refimpl.numerics.arithmetic import Arithmetic, Array, Weight
from refimpl.numerics.sites import linear

LIMIT = 4 << 30  # bytes
PREPARED = 7  # an exact operand is kept beside up to three slices for each of its two sides


def placed(weight: Weight, name: str) -> Weight:
    """A weight that knows the sites of its linear, from its checkpoint name."""
    return replace(weight, site=linear(name.rpartition(".")[0]))


class CachedParameters:
    """The weights as arrays and as prepared operands, with a bounded cache, least recently used out first.

    Experts run in several threads and share it: the lock guards what is held, not the reading of a weight.
    """

    def __init__(self, weights: Weights, ar: Arithmetic, limit: int = LIMIT) -> None:
        self._weights, self._ar, self._limit = weights, ar, limit
        self._held: OrderedDict[tuple[str, bool], tuple[Any, int]] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    @property
    def held_bytes(self) -> int:
        """What the cache takes."""
        return self._bytes

    def array(self, name: str) -> Array:
        """A weight in the carrier's dtype."""
        name = self._weights.canonical(name)
        array: Array | None = self._find((name, False))
        if array is None:
            array = self._ar.array(self._weights[name])
            self._hold((name, False), array, array.nbytes)
        return array

    def weight(self, name: str) -> Weight:
        """A weight prepared for contractions."""
        name = self._weights.canonical(name)
        weight: Weight | None = self._find((name, True))
        if weight is None:
            weight = placed(self._ar.weight(self._weights[name]), name)
            if self._ar.reads_codes and self._weights.is_quantised(name):
                weight = replace(weight, stored=self._weights.quantised(name))
            self._hold((name, True), weight, weight.value.nbytes * (PREPARED if self._ar.order_free else 1))
        return weight

    def _find(self, key: tuple[str, bool]) -> Any:
        with self._lock:
            if key not in self._held:
                return None
            self._held.move_to_end(key)
            return self._held[key][0]

    def _hold(self, key: tuple[str, bool], value: Any, size: int) -> None:
        with self._lock:
            if size > self._limit or key in self._held:  # another thread may have been faster
                return
            self._held[key] = (value, size)
            self._bytes += size
            while self._bytes > self._limit:
                _, (_, freed) = self._held.popitem(last=False)
                self._bytes -= freed
