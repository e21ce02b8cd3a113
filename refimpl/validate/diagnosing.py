"""From verdicts to a diagnosis: which outputs are evidence, and of what.  SPEC VERDICT-19."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from refimpl.cases.claims import BITS, claim
from refimpl.cases.folder import Folder
from refimpl.validate.accounts import Account, account
from refimpl.validate.diagnosis import Diagnosis, diagnose
from refimpl.validate.evidence import Evidence
from refimpl.validate.verdict import Verdict
from refimpl.variants.variation import Change, chosen, unchanged

NUMBERS = ("forward", "vjp")
Judged = tuple[
    Folder, Path, Verdict, Mapping[str, Any]
]  # the alternatives are those that it was judged under


def of_check(case: str | Path, output: str | Path, verdict: Verdict) -> Diagnosis | None:
    """Of one output that does not hold; None for a case without numbers.  Raises Unreadable."""
    found = of_outputs([(Folder.open(case), Path(output), verdict, {})])
    return found[0] if found else None


def stages_of(case: str | Path, output: str | Path, verdict: Verdict) -> Account | None:
    """Which stages of one output that does not hold are wrong given their own input; None for a case without
    numbers.  Raises Unreadable."""
    folder = Folder.open(case)
    if verdict.claim in ("", BITS) or folder.case.kind not in NUMBERS:
        return None
    return account(Evidence(folder, Path(output)), claim(verdict.claim))


def of_outputs(judged: Iterable[Judged]) -> list[Diagnosis]:
    """One diagnosis for every claim under which something does not hold.  Raises Unreadable."""
    failing: dict[str, list[Evidence]] = {}
    passing: dict[str, list[Evidence]] = {}
    for folder, output, verdict, alternatives in judged:
        if verdict.claim in ("", BITS) or verdict.refused or folder.case.kind not in NUMBERS:
            continue
        change: Change = chosen(**alternatives) if alternatives else unchanged
        side = passing if verdict.holds else failing
        side.setdefault(verdict.claim, []).append(Evidence(folder, output, change))
    return [diagnose(own, claim(name), passing.get(name, ())) for name, own in failing.items()]
