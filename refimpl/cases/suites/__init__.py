"""The suites: tables of cases.  SPEC CASE-8.

A suite is a module with `CASES`, a tuple of definitions; adding a case is adding a row.
"""

from functools import cache
from importlib import import_module
from typing import Final

from refimpl.cases.bits import Bits
from refimpl.cases.definition import Definition
from refimpl.cases.staged import Staged
from refimpl.errors import Invalid

SUITES: Final[tuple[str, ...]] = (
    "embedding",
    "linear",
    "norm",
    "rope",
    "attention",
    "mla",
    "mlp",
    "gate",
    "moe",
    "block",
    "head",
    "model",
    "mtp",
    "balance",
    "training",
    "reject",
    "formats",
    "casts",
    "quantise",
    "tensorcore",
    "gemm",
    "fingerprint",
    "recipe",
    "schedule",
)


@cache
def suite(name: str) -> tuple[Definition | Bits | Staged, ...]:
    """The cases of a suite.  Raises Invalid for another name."""
    if name not in SUITES:
        raise Invalid(f"suite {name[:60]!r} is unknown; {', '.join(SUITES)} are required.")
    cases: tuple[Definition | Bits | Staged, ...] = import_module(f"refimpl.cases.suites.{name}").CASES
    return cases


def definition(id: str) -> Definition | Bits | Staged:
    """The case of that id.  Raises Invalid for another one."""
    name = id.partition("/")[0]
    for case in suite(name):
        if case.id == id:
            return case
    raise Invalid(f"case {id[:80]!r} is in no suite.")
