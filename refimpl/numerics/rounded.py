"""The arithmetic of a recipe.  SPEC RECIPE-1 and RECIPE-5 to RECIPE-8.

`Rounded` is the exact arithmetic, and `RoundedFast` the one on float32 and BLAS, with the recipe's roundings:
a value is rounded where it crosses a site, GEMMs whose operands are codes run as `gemm_fp8` says, and what is
saved takes the form that the recipe gives it.  Everything else is as in the arithmetic below.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from refimpl.numerics import formats
from refimpl.numerics.arithmetic import Array, Dropped, Exact, Kept, Operand, Weight
from refimpl.numerics.floating import Floating
from refimpl.numerics.gemm import gemm_fp8
from refimpl.numerics.recipe import CARRIER, Recipe, Rule
from refimpl.numerics.scaled import Coded, Plan, Rows, Scaled, ScaledWeight, as_rows, quantised, rounded

if TYPE_CHECKING:  # a mixin: it stands before the arithmetic whose roundings it adds
    _Base = Exact
else:
    _Base = object

_PART = 1 << 15  # numbers at a time, for the cache


@dataclass(frozen=True)
class Stored:
    """A value kept as numbers of so many bits."""

    array: Array
    bits: int

    @property
    def nbytes(self) -> int:
        return self.array.size * self.bits // 8

    def value(self) -> Array:
        return self.array


class StoredOperand(Operand):
    """An operand of a format without scales."""

    def __init__(self, value: Array, rule: Rule, keep_all: bool) -> None:
        super().__init__(value)
        self._rule, self._keep_all = rule, keep_all

    @property
    def kept(self) -> Operand | Dropped:
        return Dropped() if self._rule.keep == "recomputed" and not self._keep_all else self

    @property
    def nbytes(self) -> int:
        return self.value.size * bits(self._rule.format) // 8

    def rows(self, index: Array) -> Operand:
        return StoredOperand(self.value[index], self._rule, self._keep_all)


def bits(name: str) -> int:
    """Of a value in a format; the carrier counts as float32."""
    return 32 if name == CARRIER else formats.FORMATS[name].bits


class _Sites(_Base):
    """What a recipe changes in the arithmetic that stands behind it in the order of bases."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.name = recipe.name
        self.order_free = type(self).order_free and not recipe.scaled and not recipe.adds_in_turn
        self.reads_codes = recipe.scaled
        self._rule = cache(recipe.rule)
        self._plan = cache(lambda site: Plan.of(recipe, site))
        self._keep_all = False

    def at(self, site: str, x: Array) -> Array:
        rule = self._rule(site)
        return self.array(rounded(x, rule)) if rule.scaled else self.to_format(rule.format, x)

    def fused(self, site: str, x: Array) -> Array:
        return self.at(f"fused.{site}", x)

    def stores(self, site: str) -> bool:
        return self._rule(f"fused.{site}").format != CARRIER

    def reads_source(self, site: str) -> bool:
        return self._rule(site).of == "source"

    def product_sum(self, a: Array, b: Array) -> Array:
        if not self.stores("grad.products"):
            return super().product_sum(a, b)
        return self.sum(self.fused("grad.products", a * b), 0)

    def row_sum(self, x: Array, ids: Array, n: int) -> Array:
        if not self.stores("grad.rows"):
            return super().row_sum(x, ids, n)
        total = self.zeros((n, x.shape[1]))
        for tokens in occurrences(ids):  # a row takes one token at a time, in their order
            total[ids[tokens]] = self.fused("grad.rows", total[ids[tokens]] + x[tokens])
        return total

    def to_format(self, name: str, x: Array) -> Array:
        """x (...), rounded to nearest even, once."""
        return x if name == CARRIER else self.array(formats.round_to(x, formats.FORMATS[name]))

    def keep(self, site: str, x: Array) -> Kept:
        rule = self._rule(site)
        if rule.keep == "recomputed" and not self._keep_all:
            return Dropped()
        if rule.scaled:
            return Coded(quantised(x.reshape(-1, x.shape[-1]), rule), x.shape, x.dtype)
        return Stored(x, bits(rule.format))

    def operand(self, site: str, x: Array) -> Operand:
        rule = self._rule(site)
        if rule.scaled:
            return Scaled.made(self._plan(site), x, self._keep_all, self.quantise)
        return StoredOperand(self.at(site, x), rule, self._keep_all)

    def weight(self, w: Array) -> Weight:
        return ScaledWeight(self.array(w))

    def fprop(self, x: Operand, w: Weight) -> Array:
        if isinstance(x, Scaled):
            if x.across is not None and self._reads_codes(w):
                return self.gemm(f"{w.site}.fprop", x.across, self._side(w, "across"))
            x = Operand(self._plain(x.plan.across, x.across_value))
        return super().fprop(x, w)

    def dgrad(self, dy: Operand, w: Weight) -> Array:
        if isinstance(dy, Scaled):
            if dy.across is not None and self._reads_codes(w):
                return self.gemm(f"{w.site}.dgrad", dy.across, self._side(w, "down"))
            dy = Operand(self._plain(dy.plan.across, dy.across_value))
        return super().dgrad(dy, w)

    def wgrad(self, dy: Operand, x: Operand) -> Array:
        if isinstance(dy, Scaled) and isinstance(x, Scaled) and dy.plan.along.scaled and x.plan.along.scaled:
            return self.gemm(f"{dy.plan.site.removesuffix('.dy')}.wgrad", dy.along, x.along)
        return super().wgrad(self._along(dy), self._along(x))

    def quantise(self, x: Array, rule: Rule, transposed: bool) -> Rows:
        """x (R, C)  ->  its codes with scales as a GEMM reads them, or those of x^T."""
        return as_rows(x, rule, transposed)

    def gemm(self, site: str, a: Rows, b: Rows) -> Array:
        """a (M, K), b (N, K) codes with scales  ->  a b^T (M, N), accumulated as the site's rule says."""
        kernel = self._rule(site).accumulator or "exact"
        product = gemm_fp8(a.codes, a.scales, b.codes, b.scales, kernel, a_format=a.format, b_format=b.format)
        return self.array(product)

    def gradient(self, g: Array) -> Array:
        return self.at("grad", g)

    def recomputes(self, *sites: str) -> bool:
        return not self._keep_all and any(self._rule(site).keep == "recomputed" for site in sites)

    @property
    def keeping(self) -> Any:
        same = copy.copy(self)
        same._keep_all = True
        return same

    def _reads_codes(self, w: Weight) -> bool:
        return isinstance(w, ScaledWeight) and self._rule(f"{w.site}.weight").scaled

    def _side(self, w: Weight, side: str) -> Rows:
        assert isinstance(w, ScaledWeight)
        return w.side(self._rule(f"{w.site}.weight"), side, self.quantise)

    def _along(self, x: Operand) -> Operand:
        return Operand(self._plain(x.plan.along, x.along_value)) if isinstance(x, Scaled) else x

    def _plain(self, rule: Rule, x: Array) -> Array:
        return x if rule.scaled else self.to_format(rule.format, x)


