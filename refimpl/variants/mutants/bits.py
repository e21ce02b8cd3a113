"""A mistake in what cases of kind bits compute: number formats, block scales, products of codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from refimpl.numerics.arithmetic import Array
from refimpl.numerics.blockscale import Single, Tile
from refimpl.numerics.recipe import Recipe
from refimpl.recipe_programs import Noting


class Data(Protocol):
    """The inputs of a case and its arguments."""

    @property
    def codes(self) -> Mapping[str, Array]: ...
    @property
    def arguments(self) -> Mapping[str, Any]: ...
    def single(self, name: str) -> Single: ...
    def tile(self, name: str) -> Tile: ...


Run = Callable[[Data], Mapping[str, Array]]


@dataclass(frozen=True)
class BitsMutant:
    """A reading of a mistake.

    id: as of `Mutant`.
    runs: component -> the wrong outputs by name, codes or values of the output's type; what is left out is
    right.  A component that is not named is not touched.
    recipe: the arithmetic of a recipe with the mistake, for cases of a recipe.
    benign, small: as of `Mutant`.
    """

    id: str
    runs: Mapping[str, Run]
    recipe: Callable[[Recipe], Noting] | None = None
    benign: bool = False
    small: str = ""

    @property
    def entry(self) -> str:
        """The id of its entry in the catalogue."""
        return self.id[:3]
