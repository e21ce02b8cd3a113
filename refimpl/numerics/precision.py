"""From the name of a precision to its arithmetic.  SPEC MODEL-1."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from refimpl.errors import Invalid
from refimpl.numerics.arithmetic import Arithmetic, Exact
from refimpl.numerics.floating import Floating
from refimpl.numerics.recipe import RECIPES, Recipe, Rounded

_PLAIN: dict[str, Callable[[], Arithmetic]] = {
    "exact": Exact,
    "float64": lambda: Floating(np.float64),
    "float32": lambda: Floating(np.float32),
}


def arithmetic(precision: str | Recipe | Arithmetic) -> Arithmetic:
    """The arithmetic of a name (exact, float64, float32, or a recipe's) or of a recipe; or itself.

    Raises: Invalid for an unknown name.
    """
    if isinstance(precision, Recipe):
        return Rounded(precision)
    if not isinstance(precision, str):
        if not hasattr(precision, "fprop"):
            raise Invalid(f"precision is {precision!r} and has to be a name, a recipe or an arithmetic.")
        return precision
    if precision in _PLAIN:
        return _PLAIN[precision]()
    if precision in RECIPES:
        return Rounded(RECIPES[precision])
    known = ", ".join([*_PLAIN, *RECIPES])
    raise Invalid(f"precision is {precision!r} and has to be one of {known}.")
