"""What a sequence leaves for its later tokens: a row for each token and layer.  SPEC DECODE-1, DECODE-2.

row[j] = [c_kv[j]; k_pe[j]]        the normalised latent (C), then the shared key part, rotated (R)

A layer reads the rows of one sequence in the order of its tokens.  How they lie in memory is the business of
a `Cache`: here one after another, in pages.py in pages of a pool.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import index
from typing import Any, Protocol

import numpy as np

from refimpl.config.model import ModelConfig
from refimpl.errors import Invalid
from refimpl.inputs import read_numbers
from refimpl.numerics.arithmetic import Arithmetic, Array


@dataclass(frozen=True)
class Kind:
    """Whose rows these are: of which layers of which model, in which numbers."""

    config: ModelConfig
    ar: Arithmetic
    layers: tuple[int, ...]

    @staticmethod
    def of(config: ModelConfig, ar: Arithmetic, layers: Iterable[int] | None = None) -> Kind:
        """layers: the decoder layers of the main model, unless they are given."""
        return Kind(config, ar, tuple(range(config.num_hidden_layers) if layers is None else layers))

    @property
    def latent(self) -> int:
        """C, the width of the latent."""
        return self.config.kv_lora_rank

    @property
    def width(self) -> int:
        """C + R, the width of a row."""
        return self.latent + self.config.qk_rope_head_dim

    @property
    def limit(self) -> int:
        """The most tokens of a sequence."""
        return self.config.max_position_embeddings

    def fits(self, other: Kind) -> bool:
        """Whether rows of one kind are rows of the other."""
        same = (self.config, self.layers) == (other.config, other.layers)
        return same and self._numbers == other._numbers

    @property
    def _numbers(self) -> tuple[Any, ...]:
        return self.ar.name, self.ar.zeros((0,)).dtype, getattr(self.ar, "recipe", None)

    def longer(self, length: int, more: int) -> int:
        """length + more.  Raises Invalid when that is longer than the position table."""
        if length + more > self.limit:
            raise Invalid(
                f"the context has {length} tokens and {more} more, but it must have at most {self.limit}: "
                "max_position_embeddings."
            )
        return length + more

    def shorter(self, length: int, to: int) -> int:
        """to, as an int.  Raises Invalid when nothing can be rolled back to it."""
        to = whole("the length to roll back to", to)
        if not 0 <= to <= length:
            raise Invalid(f"the length to roll back to is {to}, but it must be in [0, {length}].")
        return to

    def rows(self, given: Mapping[int, Any]) -> tuple[dict[int, Array], int]:
        """Layer -> rows (n, C + R) of every layer, as numbers of this kind, and n.  Raises Invalid."""
        if set(given) != set(self.layers):
            raise Invalid(f"rows are given for layers {sorted(given)}, but they must be for {self.layers}.")
        ready = {n: self.ar.array(read_numbers(f"rows of layer {n}", given[n])) for n in self.layers}
        counts = {len(rows) if rows.ndim == 2 else -1 for rows in ready.values()}
        for layer, rows in ready.items():
            if len(counts) != 1 or rows.ndim != 2 or rows.shape[1] != self.width:
                raise Invalid(
                    f"rows of layer {layer} have shape {rows.shape}, but it must be (n, {self.width}), with "
                    "one n for all layers."
                )
        return ready, counts.pop()


class Cache(Protocol):
    """The rows of one sequence."""

    kind: Kind

    @property
    def length(self) -> int:
        """How many tokens it holds."""

    def extend(self, more: int) -> None:
        """Room for so many more tokens, which count from now on.  Raises Invalid and changes nothing."""

    def write(self, layer: int, start: int, rows: Array) -> None:
        """rows (n, C + R) of the tokens from `start` on."""

    def rows(self, layer: int) -> Array:
        """(length, C + R), in the order of the tokens; not to be changed."""

    def append(self, rows: Mapping[int, Any]) -> None:
        """Layer -> rows (n, C + R) of n more tokens.  Raises Invalid and changes nothing."""

    def roll_back(self, length: int) -> None:
        """Only the first `length` tokens remain.  Raises Invalid and changes nothing."""


class Contiguous:
    """Rows one after another, with room that doubles when it is used up."""

    def __init__(self, kind: Kind, room: int = 0) -> None:
        """room: for how many tokens there is room from the start.  Raises Invalid."""
        self.kind, self._length = kind, 0
        self._held = {layer: self._empty(kind.longer(0, natural("room", room))) for layer in kind.layers}

    @property
    def length(self) -> int:
        return self._length

    def extend(self, more: int) -> None:
        length = self.kind.longer(self._length, natural("the number of new tokens", more))
        for layer, held in self._held.items():
            if length > len(held):
                self._held[layer] = self._empty(min(max(length, 2 * len(held)), self.kind.limit))
                self._held[layer][: self._length] = held[: self._length]
        self._length = length

    def write(self, layer: int, start: int, rows: Array) -> None:
        assert start + len(rows) <= self._length
        self._held[layer][start : start + len(rows)] = rows

    def rows(self, layer: int) -> Array:
        return self._held[layer][: self._length]

    def append(self, rows: Mapping[int, Any]) -> None:
        append(self, rows)

    def roll_back(self, length: int) -> None:
        self._length = self.kind.shorter(self._length, length)

    def _empty(self, room: int) -> Array:
        return self.kind.ar.zeros((room, self.kind.width))


def append(cache: Cache, rows: Mapping[int, Any]) -> None:
    """`Cache.append` of every cache."""
    ready, more = cache.kind.rows(rows)
    start = cache.length
    cache.extend(more)
    for layer, given in ready.items():
        cache.write(layer, start, given)


def natural(name: str, value: Any) -> int:
    """A whole number that is at least 0.  Raises Invalid."""
    number = whole(name, value)
    if number < 0:
        raise Invalid(f"{name} is {number}, but it must be at least 0.")
    return number


def whole(name: str, value: Any) -> int:
    """A whole number.  Raises Invalid."""
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        return index(value)
    except TypeError:
        raise Invalid(f"{name} is {value!r:.40}, but it must be a whole number.") from None
