"""A paged cache: rows in pages of a pool that all sequences share.  SPEC DECODE-3.

The token j of a sequence is row j mod 64 of page table[j div 64], in every layer: one block table serves all
layers.  Gathered through the table, rows are those of a cache whose rows lie one after another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from heapq import heapify, heappop, heappush
from typing import Any, Final

import numpy as np

from refimpl.decoding.cache import Kind, append, natural, whole
from refimpl.errors import Invalid
from refimpl.numerics.arithmetic import Array

PAGE: Final = 64  # rows
MOST: Final = 1 << 20  # pages of a pool


class Pool:
    """Pages for the rows of many sequences, and which of them are free; the free one of lowest number is
    given out first."""

    def __init__(self, kind: Kind, pages: int) -> None:
        """Raises Invalid."""
        pages = whole("the number of pages", pages)
        if not 1 <= pages <= MOST:
            raise Invalid(f"the number of pages is {pages}, but it must be in [1, {MOST}].")
        self.kind = kind
        self.pages = {layer: kind.ar.zeros((pages, PAGE, kind.width)) for layer in kind.layers}
        self._free = list(range(pages))

    @property
    def size(self) -> int:
        """The number of pages."""
        return len(next(iter(self.pages.values())))

    @property
    def free(self) -> int:
        """How many pages no sequence has."""
        return len(self._free)

    def cache(self, table: Sequence[int] = (), length: int = 0) -> Paged:
        """A cache in this pool.  With a table, of the tokens that its pages hold already.

        Raises Invalid for a table that names a page twice, one outside of the pool or one of another
        sequence, or that does not fit the length, and changes nothing.
        """
        length = self.kind.longer(0, natural("the length of a sequence", length))
        numbers = [whole("an entry of the block table", number) for number in table]
        for number in numbers:
            if not 0 <= number < self.size:
                raise Invalid(
                    f"the block table names page {number}, but it must name pages in [0, {self.size})."
                )
            if number not in self._free or numbers.count(number) > 1:
                raise Invalid(f"the block table names page {number}, but that page is in use.")
        if len(numbers) != needed(length):
            raise Invalid(
                f"the block table has {len(numbers)} pages, but it must have {needed(length)} for {length} "
                f"tokens in pages of {PAGE}."
            )
        self._free = [number for number in self._free if number not in set(numbers)]
        heapify(self._free)
        return Paged(self, numbers, length)

    def take(self, count: int) -> list[int]:
        """So many free pages.  Raises Invalid and changes nothing."""
        if count > self.free:
            raise Invalid(f"the pool has {self.free} free pages, but {count} are needed.")
        return [heappop(self._free) for _ in range(count)]

    def give_back(self, pages: Iterable[int]) -> None:
        """These pages are free again."""
        for page in pages:
            heappush(self._free, page)


class Paged:
    """The rows of one sequence in a pool.  `Pool.cache` makes it."""

    def __init__(self, pool: Pool, table: list[int], length: int) -> None:
        self.kind, self.pool, self._table, self._length = pool.kind, pool, table, length

    @property
    def length(self) -> int:
        return self._length

    @property
    def table(self) -> tuple[int, ...]:
        """The block table: which page holds the tokens from 64 i on."""
        return tuple(self._table)

    def extend(self, more: int) -> None:
        length = self.kind.longer(self._length, natural("the number of new tokens", more))
        self._table += self.pool.take(needed(length) - len(self._table))
        self._length = length

    def write(self, layer: int, start: int, rows: Array) -> None:
        assert start + len(rows) <= self._length
        at = np.arange(start, start + len(rows))
        pages = np.asarray(self._table, np.int64)[at // PAGE]
        self.pool.pages[layer][pages, at % PAGE] = rows

    def rows(self, layer: int) -> Array:
        gathered = self.pool.pages[layer][np.asarray(self._table, np.int64)]  # (pages, 64, C + R)
        return gathered.reshape(-1, self.kind.width)[: self._length]

    def append(self, rows: Mapping[int, Any]) -> None:
        append(self, rows)

    def roll_back(self, length: int) -> None:
        """Pages that hold no token any more go back to the pool."""
        self._length = self.kind.shorter(self._length, length)
        kept = needed(self._length)
        self.pool.give_back(self._table[kept:])
        del self._table[kept:]


def needed(length: int) -> int:
    """How many pages so many tokens take."""
    return -(-length // PAGE)
