"""A validation for programs: everything, as JSON.  SPEC VERDICT-17."""

from __future__ import annotations

import math
from typing import Any

from refimpl.cases.format import pretty
from refimpl.validate import diagnosis_report, report, summary
from refimpl.validate.results import STATUSES, CaseResult, Validation


def text(validation: Validation) -> str:
    """JSON; numbers that JSON has not are text."""
    return pretty(as_dict(validation)) + "\n"


def as_dict(v: Validation) -> dict[str, Any]:
    """The same as plain dictionaries, lists, texts and numbers."""
    absent, required = v.not_given()
    return {
        "port": v.port,
        "holds": v.holds,
        "claim": v.claim,
        "summary": summary.sentences(v),
        "counts": {status: v.count(status) for status in STATUSES},
        "tensors": {"judged": v.judged, "not_given": absent, "not_given_required": required},
        "by_claim": {name: {"hold": held, "of": of} for name, (held, of) in v.by_claim().items()},
        "tightest": v.tightest,
        "choices": [
            {
                "choice": s.choice,
                "alternative": s.alternative,
                "as_the_cases_say": s.own,
                "cases": list(s.cases),
            }
            for s in v.seen
        ],
        "diagnoses": [diagnosis_report.to_dict(found) for found in v.diagnoses],
        "inconsistent": [found.text for found in v.inconsistent],
        "config": None if v.declared.path is None else str(v.declared.path),
        "cases": [_case(r) for r in v.cases],
    }


def _case(r: CaseResult) -> dict[str, Any]:
    value: dict[str, Any] = {
        "id": r.id,
        "title": r.title,
        "kind": r.kind,
        "component": r.component,
        "status": r.status,
        "why": r.why,
        "claim": r.claim,
        "worst": _number(r.worst),
        "claims": dict(r.claims),
        "under": dict(r.under),
        "not_given": list(r.not_given),
        "verdict": None if r.verdict is None else report.as_dict(r.verdict),
    }
    if r.ran is not None:
        value["ran"] = {
            "outcome": r.ran.outcome,
            "why": r.ran.why,
            "seconds": round(r.ran.seconds, 4),
            "stdout": r.ran.stdout,
            "stderr": r.ran.stderr,
        }
    return value


def _number(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)
