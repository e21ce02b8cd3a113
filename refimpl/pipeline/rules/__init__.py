"""The published schedules, one rule per file.  SPEC PIPE-2, PIPE-19.

A rule is `schedule(ranks, microbatches) -> Schedule`; interleaved takes chunks and a group size as well.
`plan` is the way in: it refuses what the rule does not allow, and sizes that nobody means.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from refimpl.errors import Invalid
from refimpl.pipeline.rules import dualpipe, dualpipev, gpipe, interleaved, one_f_one_b, zb1p, zbv
from refimpl.pipeline.schedule import Schedule, bounded


class Rule(NamedTuple):
    title: str  # as the papers write it
    chunks: int  # stages per rank; what interleaved takes unless told otherwise
    schedule: Callable[..., Schedule]
    source: str  # whose order it is


RULES = {
    "gpipe": Rule("GPipe", 1, gpipe.schedule, "PyTorch, ScheduleGPipe"),
    "1f1b": Rule("1F1B", 1, one_f_one_b.schedule, "PyTorch, Schedule1F1B as executed"),
    "interleaved": Rule(
        "Interleaved 1F1B",
        2,
        interleaved.schedule,
        "PyTorch, ScheduleInterleaved1F1B; with a group size Megatron",
    ),
    "zb1p": Rule("ZB1P", 1, zb1p.schedule, "PyTorch, ScheduleInterleavedZeroBubble with one stage per rank"),
    "zbv": Rule("ZB-V", 2, zbv.schedule, "PyTorch, ScheduleZBVZeroBubble"),
    "dualpipe": Rule("DualPipe", 2, dualpipe.schedule, "deepseek-ai/DualPipe, DualPipe.step"),
    "dualpipev": Rule("DualPipeV", 2, dualpipev.schedule, "deepseek-ai/DualPipe, DualPipeV.step"),
}


def plan(
    name: str, ranks: int, microbatches: int, chunks: int | None = None, group: int | None = None
) -> Schedule:
    """The schedule of that name.

    chunks: V, stages per rank, which only interleaved leaves open (2 unless given).
    group: G of interleaved, microbatches that go through a chunk in one go (PIPE-5).

    Raises:
        Invalid: no such schedule, or numbers that its rule does not allow.
    """
    if not isinstance(name, str) or name not in RULES:
        raise Invalid(f"{name!r:.60} is no schedule, but it has to be one of {', '.join(RULES)}.")
    rule = RULES[name]
    free = name == "interleaved"
    numbers = {"ranks": ranks, "microbatches": microbatches, "chunks": chunks, "group": group}
    for word, number in numbers.items():
        optional = word in ("chunks", "group")
        if number is None and optional:
            continue
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise Invalid(f"{word} is {number!r}, but has to be a whole number above 0.")
    if not free and chunks not in (None, rule.chunks):
        raise Invalid(f"{name} has {rule.chunks} stage(s) per rank, but chunks is {chunks}.")
    if not free and group is not None:
        raise Invalid(
            f"{name} has no groups of microbatches, but group is {group}; only interleaved has them."
        )
    bounded(ranks, microbatches, chunks or rule.chunks)
    if free:
        return rule.schedule(ranks, microbatches, chunks or rule.chunks, group)
    return rule.schedule(ranks, microbatches)
