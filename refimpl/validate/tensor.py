"""The verdict on one tensor.  SPEC VERDICT-1, VERDICT-9."""

from __future__ import annotations

from dataclasses import dataclass

from refimpl.cases.format import REQUIRED
from refimpl.cases.judge import Distance

HOLDS, OFF, MISSING, MALFORMED, OPEN = "holds", "off", "missing", "malformed", "not judged"


@dataclass(frozen=True)
class TensorVerdict:
    """The verdict on one tensor; `at` is the index of the worst element."""

    name: str
    role: str
    verdict: str
    note: str = ""
    at: tuple[int, ...] = ()
    distance: Distance | None = None
    undecided: int = 0

    @property
    def bad(self) -> bool:
        return self.verdict in (OFF, MALFORMED) or (self.verdict == MISSING and self.role == REQUIRED)
