"""The known mistakes of real ports, in our words.  SPEC CASE-14.

catalogue.json has an entry for each: what ports computed, what is right, the clauses it is against, the
threads in which it was seen, how it shows, and its disposition:

    mutant          it runs: `refimpl.variants.mutants`
    same            it computes what another entry computes, which `refers` names
    layout          only an order in memory differs, which verdicts permit
    later           it needs something that is not there yet, which `refers` names
    inexpressible   `reason` says why it cannot be a change of what is computed here
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Final

MUTANT, SAME, LAYOUT, LATER, INEXPRESSIBLE = "mutant", "same", "layout", "later", "inexpressible"
DISPOSITIONS: Final = (MUTANT, SAME, LAYOUT, LATER, INEXPRESSIBLE)
SUBJECTS: Final = (
    "mtp",
    "decoding",
    "training",
    "pipeline",
    "sparse attention",
)  # of what comes later
VISIBILITIES: Final = ("loud", "quiet", "latent", "benign")


@dataclass(frozen=True)
class Entry:
    """One mistake.

    wrong, right: formulas in the notation of SPEC.md.
    visibility: loud (any reasonable case shows it), quiet (small, or text stays fluent), latent (nothing on
    ordinary inputs), benign (no error).
    refers: the entry that has the same effect, or the subject that has to come first; else "".
    """

    id: str
    name: str
    component: str
    wrong: str
    right: str
    clauses: tuple[str, ...]
    threads: tuple[str, ...]
    visibility: str
    disposition: str
    refers: str
    reason: str


def _entries() -> dict[str, Entry]:
    rows = json.loads(files("refimpl.variants").joinpath("catalogue.json").read_text("utf-8"))
    return {row["id"]: _entry(row) for row in rows}


def _entry(row: Mapping[str, Any]) -> Entry:
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in row.items()}
    return Entry(**values)


CATALOGUE: Final[Mapping[str, Entry]] = _entries()
