"""Suite schedule: orders and metrics of the rules, schedules that are illegal, gradients of ranks.

SPEC CASE-18 to CASE-20, PIPE-1 to PIPE-27.
"""

from __future__ import annotations

from typing import Any, Final

from refimpl.cases.bits import Bits, Codes
from refimpl.cases.suites import defects
from refimpl.cases.suites.pipelined import GRADIENTS
from refimpl.pipeline import arrays
from refimpl.pipeline.rules import RULES, plan
from refimpl.pipeline.schedule import Schedule

_CLAUSES: Final = {
    "gpipe": ("PIPE-3",),
    "1f1b": ("PIPE-4",),
    "interleaved": ("PIPE-5", "PIPE-6"),
    "zb1p": ("PIPE-7",),
    "zbv": ("PIPE-8",),
    "dualpipe": ("PIPE-9", "PIPE-10"),
    "dualpipev": ("PIPE-11",),
}
_METRICS: Final = ("PIPE-20", "PIPE-21", "PIPE-22", "PIPE-23", "PIPE-24", "PIPE-26", "PIPE-27", "PIPE-60")
_LEGAL: Final = ("PIPE-12", "PIPE-13", "PIPE-14", "PIPE-15", "PIPE-16", "PIPE-60")
_EVEN: Final = {"F": 2, "I": 2, "W": 2, "B": 4, "FB": 6, "latency": 0}
_UNEVEN: Final = {"F": 3, "I": 5, "W": 2, "B": 6, "FB": 8, "latency": 1}


def _scales(stages: int) -> list[int]:
    """Every third stage is slower, and the last one, which has the head, more so."""
    return [3 if s == stages - 1 else 1 + (s % 3 == 1) for s in range(stages)]


def _rule(name: str, ranks: int, microbatches: int, chunks: int = 0, group: int = 0) -> Bits:
    rule = RULES[name]
    chunks = chunks or rule.chunks
    stages = plan(name, ranks, microbatches, chunks, group or None).stages
    own: dict[str, Any] = {"chunks": chunks, "stages": stages}
    own |= {"group": group} if group else {}
    told = f"-v{chunks}" if name == "interleaved" else ""
    told += f"-g{group}" if group else ""
    what = f"{rule.title} on {ranks} ranks with {microbatches} microbatches"
    what += f", {chunks} chunks" if name == "interleaved" else ""
    what += f" in groups of {group}" if group else ""
    return Bits(
        f"schedule/{name}-{ranks}x{microbatches}{told}",
        f"{what}: order, times under two durations, peaks",
        ("PIPE-1", "PIPE-2", *_CLAUSES[name], *_METRICS),
        "plan",
        {},
        {
            "schedule": name,
            "ranks": ranks,
            "microbatches": microbatches,
            **own,
            "kinds": dict(arrays.CODES),
            "durations": [
                {**_EVEN, "scale": [1] * stages},
                {**_UNEVEN, "scale": _scales(stages)},
            ],
        },
        kind="schedule",
    )


def _legality(id: str, title: str, schedule: Schedule) -> Bits:
    placement = arrays.padded(schedule.placement)
    return Bits(
        f"schedule/{id}",
        title,
        ("PIPE-1", *_LEGAL),
        "legality",
        {"order": Codes(arrays.order(schedule.ranks), "I32"), "placement": Codes(placement, "I32")},
        {
            "ranks": schedule.size,
            "stages": schedule.stages,
            "microbatches": schedule.microbatches,
            "kinds": dict(arrays.CODES),
        },
        kind="schedule",
    )


CASES = (
    _rule("gpipe", 2, 3),
    _rule("gpipe", 4, 10),
    _rule("1f1b", 4, 2),
    _rule("1f1b", 4, 10),
    _rule("interleaved", 4, 2),
    _rule("interleaved", 4, 8),
    _rule("interleaved", 2, 6, chunks=3),
    _rule("interleaved", 3, 8, group=5),
    _rule("interleaved", 4, 16, group=8),
    _rule("zb1p", 4, 3),
    _rule("zb1p", 4, 10),
    _rule("zbv", 3, 2),
    _rule("zbv", 4, 10),
    _rule("zbv", 8, 20),
    _rule("dualpipe", 2, 4),
    _rule("dualpipe", 4, 10),
    _rule("dualpipe", 8, 20),
    _rule("dualpipev", 2, 4),
    _rule("dualpipev", 4, 10),
    *(_legality(f"illegal-{id}", f"{title}: illegal", made) for id, title, made in defects.ILLEGAL),
    *(_legality(f"legal-{id}", f"{title}: legal", made) for id, title, made in defects.LEGAL),
    *GRADIENTS,
)
