"""What a simulation found, in tables and for JSON.  SPEC PIPE-45, PIPE-46."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from fractions import Fraction
from math import lcm
from typing import Any

from tabulate import tabulate

from refimpl.pipeline import formulas, memory
from refimpl.pipeline.gantt import KINDS, name, result, title
from refimpl.pipeline.schedule import Schedule
from refimpl.pipeline.simulate import Durations, Timeline, simulate

SHOWN = {"FB": "F&B"}


def metrics(timeline: Timeline) -> dict[str, Any]:
    """For JSON, under the names of the recordings; whatever is a list has a value for each rank."""
    schedule, found = timeline.schedule, {}
    counts = _counts(schedule)
    for release in ("I", "W"):
        found[f"release_at_{release}"] = memory.peak(schedule, release)
        if any(own["FB"] for own in counts):
            found[f"release_at_{release}_B_frees_before_F_in_FB"] = memory.peak(schedule, release, True)
    told: dict[str, Any] = {
        "durations": asdict(timeline.durations),
        "makespan": timeline.makespan,
        "busy": timeline.busy,
        "idle": timeline.idle,
        "start": timeline.first,
        "finish": timeline.last,
        "idle_within_span": timeline.idle_within_span,
        "counts": counts,
        "peak_in_flight": found,
        "parameter_copies": [float(share) for share in _copies(schedule)],
    }
    if schedule.name in formulas.PUBLISHED:
        published, closed = formulas.beside(timeline)
        told |= {"published": asdict(published), "closed": asdict(closed)}
    return told


def text(timeline: Timeline) -> str:
    """A row for each rank, and what all of them make."""
    schedule = timeline.schedule
    counts = _counts(schedule)
    kinds = [kind for kind in KINDS if any(own[kind] for own in counts)]
    headers = ["rank", "stages", *(SHOWN.get(kind, kind) for kind in kinds)]
    headers += ["busy", "idle", "idle inside", "peak until W", "peak until I", "copies"]
    columns = (
        range(schedule.size),
        [_stages(own) for own in schedule.placement],
        *([own[kind] for own in counts] for kind in kinds),
        timeline.busy,
        timeline.idle,
        timeline.idle_within_span,
        memory.peak(schedule, "W"),
        memory.peak(schedule, "I"),
        [_number(share) for share in _copies(schedule)],
    )
    table = tabulate(list(zip(*columns, strict=True)), headers, stralign="right", disable_numparse=True)
    return f"{title(schedule)}\n\n{table}\n\n{result(timeline)}\n{_published(timeline)}"


def alike(schedules: Sequence[Schedule], durations: Durations) -> list[Timeline]:
    """Schedules of one model, whatever their numbers of stages: `durations` are of the largest part of the
    model of which every stage is a whole number, and a stage takes as many times that.  Raises Invalid."""
    return [
        simulate(one, _times(durations, factor))
        for one, factor in zip(schedules, _factors(schedules), strict=True)
    ]


def compared(timelines: Sequence[Timeline], durations: Durations) -> str:
    """A row for each schedule."""
    schedules = [one.schedule for one in timelines]
    factors = _factors(schedules)
    rows = []
    for timeline, factor in zip(timelines, factors, strict=True):
        schedule = timeline.schedule
        of_rank = Fraction(schedule.size, schedule.stages)  # a stage, in shares of a model cut into P
        formula = formulas.beside(timeline)[0]
        rows.append(
            [
                name(schedule),
                schedule.stages,
                f"x {factor}",
                timeline.makespan,
                _span(timeline.idle),
                f"{100 * max(timeline.idle) / max(timeline.makespan, 1):.1f}%",
                _span(timeline.idle_within_span),
                *(_number(max(memory.peak(schedule, release)) * of_rank) for release in ("W", "I")),
                _number(max(_copies(schedule))),
                formula.value,
                _applies(formula),
            ]
        )
    headers = ["schedule", "stages", "times", "makespan", "idle", "share", "idle inside"]
    headers += ["peak until W", "peak until I", "copies", "published", "applies"]
    align = ("left", *["right"] * 10, "left")
    table = tabulate(rows, headers, disable_numparse=True, colalign=align)
    told = ", ".join(f"{SHOWN.get(kind, kind)} {getattr(durations, kind)}" for kind in KINDS)
    part = lcm(*(one.stages for one in schedules))
    return (
        f"{schedules[0].size} ranks, {schedules[0].microbatches} microbatches; {told}, latency "
        f"{durations.latency}: times of 1/{part} of the model\n\n{table}\n\n"
        f"Peaks are activations of a microbatch in 1/{schedules[0].size} of the model, on the rank with most."
    )


def _published(timeline: Timeline) -> str:
    if timeline.schedule.name not in formulas.PUBLISHED:
        return "no formula is published for it"
    formula = formulas.beside(timeline)[0]
    simulated = timeline.idle if formula.meaning == formulas.IDLE else timeline.idle_within_span
    value = "" if formula.text == str(formula.value) else f" = {formula.value}"
    return (
        f"published {formula.meaning}: {formula.text}{value}, simulated {_span(simulated)}; "
        f"the formula {'applies' if formula.applies else 'does not apply'}: {formula.reason}"
    )


def _applies(formula: formulas.Published) -> str:
    what = "yes" if formula.applies else f"no: {formula.reason}"
    return what if formula.meaning == formulas.IDLE else f"{what} ({formula.meaning})"


def _factors(schedules: Sequence[Schedule]) -> list[int]:
    """How many times the smallest common part of the model a stage of each is."""
    part = lcm(*(one.stages for one in schedules))
    return [part // one.stages for one in schedules]


def _times(durations: Durations, factor: int) -> Durations:
    F, I, W, B, FB = (factor * getattr(durations, kind) for kind in ("F", "I", "W", "B", "FB"))  # noqa: E741, N806
    return Durations(F, I, W, B, FB, durations.latency)


def _counts(schedule: Schedule) -> list[dict[str, int]]:
    found = [Counter(entry.kind for entry in own) for own in schedule.ranks]
    return [{kind: own[kind] for kind in KINDS} for own in found]


def _copies(schedule: Schedule) -> list[Fraction]:
    """What each rank holds of the model, in shares of 1/P: 2 for DualPipe, otherwise 1 if stages are spread
    evenly."""
    return [Fraction(held * schedule.size, schedule.stages) for held in memory.parameters(schedule)]


def _stages(own: Sequence[int]) -> str:
    return ", ".join(map(str, own))


def _span(values: Sequence[int]) -> str:
    least, most = min(values), max(values)
    return str(least) if least == most else f"{least} to {most}"


def _number(value: Fraction) -> str:
    return f"{float(value):.4g}"
