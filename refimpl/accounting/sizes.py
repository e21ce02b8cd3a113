"""Bytes of a value at a site, as a recipe keeps it.  SPEC RECIPE-14."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from refimpl.numerics.recipe import CARRIER, Recipe, Rule
from refimpl.numerics.rounded import bits
from refimpl.numerics.scaled import SCALE_BYTES, SIZE, tile_of

PLAIN: Final = 4  # of an element that no site is about: a statistic, a score, an id


@dataclass(frozen=True)
class Sizes:
    """The two ways in which layers keep values, in bytes."""

    recipe: Recipe
    _found: dict[str, Rule] = field(default_factory=dict, init=False, repr=False, compare=False)

    def operand(self, site: str, rows: int, width: int, again: bool = False) -> int:
        """The input of linears (rows, width): with a scale for 128 values of a row, where it is codes.

        again: what it takes when it is computed again."""
        rule = self.rule(site)
        if rule.keep == "recomputed" and not again:
            return 0
        if not rule.scaled:
            return _numbers(rule, rows, width)
        if self.rule(f"{site}.wgrad").of == "source":
            return rows * width * 2  # Wgrad quantises the BF16 values anew
        return _numbers(rule, rows, width) + rows * -(-width // SIZE) * SCALE_BYTES

    def keep(self, site: str, rows: int, width: int, again: bool = False) -> int:
        """A value that no GEMM of codes reads, its last axis of `width`: in tiles, where it is codes."""
        rule = self.rule(site)
        if rule.keep == "recomputed" and not again:
            return 0
        numbers = _numbers(rule, rows, width)
        return numbers + scales(rule, rows, width) if rule.scaled else numbers

    def recomputes(self, *sites: str) -> bool:
        return any(self.rule(site).keep == "recomputed" for site in sites)

    def rule(self, site: str) -> Rule:
        if site not in self._found:
            self._found[site] = self.recipe.rule(site)
        return self._found[site]


def _numbers(rule: Rule, rows: int, width: int) -> int:
    return rows * width * bits(rule.format) // 8


def scales(rule: Rule, rows: int, width: int) -> int:
    """Of the scales of a matrix (rows, width) of codes."""
    if not rows or not width:
        return 0
    high, wide = tile_of(rule, (rows, width))
    return -(-rows // high) * -(-width // wide) * SCALE_BYTES


def stores(recipe: Recipe, site: str) -> bool:
    """Whether a value inside of an operation is stored, and not only within a kernel."""
    return recipe.format(f"fused.{site}") != CARRIER
