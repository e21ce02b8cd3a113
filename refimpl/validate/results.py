"""What a validation found, case by case and as a whole.  SPEC VERDICT-17."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from refimpl.cases.claims import BITS, CLAIMS
from refimpl.cases.format import REQUIRED
from refimpl.cases.judge import worst_excess
from refimpl.validate.diagnosis import Diagnosis
from refimpl.validate.inference import Explanation
from refimpl.validate.portfile import PortFile
from refimpl.validate.running import Ran
from refimpl.validate.settling import Evidence, Inconsistent, Seen
from refimpl.validate.tensor import HOLDS as TENSOR_HOLDS
from refimpl.validate.tensor import MALFORMED, MISSING, OFF, OPEN
from refimpl.validate.verdict import Verdict

# Of a case: the first three were tried, the others were not.
HELD, NOT_HELD, FAILED = "holds", "off", "failed"
NOT_FOR_ME, NOT_OFFERED, LEFT_OUT = "not for me", "not offered", "left out"
STATUSES: Final = (HELD, NOT_HELD, FAILED, NOT_FOR_ME, NOT_OFFERED, LEFT_OUT)


@dataclass(frozen=True)
class CaseResult:
    """One case.  claims: of a case of numbers, whether the output holds under each that the case offers.
    under: alternatives other than the case's own in which it was judged."""

    id: str
    title: str = ""
    kind: str = ""
    component: str = ""
    status: str = FAILED
    why: str = ""  # one line, empty where all is well
    claim: str = ""
    verdict: Verdict | None = None
    claims: Mapping[str, bool] = field(default_factory=dict)
    under: Mapping[str, Any] = field(default_factory=dict)
    ran: Ran | None = None
    evidence: Evidence | None = None
    explanations: tuple[Explanation, ...] = ()

    @property
    def suite(self) -> str:
        return self.id.partition("/")[0]

    @property
    def tried(self) -> bool:
        return self.status in (HELD, NOT_HELD, FAILED)

    @property
    def worst(self) -> float | None:
        """By how much of its tolerance the worst tensor is off; None where nothing was measured."""
        distances = [t.distance for t in self.tensors if t.distance is not None]
        return max((worst_excess(d) for d in distances), default=None)

    @property
    def tensors(self) -> tuple[Any, ...]:
        return () if self.verdict is None else self.verdict.tensors

    @property
    def judged(self) -> int:
        return sum(t.verdict in (TENSOR_HOLDS, OFF, MALFORMED) for t in self.tensors)

    @property
    def not_given(self) -> tuple[str, ...]:
        return tuple(t.name for t in self.tensors if t.verdict == MISSING)

    @property
    def not_judged(self) -> tuple[str, ...]:
        """Given, but nothing of it could be judged under the claim."""
        return tuple(t.name for t in self.tensors if t.verdict == OPEN)

    @property
    def seconds(self) -> float | None:
        return None if self.ran is None else self.ran.seconds


@dataclass(frozen=True)
class Validation:
    """A port against a set of cases.  claim: the one that was demanded of all, if any."""

    port: str
    declared: PortFile
    claim: str | None
    cases: tuple[CaseResult, ...]
    seen: tuple[Seen, ...] = ()
    inconsistent: tuple[Inconsistent, ...] = ()
    diagnoses: tuple[Diagnosis, ...] = ()

    def count(self, status: str) -> int:
        return sum(r.status == status for r in self.cases)

    @property
    def tried(self) -> tuple[CaseResult, ...]:
        return tuple(r for r in self.cases if r.tried)

    @property
    def failing(self) -> bool:
        """Something was tried and does not hold."""
        return any(r.status != HELD for r in self.tried)

    @property
    def vacuous(self) -> bool:
        """Nothing was tried; or nothing but inputs to be refused, although there are others."""
        only_refusals = all(r.kind == "reject" for r in self.tried)
        return not self.tried or (only_refusals and any(r.kind != "reject" for r in self.cases))

    @property
    def holds(self) -> bool:
        """Something was tried, everything that was tried holds, and no choice is inconsistent."""
        return not self.vacuous and not self.failing and not self.inconsistent

    def by_claim(self) -> dict[str, tuple[int, int]]:
        """claim -> (cases that hold, cases of numbers that were tried and offer it)."""
        held: Counter[str] = Counter()
        offered: Counter[str] = Counter()
        for r in self.tried:
            for name, holds in r.claims.items():
                offered[name] += 1
                held[name] += holds
        order = [*CLAIMS, *sorted(offered.keys() - CLAIMS.keys())]
        return {name: (held[name], offered[name]) for name in order if name in offered}

    @property
    def tightest(self) -> str | None:
        """The strictest claim that every case of numbers that offers it holds under."""
        if any(r.status == FAILED for r in self.tried if r.claim != BITS):
            return None
        return next((name for name, (held, offered) in self.by_claim().items() if held == offered > 0), None)

    @property
    def judged(self) -> int:
        return sum(r.judged for r in self.cases)

    def not_given(self) -> tuple[int, int]:
        """(tensors that were not given, of which required)."""
        absent = [t for r in self.cases for t in r.tensors if t.verdict == MISSING]
        return len(absent), sum(t.role == REQUIRED for t in absent)
