"""The kill matrix for people, and as JSON: golden/matrix.json has the same rows.  SPEC CASE-16."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from refimpl.cases.claims import BITS
from refimpl.config.jsonfile import read_object
from refimpl.validate.matrix import CAP, Factors, Outcome, claims_of, outcome
from refimpl.variants.catalogue import CATALOGUE, DISPOSITIONS, LATER
from refimpl.variants.mutants import EVERY
from refimpl.variants.mutants.mutant import ALL

HEADERS = ("mutant", "name", "applies", "killed", "by at most", "claim", "worst case", "survives at")
LIMIT = 8 << 20  # bytes of a matrix.json


def outcomes(factors: Factors) -> list[Outcome]:
    """One for each mutant that was run, by id."""
    return [outcome(EVERY[id], factors[id]) for id in sorted(factors)]


def faults(found: Sequence[Outcome], partial: bool) -> list[str]:
    """What is wrong, in words.  partial: not all suites were run, so a mutant need not apply to any case."""
    return [
        f"{o.mutant.id} {o.fault}."
        for o in found
        if o.fault and not (partial and not o.applies and not o.mutant.benign)
    ]


def text(found: Sequence[Outcome], partial: bool = False) -> str:
    """A line for each mutant, then what it comes to."""
    lines = [tabulate([_row(o) for o in found], HEADERS, disable_numparse=True)]
    reasons = [f"{o.mutant.id}: {o.mutant.small}" for o in found if o.mutant.small]
    return "\n".join([*lines, "", *reasons, *summary(found, partial), *faults(found, partial)])


def summary(found: Sequence[Outcome], partial: bool = False) -> list[str]:
    """The figures: dispositions by kind, mutants, killed, the smallest factor."""
    wrong = [o for o in found if not o.mutant.benign and (o.applies or not partial)]
    killed = [o for o in wrong if o.killed]
    benign = [o for o in found if o.mutant.benign]
    measured = [o for o in killed if o.strictest != BITS]
    lines = [dispositions()]
    lines.append(f"{len(killed)} of {len(wrong)} mutants are killed; {_benign(benign)}")
    if measured:
        least = min(measured, key=lambda o: o.factor)
        factor = shown(least.factor, least.strictest)
        lines.append(f"The smallest factor is {factor}, of {least.mutant.id} in {least.case}.")
    return lines


def dispositions() -> str:
    """How many entries of the catalogue have which."""
    count = Counter(entry.disposition for entry in CATALOGUE.values())
    later = Counter(entry.refers for entry in CATALOGUE.values() if entry.disposition == LATER)
    parts = [f"{count[d]} {d}" for d in DISPOSITIONS]
    subjects = ", ".join(f"{n} {subject}" for subject, n in sorted(later.items()))
    return f"{len(CATALOGUE)} entries: {', '.join(parts)} ({subjects} is what comes later)."


def shown(factor: float, claim: str) -> str:
    """A factor to two digits; bits have no tolerance and no factor."""
    return "" if claim == BITS else f"{rounded(factor):g}"


def rounded(factor: float) -> float:
    """To two digits, at most CAP."""
    return min(float(f"{factor:.2g}"), CAP)


def rows(factors: Factors) -> dict[str, Any]:
    """As in matrix.json: mutant -> its claims and, by case, its factors at them, null where not offered."""
    made: dict[str, Any] = {}
    for id, cases in sorted(factors.items()):
        mutant = EVERY[id]
        claims = ALL if mutant.benign else claims_of(mutant)
        made[id] = {
            "claims": list(claims),
            "benign": mutant.benign,
            "cases": {
                case: [rounded(f[c]) if c in f else None for c in claims] for case, f in sorted(cases.items())
            },
        }
    return made


def to_json(found: Sequence[Outcome], factors: Factors, partial: bool = False) -> str:
    """Everything, for programs."""
    table = rows(factors)
    for o in found:
        entry = CATALOGUE[o.mutant.entry]
        table[o.mutant.id] |= {
            "name": entry.name,
            "disposition": entry.disposition,
            "strictest": o.strictest,
            "killed": o.killed,
            "worst_case": o.case,
            "factor": rounded(o.factor),
            "survives": [] if o.mutant.benign else list(o.survives),
            "fault": o.fault,
        }
    return json.dumps({"mutants": table, "summary": summary(found, partial)}, indent=1) + "\n"


def merged(path: Path, factors: Factors) -> str:
    """matrix.json with these rows: a line for each mutant.  What else is in the file is kept, and rows of
    other mutants that there still are.

    Raises Unreadable for a file that is there and is no JSON object.
    """
    old: dict[str, Any] = dict(read_object(path, LIMIT)) if path.exists() else {}
    kept = {id: row for id, row in old.get("mutants", {}).items() if id in EVERY}
    table = sorted((kept | rows(factors)).items())
    lines = [f"  {json.dumps(id)}: {json.dumps(row, separators=(',', ':'))}" for id, row in table]
    parts = ['"mutants": {\n' + ",\n".join(lines) + "\n }"]
    parts += [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in old.items() if name != "mutants"]
    return "{\n " + ",\n ".join(parts) + "\n}\n"


def _row(o: Outcome) -> tuple[Any, ...]:
    name = CATALOGUE[o.mutant.entry].name
    if o.mutant.benign:
        return o.mutant.id, name, o.applies, len(o.wronged), "benign", "all", ", ".join(o.wronged), ""
    factor = shown(o.factor, o.strictest) if o.applies else ""
    return o.mutant.id, name, o.applies, o.killed, factor, o.strictest, o.case, ", ".join(o.survives)


def _benign(benign: Sequence[Outcome]) -> str:
    wronged = sum(bool(o.wronged) for o in benign)
    return f"of {len(benign)} benign ones {wronged or 'none'} {'are' if wronged > 1 else 'is'} rejected."
