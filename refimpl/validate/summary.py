"""A validation for people: a line for each case, then what it comes to.  SPEC VERDICT-17."""

from __future__ import annotations

import math
from collections import Counter

from tabulate import tabulate

from refimpl.validate import diagnosis_report
from refimpl.validate.results import (
    FAILED,
    HELD,
    LEFT_OUT,
    NOT_FOR_ME,
    NOT_HELD,
    NOT_OFFERED,
    CaseResult,
    Validation,
)

HEADERS = ("case", "verdict", "as", "of tolerance", "s", "first tensor that is off, or why")
WIDTH = 110  # of the last column


def text(validation: Validation) -> str:
    """The table of what was tried, and the summary."""
    lines: list[str] = []
    if validation.tried:
        lines += [tabulate([_row(r) for r in validation.tried], HEADERS, disable_numparse=True), ""]
    lines += sentences(validation)
    for diagnosis in validation.diagnoses:
        lines += ["", diagnosis_report.text(diagnosis)]
    return "\n".join(lines)


def sentences(validation: Validation) -> list[str]:
    """What it comes to, the conclusion last."""
    v = validation
    lines = [*_left(v), *_tensors(v)]
    lines += [f"The port does {seen.text}." for seen in v.seen if not seen.own]
    follows = [seen for seen in v.seen if seen.own]
    lines += [f"As the cases say: {seen.text}." for seen in follows]
    lines += [f"Inconsistent: {found.text}." for found in v.inconsistent]
    claims = v.by_claim()
    if claims:
        counts = ", ".join(f"{name} {held} of {of}" for name, (held, of) in claims.items())
        lines.append(f"Cases of numbers that hold, by precision: {counts}.")
    return [*lines, *_conclusion(v)]


def _row(r: CaseResult) -> tuple[str, ...]:
    verdict = r.status if r.status == HELD else r.status.upper()
    return r.id, verdict, r.claim, number(r.worst), seconds(r), _short(r.why)


def number(worst: float | None) -> str:
    """A factor over the tolerance, for people."""
    return "" if worst is None else "infinite" if math.isinf(worst) else f"{worst:.3g}"


def seconds(r: CaseResult) -> str:
    return "" if r.seconds is None else f"{r.seconds:.2f}"


def _short(why: str) -> str:
    return why if len(why) <= WIDTH else why[: WIDTH - 3] + "..."


def _left(v: Validation) -> list[str]:
    """What was not tried, by reason."""
    lines = []
    for status in (NOT_FOR_ME, LEFT_OUT, NOT_OFFERED):
        found = [r for r in v.cases if r.status == status]
        if found:
            lines.append(f"{len(found)} cases {status}: {', '.join(_reasons(found))}.")
    return lines


def _reasons(found: list[CaseResult]) -> list[str]:
    """Suites with their counts, and the reasons where there are any."""
    suites = Counter((r.suite, r.why) for r in found)
    parts = [f"{suite} {count}" + (f" ({why[:90]})" if why else "") for (suite, why), count in suites.items()]
    return parts if len(parts) <= 24 else [*parts[:24], f"and {len(parts) - 24} more"]


def _tensors(v: Validation) -> list[str]:
    absent, required = v.not_given()
    lines = [f"{v.judged} tensors judged."] if v.judged else []
    if absent:
        lines.append(f"{absent} tensors not given, of which {required} required: {_names(v)}.")
    unjudged = sum(len(r.not_judged) for r in v.cases)
    if unjudged:
        lines.append(f"{unjudged} tensors given, but not decidable as claimed.")
    surplus = sum(len(r.verdict.surplus) for r in v.cases if r.verdict is not None)
    if surplus:
        lines.append(f"{surplus} tensors given that no case asks for.")
    return lines


def _names(v: Validation) -> str:
    """By the last part of the name, the commonest first."""
    leaves = Counter(name.rpartition(".")[2] for r in v.cases for name in r.not_given)
    shown = [f"{leaf} {count}" for leaf, count in leaves.most_common(8)]
    return ", ".join(shown) + (f" and {len(leaves) - 8} other kinds" if len(leaves) > 8 else "")


def _conclusion(v: Validation) -> list[str]:
    tried, held = len(v.tried), v.count(HELD)
    if not tried:
        return [f"Nothing was tried: none of the {len(v.cases)} cases is for {v.port}."]
    what = f"{held} of {tried} cases hold"
    broken = [f"{v.count(NOT_HELD)} off", f"{v.count(FAILED)} failed"]
    if v.holds:
        return [f"{what}. It holds."]
    if v.vacuous and held == tried:
        return [f"{what}, but these only have to be refused: no case with an output was tried."]
    lines = [f"{what}, {', '.join(broken)}. It does not hold."]
    tightest = v.tightest
    only_numbers = all(r.claims for r in v.tried if r.status == NOT_HELD)
    if tightest is not None and only_numbers and not v.count(FAILED) and not v.inconsistent:
        lines.append(f"All would hold as {tightest}: if that is the port's precision, say so with --as.")
    return lines
