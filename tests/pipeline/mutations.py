"""Seeded mutations of schedules, and a judge of legality that shares nothing with the checker."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from refimpl.pipeline.schedule import Action, Entry, Pair, Schedule

Rows = list[list[Entry]]
Mutant = tuple[Rows, set[int]]  # and the ranks that were touched
Mutation = Callable[[random.Random, Schedule, Rows], Mutant | None]  # None: not possible here


def mutated(draw: random.Random, schedule: Schedule, mutation: Mutation) -> tuple[Schedule, set[int]] | None:
    rows = [list(own) for own in schedule.ranks]
    done = mutation(draw, schedule, rows)
    if done is None:
        return None
    return replace(schedule, ranks=tuple(tuple(own) for own in done[0])), done[1]


def somewhere(draw: random.Random, rows: Rows) -> tuple[int, int]:
    rank = draw.choice([r for r, own in enumerate(rows) if own])
    return rank, draw.randrange(len(rows[rank]))


def drop(draw: random.Random, _: Schedule, rows: Rows) -> Mutant:
    """An entry, or one half of a pair."""
    rank, position = somewhere(draw, rows)
    entry = rows[rank].pop(position)
    if isinstance(entry, Pair) and draw.random() < 0.7:
        rows[rank].insert(position, draw.choice(entry))
    return rows, {rank}


def duplicate(draw: random.Random, _: Schedule, rows: Rows) -> Mutant:
    rank, position = somewhere(draw, rows)
    rows[rank].insert(draw.randrange(len(rows[rank]) + 1), rows[rank][position])
    return rows, {rank}


def changed(draw: random.Random, rows: Rows, change: Callable[[Action], Action]) -> Mutant:
    rank, position = somewhere(draw, rows)
    entry = rows[rank][position]
    if isinstance(entry, Pair):
        half = draw.choice(["forward", "backward"])
        rows[rank][position] = entry._replace(**{half: change(getattr(entry, half))})
    else:
        rows[rank][position] = change(entry)
    return rows, {rank}


def relabel_stage(draw: random.Random, schedule: Schedule, rows: Rows) -> Mutant:
    return changed(draw, rows, lambda a: a._replace(stage=draw.randrange(schedule.stages)))


def relabel_microbatch(draw: random.Random, schedule: Schedule, rows: Rows) -> Mutant:
    return changed(draw, rows, lambda a: a._replace(microbatch=draw.randrange(schedule.microbatches)))


def relabel_kind(draw: random.Random, _: Schedule, rows: Rows) -> Mutant:
    return changed(draw, rows, lambda a: a._replace(kind=draw.choice("FBIW")))


def weights_first(draw: random.Random, _: Schedule, rows: Rows) -> Mutant | None:
    """A W before its I."""
    places = [(r, p) for r, own in enumerate(rows) for p, entry in enumerate(own) if entry.kind == "W"]
    if not places:
        return None
    rank, position = draw.choice(places)
    entry = rows[rank].pop(position)
    before = next(p for p, e in enumerate(rows[rank]) if e == Action("I", *entry.parts[0][1:]))
    rows[rank].insert(draw.randrange(before + 1), entry)
    return rows, {rank}


def reverse(draw: random.Random, _: Schedule, rows: Rows) -> Mutant:
    rank, first = somewhere(draw, rows)
    last = draw.randrange(first, len(rows[rank])) + 1
    rows[rank][first:last] = rows[rank][first:last][::-1]
    return rows, {rank}


def swap(draw: random.Random, _: Schedule, rows: Rows) -> Mutant:
    """Two entries of a rank, often of one microbatch and therefore dependent."""
    rank, first = somewhere(draw, rows)
    microbatch = rows[rank][first].parts[0].microbatch
    same = [p for p, e in enumerate(rows[rank]) if microbatch in [a.microbatch for a in e.parts]]
    second = draw.choice(same if draw.random() < 0.7 else range(len(rows[rank])))
    rows[rank][first], rows[rank][second] = rows[rank][second], rows[rank][first]
    return rows, {rank}


def other_rank(draw: random.Random, _: Schedule, rows: Rows) -> Mutant | None:
    if len(rows) < 2:
        return None
    rank, position = somewhere(draw, rows)
    other = draw.choice([r for r in range(len(rows)) if r != rank])
    entry = rows[rank].pop(position)
    rows[other].insert(draw.randrange(len(rows[other]) + 1), entry)
    return rows, {rank, other}


MUTATIONS: tuple[Mutation, ...] = (
    drop,
    duplicate,
    relabel_stage,
    relabel_microbatch,
    relabel_kind,
    weights_first,
    reverse,
    swap,
    other_rank,
)


def is_legal(schedule: Schedule) -> bool:
    """By brute force: counts, and then every rank as far as it goes until none goes on."""
    parts = [(rank, part) for rank, own in enumerate(schedule.ranks) for entry in own for part in entry.parts]
    count = Counter(part for _, part in parts)
    homes: dict[tuple[int, int], set[int]] = {}
    for rank, (_, stage, microbatch) in parts:
        homes.setdefault((stage, microbatch), set()).add(rank)
    expected = {(s, m) for s in range(schedule.stages) for m in range(schedule.microbatches)}
    if set(homes) != expected:
        return False
    for (stage, microbatch), ranks in homes.items():
        kinds = tuple(count["FBIW"[k], stage, microbatch] for k in range(4))
        if kinds not in ((1, 1, 0, 0), (1, 0, 1, 1)):
            return False
        if len(ranks) > 1 or stage not in schedule.placement[ranks.pop()]:
            return False

    done: set[tuple[str, int, int]] = set()
    last = schedule.stages - 1

    def ready(kind: str, stage: int, microbatch: int) -> bool:
        if kind == "F":
            return stage == 0 or ("F", stage - 1, microbatch) in done
        if kind == "W":
            return ("I", stage, microbatch) in done
        later = stage == last or bool({("B", stage + 1, microbatch), ("I", stage + 1, microbatch)} & done)
        return later and ("F", stage, microbatch) in done

    left = [list(reversed(own)) for own in schedule.ranks]
    moved = True
    while moved:
        moved = False
        for own in left:
            while own and all(ready(*part) for part in own[-1].parts):
                done.update(own.pop().parts)
                moved = True
    return not any(left)
