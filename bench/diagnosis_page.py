"""The page bench/diagnosis.md: what the diagnosis named, for every planted change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, Final

import planted_all

HEAD: Final = """# Diagnosis of ports with a mistake in their source

Written by `python bench/diagnosis.py` from [torch_v3.py](../tests/ports/torch_v3.py), which shares no
code with the package.  A row is a change to its source ([tests/ports](../tests/ports), `planted_*.py`) in one
dtype, run over all cases of the components in which it can show.  *Named* are the classes of mistakes, best
first, `=` between those that cannot be told apart, `+` in pairs.  *first*: the class named first contains the
planted mistake.
"""
_KINDS: Final = (
    ("known", "mistakes of the catalogue", planted_all.KNOWN),
    ("pair", "pairs of them", planted_all.PAIRS),
    ("unknown", "mistakes that are not in the catalogue", planted_all.UNKNOWN),
    ("right", "correct rewrites", planted_all.REWRITES),
)
_APART: Final = ("no case fails", "not a mistake", "crashes")


def classes(named: Iterable[Any]) -> str:
    """Findings as text."""
    return "; ".join(" = ".join("+".join(one) for one in finding) for finding in named)


def page(rows: list[Any]) -> str:
    """Markdown: a summary, then every row by kind."""
    parts = [HEAD, _summary(rows)]
    order = {name: i for i, name in enumerate(planted_all.PLANTED)}
    for _, title, table in _KINDS:
        names = {p.name for p in table}
        own = sorted(
            (r for r in rows if r.name in names), key=lambda r: (r.cases, order[r.name], r.dtype != "float32")
        )
        if own:
            parts.append(f"## {title[0].upper()}{title[1:]}\n\n{_table(own)}")
    return "\n".join(parts)


def _summary(rows: list[Any]) -> str:
    lines = ["| cases | planted | dtype | failing | scores |", "|---|---|---|---|---|"]
    for cases in sorted({r.cases for r in rows}):
        for _, title, table in _KINDS:
            names = {p.name for p in table}
            for dtype in ("float32", "bfloat16"):
                own = [r for r in rows if (r.cases, r.dtype) == (cases, dtype) and r.name in names]
                if own:
                    failing = sum(r.score not in (*_APART, "passes") for r in own)
                    scores = Counter(r.score for r in own)
                    text = ", ".join(f"{n} {score}" for score, n in scores.most_common())
                    lines.append(f"| {cases} | {len(own)} {title} | {dtype} | {failing} | {text} |")
    return "\n".join(lines) + "\n"


def _table(rows: list[Any]) -> str:
    lines = [
        "| planted | dtype | cases | failing | first off | named | explained | score | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        first = Counter(name for _, name in r.first).most_common(1)
        off = f"`{first[0][0]}`" if first else ""
        explained = f"{r.explained} of {len(r.failed)}" if r.seconds else ""
        lines.append(
            f"| {r.name} | {r.dtype} | {r.cases} | {len(r.failed)} of {r.ran} | {off} | {classes(r.named)} "
            f"| {explained} | {r.score} | {r.seconds or ''} |"
        )
    return "\n".join(lines) + "\n"
