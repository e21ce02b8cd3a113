"""The page bench/diagnosis.md: what the diagnosis names for every planted change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from statistics import median
from typing import Final

from diagnosis_ports import KINDS, KNOWN, PAIR, RIGHT, SUBJECTS, UNKNOWN
from diagnosis_score import APART, GOOD, NOT_A_MISTAKE, PASSES, Row, entry, score, surplus

HEAD: Final = """# Diagnosis of ports with a mistake in their source

    python bench/diagnosis.py --jobs 16

writes this page (about 2 hours of one core; torch, safetensors and a C compiler are required).  The ports are
[torch_v3.py](../tests/ports/torch_v3.py) and, with names that begin with C, the [C port](../tests/ports/c);
they share no code with the package.  What is planted in them is in [tests/ports](../tests/ports),
`planted_*.py`: changes to their source, each run in float32 and bfloat16 (the C port: float32) over all cases
of the components in which it can show.  Seed 1 is the committed cases; those of seed 7 are the same
definitions with other numbers.

*first*: the class of mistakes that is named first contains the planted one, and of a pair both are named
before anything else.  *right stage*: of a mistake that is not in the catalogue nothing is named, and the
stage that the report says first, of the smallest component that fails, is the one that was changed.
*passes*: of a right port every case holds, and a diagnosis of all that it computed names nothing.  *not a
mistake*: the change rounds no more than the dtype does.  *no case fails*: there is nothing to diagnose.  A
class is written with `=` between mistakes that cannot be told apart and `+` in pairs.
"""


def classes(row: Row) -> str:
    """Findings as text."""
    return "; ".join(" = ".join("+".join(one) for one in finding) for finding in row.named)


def stages(row: Row) -> str:
    return ", ".join(dict.fromkeys(stage for _, stage, _ in row.stages))


def page(rows: list[Row]) -> str:
    """Markdown: totals, the confusion matrices, then every row that is not as it should be."""
    own = sorted(rows, key=lambda r: (r.cases, r.dtype != "float32"))
    return "\n".join([HEAD, _totals(own), _times(own), *_confusions(own), *_missed(own), *_unknown(own)])


def _sets(rows: Iterable[Row]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((r.cases, r.dtype) for r in rows))


def _totals(rows: list[Row]) -> str:
    lines = [
        "| cases | dtype | planted | with a failing case | right | share | others |",
        "|---|---|---|---|---|---|---|",
    ]
    for cases, dtype in _sets(rows):
        for kind, title in KINDS.items():
            own = [r for r in rows if (r.cases, r.dtype) == (cases, dtype) and SUBJECTS[r.name].kind == kind]
            scores = Counter(score(r) for r in own)
            asked = sum(n for one, n in scores.items() if one not in APART)
            good = sum(scores[one] for one in GOOD)
            failing = "" if kind == RIGHT else asked
            rest = ", ".join(f"{n} {one}" for one, n in scores.most_common() if one not in GOOD)
            share = f"{100.0 * good / asked:.1f}%" if asked else ""
            if own:
                lines.append(
                    f"| {cases} | {dtype} | {len(own)} {title} | {failing} | {good} | {share} | {rest} |"
                )
    more = sum(surplus(r) for r in rows if SUBJECTS[r.name].kind in (KNOWN, PAIR))
    of = sum(len(r.named) > 0 for r in rows)
    last = f"Something that was not planted is named behind the first in {more} of {of} diagnoses."
    return "\n".join(lines) + f"\n\n{last}\n"


def _times(rows: list[Row]) -> str:
    lines = ["| cases | dtype | diagnoses | seconds of one core, median | largest |", "|---|---|---|---|---|"]
    for cases, dtype in _sets(rows):
        own = [r.seconds for r in rows if (r.cases, r.dtype) == (cases, dtype) and r.seconds]
        if own:
            lines.append(f"| {cases} | {dtype} | {len(own)} | {median(own):.1f} | {max(own):.1f} |")
    return "\n".join(lines) + "\n"


def _confusions(rows: list[Row]) -> Iterable[str]:
    """Planted entry of the catalogue -> what is named first, in all sets."""
    sets = _sets(rows)
    yield "## Confusion matrix\n\nA number counts the planted changes for which that class is named first.\n"
    header = " | ".join(f"{cases}, {dtype}" for cases, dtype in sets)
    lines = [f"| planted | {header} |", f"|---|{'---|' * len(sets)}"]
    own = [r for r in rows if SUBJECTS[r.name].kind == KNOWN]
    for planted in sorted({SUBJECTS[r.name].answers[0][0] for r in own}):
        cells = []
        for one in sets:
            here = [r for r in own if (r.cases, r.dtype) == one and SUBJECTS[r.name].answers[0][0] == planted]
            counts = Counter(_first(r) for r in here)
            cells.append("; ".join(f"{name} {n}" for name, n in sorted(counts.items())))
        lines.append(f"| {planted} | {' | '.join(cells)} |")
    yield "\n".join(lines) + "\n"


def _first(row: Row) -> str:
    """What is named first, as entries of the catalogue, or why nothing is."""
    if not row.named:
        return "*none*" if row.failed else f"*{score(row)}*"
    named = dict.fromkeys("+".join(dict.fromkeys(entry(id) for id in one)) for one in row.named[0])
    return " = ".join(named)


def _missed(rows: list[Row]) -> Iterable[str]:
    kinds = (KNOWN, PAIR, RIGHT)
    own = [r for r in rows if SUBJECTS[r.name].kind in kinds and score(r) not in (*GOOD, NOT_A_MISTAKE)]
    if own:
        yield f"## What is not as it should be\n\n{_table(own)}"
    pairs = [r for r in rows if SUBJECTS[r.name].kind == PAIR]
    if pairs:
        yield f"## Pairs\n\n{_table(pairs)}"


def _unknown(rows: list[Row]) -> Iterable[str]:
    own = [r for r in rows if SUBJECTS[r.name].kind == UNKNOWN]
    if own:
        yield f"## Mistakes that are not in the catalogue\n\n{_table(own)}"


def _table(rows: list[Row]) -> str:
    lines = [
        "| planted | dtype | cases | failing | named | stages that are wrong | explained | score | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(rows, key=lambda r: (list(SUBJECTS).index(r.name), r.cases, r.dtype != "float32")):
        off = ", ".join(f"`{stage}`" for stage in dict.fromkeys(stage for _, stage, _ in r.stages))
        explained = f"{r.explained} of {len(r.failed)}" if r.seconds and score(r) != PASSES else ""
        lines.append(
            f"| {r.name} | {r.dtype} | {r.cases} | {len(r.failed)} of {r.ran} | {classes(r)} | {off} "
            f"| {explained} | {score(r)} | {r.seconds or ''} |"
        )
    return "\n".join(lines) + "\n"
