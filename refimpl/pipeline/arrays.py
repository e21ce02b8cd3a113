"""Schedules as arrays of integers, as golden cases have them.  SPEC PIPE-60.

    order[rank, position]   kind, stage, microbatch, and of a pair the stage and microbatch of its backward;
                            -1 where an entry has no such number, and in whole rows after a rank's last entry
    placement[rank]         the stages that a rank holds, in the rule's order

Kinds are numbered as in `CODES`.  `planned` and `judged` are what cases ask for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from refimpl.errors import Invalid
from refimpl.numerics.arithmetic import Array
from refimpl.pipeline import memory
from refimpl.pipeline.check import Finding, check
from refimpl.pipeline.rules import plan
from refimpl.pipeline.schedule import Action, Entry, Pair, Schedule, numbered
from refimpl.pipeline.simulate import Durations, said, simulate

CODES: Final = {"F": 0, "B": 1, "I": 2, "W": 3, "FB": 4}
NONE: Final = -1
PER_DURATIONS: Final = ("start", "makespan", "busy", "idle", "idle_within_span")
_KINDS: Final = {code: kind for kind, code in CODES.items()}
_WIDTH: Final = 5


def of(arguments: Mapping[str, Any]) -> Schedule:
    """The schedule that a case names.  Raises Invalid."""
    return plan(
        arguments["schedule"],
        arguments["ranks"],
        arguments["microbatches"],
        arguments["chunks"],
        arguments.get("group"),
    )


def durations(arguments: Mapping[str, Any]) -> list[Durations]:
    """The durations under which a case asks for times.  Raises Invalid."""
    return [Durations(**own) for own in arguments["durations"]]


def planned(arguments: Mapping[str, Any]) -> dict[str, Array]:
    """What a case of component `plan` asks for."""
    return measured(of(arguments), durations(arguments))


def measured(schedule: Schedule, under: Sequence[Durations]) -> dict[str, Array]:
    """A schedule and its metrics: times (D, P, N) and (D, P) under D durations, peaks (P,), copies (S,)."""
    lines = [simulate(schedule, own) for own in under]
    found: dict[str, Any] = {"order": order(schedule.ranks), "placement": schedule.placement}
    found["start"] = [padded(line.start) for line in lines]
    for name in PER_DURATIONS[1:]:
        found[name] = [getattr(line, name) for line in lines]
    for release in memory.RELEASING:
        found[f"peak.released_at_{release}"] = memory.peak(schedule, release)
    found["copies"] = memory.copies(schedule)
    return {name: np.array(value, np.int32) for name, value in found.items()}


def order(ranks: Sequence[Sequence[Entry]]) -> Array:
    """(P, N, 5)."""
    longest = max(map(len, ranks))
    made = np.full((len(ranks), longest, _WIDTH), NONE, np.int32)
    for rank, own in enumerate(ranks):
        for position, entry in enumerate(own):
            numbers = [number for action in entry.parts for number in action[1:]]
            made[rank, position, : 1 + len(numbers)] = [CODES[entry.kind], *numbers]
    return made


def padded(rows: Sequence[Sequence[int]]) -> Array:
    """Rows of different lengths  ->  (P, N), -1 behind each."""
    made = np.full((len(rows), max(map(len, rows))), NONE, np.int32)
    for row, own in enumerate(rows):
        made[row, : len(own)] = own
    return made


def entry(row: Sequence[int]) -> Entry | None:
    """An entry of `order`, which may be illegal; None for a row of -1.  Raises Invalid for what is none."""
    kind, stage, microbatch, second, other = map(int, row)
    if all(number == NONE for number in row):
        return None
    if kind not in _KINDS or (kind != CODES["FB"] and (second, other) != (NONE, NONE)):
        raise Invalid(f"{[*map(int, row)]} is no entry of an order.")
    if kind == CODES["FB"]:
        return Pair(Action("F", stage, microbatch), Action("B", second, other))
    return Action(_KINDS[kind], stage, microbatch)


def schedule(given: Array, placement: Array, stages: int, microbatches: int) -> Schedule:
    """The schedule that arrays describe, which need not be legal.  Raises Invalid."""
    ranks: list[list[Entry]] = []
    for rows in given.tolist():
        found = [entry(row) for row in rows]
        own = [one for one in found if one is not None]
        if found[len(own) :] != [None] * (len(found) - len(own)):
            raise Invalid(f"rank {len(ranks)} has entries behind its last one.")
        ranks.append(own)
    held = tuple(tuple(stage for stage in own if stage != NONE) for own in placement.tolist())
    return Schedule("schedule", microbatches, stages, held, numbered(ranks))


def judged(codes: Mapping[str, Array], arguments: Mapping[str, Any]) -> dict[str, Array]:
    """What a case of component `legality` asks for: illegal (1,), 0 or 1, and the ranks at fault, sorted; -1
    if there is none."""
    found = findings(codes, arguments)
    at_fault = {rank for finding in found for rank in finding.ranks}
    elsewhere = {f.action.stage for f in found if f.action is not None and f.rule in ("stage", "rank")}
    for rank, held in enumerate(codes["placement"].tolist()):
        if elsewhere & {*held}:
            at_fault.add(rank)  # it lacks what another rank does
    return {
        "illegal": np.array([bool(found)], np.int32),
        "rank": np.array(sorted(at_fault) or [NONE], np.int32),
    }


def findings(codes: Mapping[str, Array], arguments: Mapping[str, Any]) -> list[Finding]:
    """What is wrong with the schedule among the inputs of a case."""
    stages, microbatches = arguments["stages"], arguments["microbatches"]
    return check(schedule(codes["order"], codes["placement"], stages, microbatches))


def words(row: Sequence[int]) -> str:
    """A row of `order` in words."""
    try:
        found = entry(row)
    except Invalid as error:
        return str(error).removesuffix(".")
    return " with ".join(map(said, found.parts)) if found is not None else "nothing"
