"""From the name of a precision to its arithmetic.  SPEC MODEL-1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from refimpl.errors import Invalid
from refimpl.numerics.arithmetic import Arithmetic, Exact
from refimpl.numerics.floating import Floating
from refimpl.numerics.recipe import CARRIERS, Recipe
from refimpl.numerics.recipes import RECIPES, SHORT
from refimpl.numerics.rounded import with_rules

_PLAIN: dict[str, Callable[[], Arithmetic]] = {
    "exact": Exact,
    "float64": lambda: Floating(np.float64),
    "float32": lambda: Floating(np.float32),
}


def arithmetic(precision: str | Recipe | Arithmetic) -> Arithmetic:
    """The arithmetic of a name (exact, float64, float32, or a recipe's, with "@float32" for its fast carrier)
    or of a recipe; or itself.

    Raises: Invalid for an unknown name.
    """
    if isinstance(precision, Recipe):
        return with_rules(precision)
    if not isinstance(precision, str):
        if not hasattr(precision, "fprop"):
            raise Invalid(f"precision is {precision!r} and has to be a name, a recipe or an arithmetic.")
        return precision
    if precision in _PLAIN:
        return _PLAIN[precision]()
    return with_rules(recipe(precision))


def recipe(name: str) -> Recipe:
    """The ready recipe of a name, or of name@carrier.  Raises: Invalid."""
    own, at, carrier = name.partition("@")
    own = SHORT.get(own, own)
    if own in RECIPES and (not at or carrier in CARRIERS):
        return replace(RECIPES[own], carrier=carrier or RECIPES[own].carrier)
    known = ", ".join([*_PLAIN, *RECIPES])
    raise Invalid(
        f"precision is {name!r} and has to be one of {known}; NAME@float32 is a recipe's fast form."
    )
