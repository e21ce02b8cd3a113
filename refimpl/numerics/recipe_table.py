"""Recipes as tables: their rows, and what they come to for every linear.  SPEC RECIPE-3, RECIPE-9.

SPEC and `refimpl recipe` print the same tables, both from here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from refimpl.errors import Invalid
from refimpl.numerics import precision, sites
from refimpl.numerics.recipe import CARRIER, FP8, Recipe, Rule
from refimpl.numerics.recipes import RECIPES, SHORT
from refimpl.numerics.scaled import Plan

ABOUT: Final = {  # what a ready recipe is
    "bf16": "mixed precision: activations in BF16, GEMMs of BF16, masters and gradients in FP32",
    "v3-fp8": "the training of DeepSeek-V3: FP8 GEMMs in tiles of 1x128 and blocks of 128x128",
    "v3.1-ue8m0": "the same with scales that are powers of two everywhere, as for DeepSeek-V3.1",
    "hf-bf16": "transformers in bfloat16: its order of casts, operator by operator",
    "official-inference": "DeepSeek's inference code: FP8 weights and activations, BF16 between operators",
    "official-inference-v3.1": "the same as it is configured for V3.1: scales that are powers of two",
}

HEAD: Final = ("sites", "format", "tile", "scale", "of", "keep", "accumulator", "evidence", "source")
_USUAL: Final = {"of": "codes", "keep": "plain"}  # what an empty cell stands for


def ready(name: str) -> Recipe:
    """The recipe of a name, or of name@float32.  Raises Invalid."""
    own, _, _ = name.partition("@")
    if SHORT.get(own, own) not in RECIPES:
        raise Invalid(f"recipe {name[:60]!r} is unknown, but it must be one of {', '.join(RECIPES)}.")
    return precision.recipe(name)


def rows(recipe: Recipe) -> list[tuple[str, ...]]:
    """The cells below HEAD, rule by rule; what is as usual is an empty cell."""
    return [_cells(rule) for rule in recipe.rules]


def _cells(rule: Rule) -> tuple[str, ...]:
    held = asdict(rule)
    shown = {name: "" if held[name] == usual else held[name] for name, usual in _USUAL.items()}
    return tuple((held | shown)[name] for name in ("site", *HEAD[1:]))


@dataclass(frozen=True)
class Product:
    """One GEMM of a linear: what it reads, how it adds up, and in which format its output is stored."""

    linear: str
    gemm: str  # Fprop, Dgrad or Wgrad
    a: str  # x or dy
    b: str  # w, or for Wgrad x
    tokens: str  # over which Wgrad contracts, where they are tiled
    accumulator: str
    output: str
    kept: str = ""  # of Fprop: how the input waits for Wgrad


PRODUCT_HEAD: Final = (
    "linear",
    "GEMM",
    "reads",
    "and",
    "over tokens",
    "accumulates",
    "output",
    "input kept for backward as",
)


def products(recipe: Recipe) -> list[Product]:
    """The GEMMs of every linear, as the arithmetic of the recipe does them."""
    return [product for own in sites.LINEARS for product in _of(recipe, own)]


def product_rows(recipe: Recipe) -> list[tuple[str, ...]]:
    """The cells below PRODUCT_HEAD."""
    return [tuple(getattr(p, item.name) for item in fields(Product)) for p in products(recipe)]


def _of(recipe: Recipe, own: str) -> tuple[Product, Product, Product]:
    x, dy = _Read(recipe, sites.read_by(own)), _Read(recipe, f"{own}.dy")
    weight = recipe.rule(f"{own}.weight")
    w = _shown(weight) if weight.scaled else recipe.format("optim.weight")
    padded = "of each expert, padded to 128" if own.startswith("experts.") else "all, padded to 128"

    def added(gemm: str, codes: bool) -> str:
        if codes:
            return recipe.rule(f"{own}.{gemm}").accumulator or "exact"
        return recipe.carrier

    along = x.along_codes and dy.along_codes
    return (
        Product(
            own,
            "Fprop",
            f"x: {x.across}",
            f"w: {w}",
            "",
            added("fprop", x.across_codes and weight.scaled),
            recipe.format(f"{own}.out"),
            x.kept,
        ),
        Product(
            own,
            "Dgrad",
            f"dy: {dy.across}",
            f"w: {w}",
            "",
            added("dgrad", dy.across_codes and weight.scaled),
            recipe.format(f"{own}.dx"),
        ),
        Product(
            own,
            "Wgrad",
            f"dy: {dy.along}",
            f"x: {x.along}",
            padded if along else "",
            added("wgrad", along),
            recipe.format("grad"),
        ),
    )


class _Read:
    """What the GEMMs read of the operand at a site, in words."""

    def __init__(self, recipe: Recipe, site: str) -> None:
        self._plan = Plan.of(recipe, site)
        self._scaled = self._plan.own.scaled

    @property
    def across_codes(self) -> bool:
        return self._scaled and self._plan.across.scaled and self._plan.across.format in FP8

    @property
    def across(self) -> str:
        """By Fprop, or a gradient by Dgrad."""
        return _shown(self._plan.across if self._scaled else self._plan.own)

    @property
    def along_codes(self) -> bool:
        return self._scaled and self._plan.along.scaled

    @property
    def along(self) -> str:
        """By Wgrad, which contracts over tokens."""
        rule = self._plan.along
        if not self._scaled:
            return _shown(self._plan.own)
        of = "of the source" if rule.of == "source" else "of the codes"
        if not rule.scaled:
            return f"{self._plan.own.format if rule.format == CARRIER else rule.format} {of}"
        return f"{_shown(rule)} {of}"

    @property
    def kept(self) -> str:
        own = self._plan.own
        if own.keep == "recomputed":
            return "nothing: computed again"
        if self._scaled and self._plan.along.of == "source":
            return "bf16, from which Wgrad quantises"
        return f"{own.format} codes" if self._scaled else _shown(own)


def _shown(rule: Rule) -> str:
    if not rule.scaled:
        return "unrounded" if rule.format == CARRIER else rule.format
    return f"{rule.format} {rule.tile} {rule.scale}"


def as_json(recipe: Recipe, expanded: bool) -> dict[str, Any]:
    """The recipe with its rows, and the products of every linear if they are wanted."""
    shown = recipe.to_dict()
    return shown | {"linears": [asdict(p) for p in products(recipe)]} if expanded else shown