class Rounded(_Sites, Exact):
    """On the exact arithmetic: bits that are the same everywhere."""


class RoundedFast(_Sites, Floating):
    """On float32 and BLAS: fast, with the bits of the platform where no GEMM has codes."""

    def __init__(self, recipe: Recipe) -> None:
        Floating.__init__(self, np.float32)
        _Sites.__init__(self, recipe)

    def to_format(self, name: str, x: Array) -> Array:
        if name in (CARRIER, "fp32"):
            return x
        return nearest_bf16(x) if name == "bf16" else super().to_format(name, x)


def occurrences(ids: Array) -> Iterator[Array]:
    """ids (T,)  ->  the tokens at which an id occurs for the first time, for the second, and so on."""
    order = np.argsort(ids, kind="stable")
    first = np.flatnonzero(np.diff(ids[order], prepend=-1))  # where a run of equal ids begins
    runs = np.diff(np.append(first, len(ids)))
    rank = np.arange(len(ids)) - np.repeat(first, runs)
    for i in range(int(runs.max(initial=0))):
        yield np.sort(order[rank == i])


def nearest_bf16(x: Array) -> Array:
    """x (...) float32  ->  float32 that are bf16: to nearest even; infinities and NaN stay."""
    values = np.ascontiguousarray(x).reshape(-1)
    out = np.empty_like(values)
    for at in range(0, values.size, _PART):
        given = values[at : at + _PART]
        some, up = given.view(np.uint32), out[at : at + _PART].view(np.uint32)
        np.right_shift(some, np.uint32(16), out=up)
        up &= np.uint32(1)
        up += np.uint32(0x7FFF)
        up += some
        up &= np.uint32(0xFFFF_0000)
        nan = np.isnan(given)
        if nan.any():
            up[nan] = some[nan]
    return out.reshape(x.shape)


def with_rules(recipe: Recipe) -> Rounded | RoundedFast:
    """The arithmetic of a recipe, on its carrier."""
    return RoundedFast(recipe) if recipe.carrier == "float32" else Rounded(recipe)
