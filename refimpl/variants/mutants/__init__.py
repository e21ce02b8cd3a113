"""The mistakes of real ports, as changes: a file for each subject, with a tuple `MUTANTS`.  SPEC CASE-15."""

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Final

from refimpl.variants.mutants.bits import BitsMutant
from refimpl.variants.mutants.mutant import Mutant

_APART: Final = ("mutant", "bits", "parts")  # these have no mistakes of their own


def _table() -> dict[str, Mutant | BitsMutant]:
    subjects = sorted(m.name for m in iter_modules(__path__) if m.name not in _APART)
    found = [mutant for name in subjects for mutant in import_module(f"{__name__}.{name}").MUTANTS]
    table = {mutant.id: mutant for mutant in sorted(found, key=lambda mutant: mutant.id)}
    assert len(table) == len(found), "two mutants have one id"
    return table


EVERY: Final[Mapping[str, Mutant | BitsMutant]] = _table()
MUTANTS: Final[Mapping[str, Mutant]] = {id: m for id, m in EVERY.items() if isinstance(m, Mutant)}
BITS_MUTANTS: Final[Mapping[str, BitsMutant]] = {
    id: m for id, m in EVERY.items() if isinstance(m, BitsMutant)
}
