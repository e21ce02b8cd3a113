"""A diagnosis for people and for programs.  SPEC VERDICT-20.

The first line has the name of the mistake and how sure it is; where nothing is named, it says so.
"""

from __future__ import annotations

from typing import Any

from refimpl.validate.diagnosis import Diagnosis, Finding
from refimpl.variants.catalogue import CATALOGUE, Entry


def text(diagnosis: Diagnosis) -> str:
    """Some lines for every finding, then what is known of the cases that nothing explains."""
    parts = [_finding(finding) for finding in diagnosis.findings]
    if diagnosis.unexplained:
        cases = _listed(diagnosis.unexplained)
        lead = "Of the other cases that fail" if parts else "Diagnosis: no known mistake makes these numbers"
        parts.append("\n".join([f"{lead} ({cases}).", *(f"  {one.text}" for one in diagnosis.accounts)]))
    if diagnosis.unread:
        parts.append(f"Not examined, others sufficed: {_listed(diagnosis.unread)}.")
    return "\n\n".join(parts)


def to_dict(diagnosis: Diagnosis) -> dict[str, Any]:
    """For JSON."""
    return {
        "claim": diagnosis.claim,
        "findings": [_finding_json(finding) for finding in diagnosis.findings],
        "unexplained": list(diagnosis.unexplained),
        "accounts": [
            {"case": a.case, "component": a.component, "off": list(a.off), "said": list(a.sentences)}
            for a in diagnosis.accounts
        ],
        "not_examined": list(diagnosis.unread),
    }


def _finding(finding: Finding) -> str:
    first, others = finding.names[0], finding.names[1:]
    lines = [f"Diagnosis: {_title(first)}, {sureness(finding)}."]
    for id in first:
        entry = _entry(id)
        lines += [f"  computed  {entry.wrong}", f"  right     {entry.right}"]
        lines.append(f"  clauses   {', '.join(entry.clauses)}")
        lines += [f"  seen in   {thread}" for thread in entry.threads[:3]]
    lines += [f"  These cases cannot tell it from {_title(other)}." for other in others]
    lines.append(f"  It makes the numbers of {_listed(finding.cases)}.")
    if finding.against:
        lines.append(
            f"  It is not everywhere: {_listed(finding.against)} would show it, and the port is right there."
        )
    return "\n".join(lines)


def sureness(finding: Finding) -> str:
    """In words, with the numbers behind them."""
    following = f"those of {_title(finding.next_name)}" if finding.next_name else "the right ones"
    count = f"{len(finding.cases)} case{'s' if len(finding.cases) != 1 else ''}"
    word = "certain" if finding.certain else "likely"
    times = _times(finding.closer)
    return f"{word}: over {count} the port is {times} closer to its numbers than to {following}"


def _times(closer: float) -> str:
    return f"{closer:.0f} times" if closer >= 10 else f"{closer:.1f} times"


def _title(ids: tuple[str, ...]) -> str:
    return " together with ".join(f"{id} ({_entry(id).name})" for id in ids)


def _entry(id: str) -> Entry:
    return CATALOGUE[id[:3]]


def _finding_json(finding: Finding) -> dict[str, Any]:
    return {
        "mistakes": [
            [
                {
                    "id": id,
                    "name": _entry(id).name,
                    "wrong": _entry(id).wrong,
                    "right": _entry(id).right,
                    "clauses": list(_entry(id).clauses),
                    "threads": list(_entry(id).threads),
                }
                for id in name
            ]
            for name in finding.names
        ],
        "certain": finding.certain,
        "times_closer": finding.closer,
        "next": list(finding.next_name),
        "share_of_deviation": finding.share,
        "cases": list(finding.cases),
        "against": list(finding.against),
    }


def _listed(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:6])
    return shown if len(names) <= 6 else f"{shown} and {len(names) - 6} more"
