"""Correct ways to compute a recipe: what an implementation may do otherwise without being wrong.  SPEC ZOO-4.

A recipe says where values become codes and which products are taken.  It leaves open how the last bit of a
scale is rounded, in which unit a product is accumulated, and what happens below float32 between two sites.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from refimpl.numerics.arithmetic import Arithmetic
from refimpl.numerics.recipe import Recipe
from refimpl.numerics.rounded import Rounded, RoundedFast


@dataclass(frozen=True)
class RecipeMember:
    """A correct variant of every recipe."""

    name: str
    why: str
    arithmetic: Callable[[Recipe], Arithmetic]
    scales: bool = False  # whether it makes other codes, so that whoever judges asks first which are meant


def _accumulating(kernel: str) -> Callable[[Recipe], Arithmetic]:
    def made(recipe: Recipe) -> Arithmetic:
        rules = [
            replace(rule, accumulator=kernel) if rule.accumulator not in ("", "exact") else rule
            for rule in recipe.rules
        ]
        return Rounded(replace(recipe, rules=tuple(rules)))

    return made


def _scaling(names: dict[str, str]) -> Callable[[Recipe], Arithmetic]:
    def made(recipe: Recipe) -> Arithmetic:
        rules = [replace(rule, scale=names.get(rule.scale, rule.scale)) for rule in recipe.rules]
        return Rounded(replace(recipe, rules=tuple(rules)))

    return made


RECIPE_ZOO: Final = (
    RecipeMember("float32 between sites", "kernels compute in float32, with its functions", RoundedFast),
    RecipeMember(
        "promote_fp32", "sums over 128 without the tensor core's loss", _accumulating("promote_fp32")
    ),
    RecipeMember("triton_wgmma", "scales applied one after the other", _accumulating("triton_wgmma")),
    RecipeMember("deepgemm", "scales multiplied first, as on Hopper", _accumulating("deepgemm")),
    RecipeMember(
        "scales by a reciprocal",
        "amax times 1/448, values times 1/scale, as DeepGEMM's casts",
        _scaling({"ieee": "torch_dg", "ue8m0": "torch_dg_ue8m0"}),
        scales=True,
    ),
    RecipeMember(
        "scales as Triton has them",
        "approximate division, as DeepSeek's inference kernels",
        _scaling({"ieee": "triton_v3", "ue8m0": "triton_v3_ue8m0"}),
        scales=True,
    ),
)
