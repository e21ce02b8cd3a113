"""Operands of contractions, cut into slices whose products are exact.  SPEC EXACT-1.

A row x (K,) with norm below 2^e becomes  x = head + middle + tail:

head    multiples of 2^(e-26);        |head|_2   <= 2^e + rounding
middle  multiples of 2^(e+s-51);      |middle|_2 <= 2^(e+s-26),  with 2^s >= sqrt(K) / 2
tail    what is left, any float64;    |tail|_2   <= 2^(e+2s-51)

By Cauchy-Schwarz head x head and head x middle stay below 2^53 of their units, so a BLAS product of them is
exact in whatever order it adds.  All cuts depend on the row alone.  Middle and tail are kept only where they
are not zero: numbers of few bits (bf16, E4M3, small integers) have none, or have them in few columns.

Source: Ozaki, Ogita, Oishi and Rump 2012, with norms in place of maxima.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refimpl.errors import Invalid
from refimpl.numerics.eft import Array
from refimpl.numerics.summation import _float64

CHUNK = 1 << 16  # elements that are cut at a time, so that the passes over them stay in the cache
SMALLEST, LARGEST = 2.0**-600, 2.0**600  # squared norms of rows that need no scaling
SLACK = 1.0 + 2.0**-20  # covers the rounding of a plain sum of squares

Ints = NDArray[np.int64]
Columns = NDArray[np.intp] | None


def spread_bits(length: int) -> int:
    """The smallest s with 2^s >= sqrt(length) / 2."""
    return ((length - 1).bit_length() + 1) // 2 - 1


@dataclass(frozen=True)
class Frame:
    """Rows scaled to a safe range: value = frame * 2^shift up to what underflows."""

    x: Array  # (..., R, K)  finite; rows with NaN or infinities are zero
    exponent: Ints  # (..., R)  norm below 2^exponent
    shift: Ints | None  # (..., R)  None where all are zero
    special: NDArray[np.bool_] | None  # (..., R)  rows with NaN or infinities
    lossy: bool  # something underflowed when it was scaled

    def rows(self, index: Any) -> Frame:
        at = (..., index)
        return Frame(
            self.x[(..., index, slice(None))],
            self.exponent[at],
            None if self.shift is None else self.shift[at],
            None if self.special is None else self.special[at],
            self.lossy,
        )


@dataclass(frozen=True)
class Slices:
    """frame = head + middle + tail; middle and tail hold only the listed columns."""

    head: Array  # (..., R, K)
    middle: Array | None = None  # (..., R, C)  None where head is everything
    columns: Columns = None  # (C,)  of middle; None for all of them
    tail: Array | None = None  # (..., R, D)  None where head and middle are everything
    tail_columns: Columns = None  # (D,)  of tail

    def rows(self, index: Any) -> Slices:
        at = (..., index, slice(None))
        return Slices(
            self.head[at],
            None if self.middle is None else self.middle[at],
            self.columns,
            None if self.tail is None else self.tail[at],
            self.tail_columns,
        )


def frame(value: Array) -> Frame:
    """value (..., R, K)  ->  its frame"""
    squares = np.vecdot(value, value)
    safe = (squares > SMALLEST) & (squares < LARGEST)
    if safe.all():
        return Frame(value, np.frexp(np.sqrt(squares * SLACK))[1], None, None, False)
    return _scaled_frame(value, squares, ~safe)


def _scaled_frame(value: Array, squares: Array, unsafe: NDArray[np.bool_]) -> Frame:
    rows = value[unsafe]
    largest = np.abs(rows).max(axis=-1)
    special = ~np.isfinite(largest)
    if not largest.any():
        return Frame(value, np.frexp(np.sqrt(squares * SLACK))[1], None, None, False)
    power = np.where(special, 0, np.frexp(largest)[1]).astype(np.int64)
    scaled = np.where(special[:, None], 0.0, np.ldexp(rows, -power[:, None]))
    lossy = bool((~special & (np.ldexp(scaled, power[:, None]) != rows).any(-1)).any())
    x = value.copy()
    x[unsafe] = scaled
    shift = np.zeros(squares.shape, np.int64)
    shift[unsafe] = power
    mark = np.zeros(squares.shape, np.bool_)
    mark[unsafe] = special
    squares = squares.copy()
    squares[unsafe] = np.vecdot(scaled, scaled)
    exponent = np.frexp(np.sqrt(squares * SLACK))[1]
    return Frame(x, exponent, shift if shift.any() else None, mark if special.any() else None, lossy)


class Room:
    """Memory for the slices of one block, used again by the next: fresh pages cost as much as the cuts."""

    def __init__(self) -> None:
        self._pieces: dict[str, Array] = {}

    def array(self, name: str, shape: tuple[int, int]) -> Array:
        size = shape[0] * shape[1]
        if name not in self._pieces or self._pieces[name].size < size:
            self._pieces[name] = np.empty(size)
        return self._pieces[name][:size].reshape(shape)


def cut(f: Frame, room: Room) -> Slices:
    """A frame  ->  its slices, in that room"""
    length = f.x.shape[-1]
    x, exponent = f.x.reshape(-1, length), f.exponent.reshape(-1)
    coarse = np.ldexp(1.5, exponent + 26)[:, None]
    filled = _filled(x, coarse)
    if filled is None:
        return Slices(f.x)
    columns = _few(filled)
    fine = np.ldexp(1.5, exponent + (spread_bits(length) + 1))[:, None]
    head = room.array("head", x.shape)
    middle = room.array("middle", (len(x), length if columns is None else len(columns)))
    tail = room.array("tail", middle.shape)
    left = np.zeros(middle.shape[1], np.bool_)
    for at in _chunks(x):
        _cut_rows(x[at], coarse[at], fine[at], columns, head[at], middle[at], tail[at])
        if _few(left) is not None:
            left |= tail[at].any(axis=0)
    lead = f.x.shape[:-1]
    first, second = head.reshape(f.x.shape), middle.reshape(*lead, -1)
    if not left.any():
        return Slices(first, second, columns)
    some = _few(left)
    if some is None:
        return Slices(first, second, columns, tail.reshape(*lead, -1), columns)
    of_tail = some if columns is None else columns[some]
    return Slices(first, second, columns, tail[:, some].reshape(*lead, -1), of_tail)


def _few(filled: NDArray[np.bool_]) -> Columns:
    # the columns that are filled, if they are so few that picking them pays
    return np.flatnonzero(filled) if np.count_nonzero(filled) * 4 < len(filled) else None


def _chunks(x: Array) -> list[slice]:
    step = max(1, CHUNK // x.shape[-1])
    return [slice(i, i + step) for i in range(0, len(x), step)]


def _filled(x: Array, sigma: Array) -> NDArray[np.bool_] | None:
    """x (R, K)  ->  (K,) where head is not everything, or None if it is; stops when that is many columns."""
    filled = None
    for at in _chunks(x):
        head = x[at] + sigma[at]
        head -= sigma[at]
        differs = head != x[at]
        if differs.any():
            new = differs.any(axis=0)
            filled = new if filled is None else filled | new
            if _few(filled) is None:
                break
    return filled


def _cut_rows(
    x: Array,
    coarse: Array,
    fine: Array,
    columns: Columns,
    head: Array,
    middle: Array,
    tail: Array,
) -> None:
    """Fills head, middle and tail: adding and subtracting 1.5 * 2^52 units rounds to multiples of a unit."""
    np.add(x, coarse, out=head)
    head -= coarse
    if columns is None:
        np.subtract(x, head, out=tail)
    else:
        np.subtract(x[:, columns], head[:, columns], out=tail)
    np.add(tail, fine, out=middle)
    middle -= fine
    tail -= middle


class Prepared:
    """An operand that is cut once, when first contracted, and may then meet many partners."""

    def __init__(self, value: ArrayLike, frame_: Frame | None = None, slices: Slices | None = None) -> None:
        self.value = _float64(value)
        if self.value.ndim < 2:
            raise Invalid(f"an operand has shape {self.value.shape}, but needs at least rows and columns.")
        self._frame, self._slices = frame_, slices
        self._blocks: dict[tuple[int, int], Prepared] = {}
        self._room: Room | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def frame(self) -> Frame:
        if self._frame is None:
            self._frame = frame(self.value)
        return self._frame

    @property
    def slices(self) -> Slices:
        if self._slices is None:
            self._slices = cut(self.frame, self._room or Room())
        return self._slices

    def cut(self) -> Prepared:
        """Cuts now what would be cut at the first contraction; returns itself."""
        assert self.slices.head.shape == self.shape
        return self

    def block(self, start: int, stop: int, room: Room | None) -> Prepared:
        """The rows start to stop of a matrix: kept for the next partner, or cut in a room used again."""
        if (start, stop) in self._blocks:
            return self._blocks[start, stop]
        part = self.rows(slice(start, stop))
        if room is None:
            self._blocks[start, stop] = part
        else:
            part._room = room
        return part

    def rows(self, index: Any) -> Prepared:
        """The rows index of axis -2; what has been cut already is gathered, not cut again."""
        at = (..., index, slice(None))
        return Prepared(
            self.value[at],
            None if self._frame is None else self._frame.rows(index),
            None if self._slices is None else self._slices.rows(index),
        )


def prepare(x: ArrayLike | Prepared) -> Prepared:
    """x (..., R, K)  ->  the operand, to be cut along its last axis"""
    return x if isinstance(x, Prepared) else Prepared(x)
