"""A mistake as something that runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from refimpl.variants.variation import Change

ALL: Final = ("fp32", "tf32", "fp16", "bf16")  # claims, the strictest first


@dataclass(frozen=True)
class Mutant:
    """A reading of a mistake.  Its name, formulas, clauses and threads are in the catalogue.

    id: the catalogue's, "Y09", and a letter where an entry has several readings, "Y09b".
    change: makes the wrong program; its backward is the derivative of the wrong forward.
    claims: the precisions at which it is a mistake; at the others it is smaller than their roundings.
    benign: it differs from the right program and is right all the same, so no case may reject it.
    small: why its smallest factor over tolerance is below 10 by nature, or "".
    """

    id: str
    change: Change
    claims: tuple[str, ...] = ALL
    benign: bool = False
    small: str = ""

    @property
    def entry(self) -> str:
        """The id of its entry in the catalogue."""
        return self.id[:3]
