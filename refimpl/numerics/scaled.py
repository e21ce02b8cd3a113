"""Operands of block-scaled products: quantised once, read by several GEMMs.  SPEC RECIPE-5 to RECIPE-7.

What crosses a site in an FP8 recipe is codes with scales.  Fprop and Dgrad read them as they are, contracted
along the rows; Wgrad contracts over tokens and reads them quantised anew, in tiles along the tokens.  Rows of
tokens are gathered without quantising again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from refimpl.numerics.arithmetic import Array, Dropped, Operand, Weight
from refimpl.numerics.blockscale import ACTIVATION, BLOCK, TRANSPOSED, Quantised, Tile, dequantise, quantise
from refimpl.numerics.formats import FORMATS, Codes
from refimpl.numerics.recipe import CARRIER, FP8, Recipe, Rule

SIZE = 128  # values along the contracted axis that share a scale
SCALE_BYTES = 4  # of a float32 scale

_TILES: dict[str, Tile] = {"1x128": ACTIVATION, "128x1": TRANSPOSED, "128x128": BLOCK}


@dataclass(frozen=True)
class Rows:
    """codes (R, C padded to whole tiles with zeros) and float32 scales (R, C / 128): what a GEMM reads."""

    codes: Codes
    scales: Array
    format: str
    origin: Origin | None = None  # where somebody wants to know it

    def take(self, index: Array) -> Rows:
        origin = None if self.origin is None else self.origin.take(index)
        return Rows(self.codes[index], self.scales[index], self.format, origin)


@dataclass(frozen=True)
class Origin:
    """What was quantised, x (R, C), by which rule, and whether what is read is the transposed matrix."""

    x: Array
    rule: Rule
    transposed: bool

    def take(self, index: Array) -> Origin:
        assert not self.transposed  # tokens are rows
        return Origin(self.x[index], self.rule, False)


Quantise = Callable[[Array, Rule, bool], Rows]


def as_rows(x: Array, rule: Rule, transposed: bool = False) -> Rows:
    """x (R, C)  ->  its codes as rows, or those of x^T."""
    q = quantised(x, rule)
    return rows(q.transposed if transposed else q)


def quantised(x: Array, rule: Rule) -> Quantised:
    """x (R, C)  ->  codes and scales as a rule says, of the float32 nearest to x."""
    return quantise(np.asarray(x, np.float32), rule.scale, tile_of(rule, x.shape), FORMATS[rule.format])


def tile_of(rule: Rule, shape: tuple[int, ...]) -> Tile:
    """Rows and columns of a tile of a matrix: "tensor" is one tile."""
    return _TILES.get(rule.tile, (max(1, shape[0]), max(1, shape[1])))


def rows(q: Quantised) -> Rows:
    """Any tiles, as rows with a scale for 128 columns of a row."""
    high, wide = q.codes.shape
    blocks = -(-wide // SIZE)
    scales = np.repeat(q.scales, q.tile[0], 0)[:high] if q.tile[0] > 1 else q.scales
    if q.tile[1] != SIZE:
        scales = np.repeat(scales, -(-q.tile[1] // SIZE), 1)[:, :blocks]
    codes = q.codes
    if wide % SIZE:
        codes = np.zeros((high, blocks * SIZE), codes.dtype)
        codes[:, :wide] = q.codes
    return Rows(np.ascontiguousarray(codes), np.ascontiguousarray(scales), q.format.name)


def rounded(x: Array, rule: Rule) -> Array:
    """x (..., C)  ->  float32 (..., C): quantised and dequantised."""
    flat = x.reshape(-1, x.shape[-1]) if x.size else x.reshape(0, max(1, x.shape[-1]))
    return dequantise(quantised(flat, rule)).reshape(x.shape)


@dataclass(frozen=True)
class Coded:
    """A value kept as codes and scales for the backward pass."""

    quantised: Quantised
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return coded_bytes(self.quantised)

    def value(self) -> Array:
        return dequantise(self.quantised).reshape(self.shape).astype(self.dtype)


def coded_bytes(q: Quantised) -> int:
    """Codes of 8 or 12 bits and their float32 scales."""
    return q.codes.size * q.format.bits // 8 + q.scales.size * SCALE_BYTES


@dataclass(frozen=True)
class Plan:
    """The rules of one operand: how it is kept, and how the GEMMs read it."""

    site: str
    own: Rule  # at the site itself
    across: Rule  # as Fprop reads it, or Dgrad a gradient
    along: Rule  # as Wgrad reads it

    @staticmethod
    def of(recipe: Recipe, site: str) -> Plan:
        own = recipe.rule(site)
        across = own if site.endswith(".dy") else recipe.rule(f"{site}.fprop")
        if across.format == CARRIER:  # as it is kept
            across = own
        return Plan(site, own, across, recipe.rule(f"{site}.wgrad"))


class Scaled(Operand):
    """An operand (T, K) as codes with scales.

    stored    what is kept: the codes of the site's own rule
    across    what Fprop or Dgrad reads
    source    the values that were quantised, if Wgrad reads those
    """

    def __init__(
        self,
        plan: Plan,
        stored: Rows,
        across: Rows | None,
        source: Array | None,
        width: int,
        dtype: np.dtype,
        keep_all: bool = False,
        quantise: Quantise = as_rows,
    ) -> None:
        self.plan, self.stored, self.source, self.width = plan, stored, source, width
        self._across, self._dtype, self._keep_all, self._quantise = across, dtype, keep_all, quantise

    @staticmethod
    def made(plan: Plan, x: Array, keep_all: bool = False, quantise: Quantise = as_rows) -> Scaled:
        stored = quantise(x, plan.own, False)
        across = None
        if plan.across is not plan.own and plan.across.scaled:
            across = quantise(_read(plan.across, stored, x), plan.across, False)
        source = x if plan.along.of == "source" else None
        return Scaled(plan, stored, across, source, x.shape[1], x.dtype, keep_all, quantise)

    @property
    def value(self) -> Array:
        return widened(self.stored, self.width).astype(self._dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.stored.codes), self.width

    @property
    def across(self) -> Rows | None:
        """(T, K) as Fprop or Dgrad reads it; None for a format that tensor cores do not take."""
        if self._across is not None:
            return self._across
        return self.stored if self.plan.across.scaled and self.stored.format in FP8 else None

    @property
    def across_value(self) -> Array:
        """(T, K) in numbers, as Fprop or Dgrad reads it."""
        across = self.across
        return self.value if across is None else widened(across, self.width).astype(self._dtype)

    @property
    def along_value(self) -> Array:
        """(T, K) in numbers, as Wgrad reads it."""
        if self.plan.along.scaled:
            return widened(self.along, self.shape[0]).T.astype(self._dtype)
        return _read(self.plan.along, self.stored, self.source)[:, : self.width].astype(self._dtype)

    @cached_property
    def along(self) -> Rows:
        """(K, T) as Wgrad reads it, tokens padded to whole tiles with zeros."""
        x = _read(self.plan.along, self.stored, self.source)[:, : self.width]
        return self._quantise(x, self.plan.along, True)

    @property
    def kept(self) -> Operand | Dropped:
        return self if self._keep_all else self._kept  # an object that holds itself is freed late

    @cached_property
    def _kept(self) -> Operand | Dropped:
        if self.plan.own.keep == "recomputed":
            return Dropped()
        own = (self.source, self.width, self._dtype)
        return Scaled(self.plan, self.stored, None, *own, quantise=self._quantise)

    @property
    def nbytes(self) -> int:
        if self.source is not None:
            return self.source.size * 2  # what is quantised anew is BF16
        bits = FORMATS[self.stored.format].bits
        return len(self.stored.codes) * self.width * bits // 8 + self.stored.scales.size * SCALE_BYTES

    def rows(self, index: Array) -> Scaled:
        return Scaled(
            self.plan,
            self.stored.take(index),
            None if self._across is None else self._across.take(index),
            None if self.source is None else self.source[index],
            self.width,
            self._dtype,
            self._keep_all,
            self._quantise,
        )


def widened(r: Rows, width: int) -> Array:
    """The values of codes and scales, float32 (R, width)."""
    return dequantise(Quantised(r.codes, r.scales, ACTIVATION, FORMATS[r.format]))[:, :width]


def _read(rule: Rule, stored: Rows, source: Array | None) -> Array:
    if rule.of == "source":
        assert source is not None  # it is kept where a rule reads it
        return source
    return widened(stored, stored.codes.shape[1] if source is None else source.shape[1])


class ScaledWeight(Weight):
    """A weight (N, K) with its blocks, made when a GEMM first reads them; a checkpoint's own where it has."""

    def side(self, rule: Rule, side: str, quantise: Quantise = as_rows) -> Rows:
        """ "across": (N, K) as Fprop reads it; "down": (K, N) as Dgrad does."""
        held: dict[str, Rows] = self.__dict__.setdefault("_sides", {})
        if side not in held:
            if self.stored is None:
                held[side] = quantise(self.value, rule, side == "down")
            else:
                held[side] = rows(self.stored if side == "across" else self.stored.transposed)
        return held[side]
