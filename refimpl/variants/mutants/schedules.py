"""Mistakes of pipeline schedules: their orders, their times, what is legal, the gradients of ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np

from refimpl.errors import Invalid
from refimpl.numerics.arithmetic import Array
from refimpl.pipeline import arrays, memory
from refimpl.pipeline.rules import plan
from refimpl.pipeline.schedule import Action, Entry, Pair, Schedule, numbered
from refimpl.pipeline.simulate import Durations
from refimpl.setting import Outputs, Setting
from refimpl.variants.mutants.bits import BitsMutant, Data, Run
from refimpl.variants.mutants.mutant import Mutant
from refimpl.variants.variation import Change

Reordered = Callable[[Schedule, Mapping[str, Any]], Schedule]


def _planned(change: Reordered, *names: str) -> dict[str, Run]:
    """Another order, of the schedules of these names, with what it comes to if it can be run at all."""

    def run(d: Data) -> Mapping[str, Array]:
        if d.arguments["schedule"] not in names:
            return {}
        other = change(arrays.of(d.arguments), d.arguments)
        try:
            return arrays.measured(other, arrays.durations(d.arguments))
        except Invalid:
            return {"order": arrays.order(other.ranks)}

    return {"plan": run}


def _timed(change: Callable[[Durations], Durations]) -> dict[str, Run]:
    """The right order under other durations."""

    def run(d: Data) -> Mapping[str, Array]:
        return arrays.measured(arrays.of(d.arguments), [change(own) for own in arrays.durations(d.arguments)])

    return {"plan": run}


def _durations(given: Durations, **other: int) -> Durations:
    fields = {name: getattr(given, name) for name in ("F", "I", "W", "B", "FB", "latency")}
    return Durations(**{**fields, **other}, scale=given.scale)


def _without_rule(*rules: str) -> dict[str, Run]:
    """A checker that does not know these rules."""

    def run(d: Data) -> Mapping[str, Array]:
        found = [f for f in arrays.findings(d.codes, d.arguments) if f.rule not in rules]
        return {"illegal": np.array([bool(found)], np.int32)}

    return {"legality": run}


def _with_ranks(schedule: Schedule, change: Callable[[int, tuple[Entry, ...]], list[Entry]]) -> Schedule:
    return replace(schedule, ranks=numbered([change(rank, own) for rank, own in enumerate(schedule.ranks)]))


def _from_one(s: Schedule, arguments: Mapping[str, Any]) -> Schedule:
    def own(rank: int, entries: tuple[Entry, ...]) -> list[Entry]:
        if rank < s.size - 1:
            return [*entries]
        return [Action(k, stage, m + (k == "F")) for e in entries for k, stage, m in e.parts]

    return _with_ranks(s, own)


def _warm_up(longer: Callable[[int, int], int]) -> Reordered:
    """longer(P, r): by how many forwards the warm-up of rank r is longer."""

    def change(s: Schedule, arguments: Mapping[str, Any]) -> Schedule:
        def own(rank: int, entries: tuple[Entry, ...]) -> list[Entry]:
            forwards = [e for e in entries if e.kind == "F"]
            backwards = [e for e in entries if e.kind != "F"]
            before = entries.index(backwards[0])
            before = max(1, min(before + longer(s.size, rank), len(forwards)))
            steady = [e for two in zip(backwards, forwards[before:], strict=False) for e in two]
            return [*forwards[:before], *steady, *backwards[len(forwards) - before :]]

        return _with_ranks(s, own)

    return change


def _weights_last(s: Schedule, arguments: Mapping[str, Any]) -> Schedule:
    return _with_ranks(s, lambda rank, entries: sorted(entries, key=lambda e: e.kind == "W"))


def _unsplit(s: Schedule, arguments: Mapping[str, Any]) -> Schedule:
    """From the last pair on every backward is a whole one."""

    def own(rank: int, entries: tuple[Entry, ...]) -> list[Entry]:
        last = max(i for i, e in enumerate(entries) if isinstance(e, Pair))
        late = {e.parts[0][1:] for e in entries[last:] if e.kind == "I"}
        kept = [e for e in entries if not (e.kind == "W" and e.parts[0][1:] in late)]
        return [Action("B", *e[1:]) if e.kind == "I" and e[1:] in late else e for e in kept]

    return _with_ranks(s, own)


def _placed(stage: Callable[[Schedule, Action], int]) -> Reordered:
    """Every action on another stage."""

    def moved(s: Schedule, entry: Entry) -> Entry:
        made = [action._replace(stage=stage(s, action)) for action in entry.parts]
        return Pair(*made) if isinstance(entry, Pair) else made[0]

    return lambda s, arguments: _with_ranks(s, lambda rank, entries: [moved(s, e) for e in entries])


def _unmirrored(s: Schedule, a: Action) -> int:
    return a.stage if a.microbatch < s.microbatches // 2 else s.stages - 1 - a.stage


def _in_loops(s: Schedule, a: Action) -> int:
    return a.stage if a.stage < s.size else 3 * s.size - 1 - a.stage


def _ungrouped(s: Schedule, arguments: Mapping[str, Any]) -> Schedule:
    return plan(s.name, s.size, s.microbatches, arguments["chunks"])


def _span(d: Data) -> Mapping[str, Array]:
    return {"idle": arrays.planned(d.arguments)["idle_within_span"]}


def _released_early(d: Data) -> Mapping[str, Array]:
    return {"peak.released_at_W": np.array(memory.peak(arrays.of(d.arguments), "I"), np.int32)}


def _gradients(factor: Callable[[Setting, str], float]) -> Change:
    """Gradients of ranks times a factor, by name."""

    def change(setting: Setting) -> Setting:
        if "split" not in setting.arguments:  # no pipeline
            return setting

        def after(outputs: Outputs) -> Outputs:
            return {n: x * factor(setting, n) if n.startswith("grad.") else x for n, x in outputs.items()}

        return replace(setting, after=(*setting.after, after))

    return change


_DUAL: Final = ("dualpipe", "dualpipev")
MUTANTS: Final = (
    BitsMutant("S01", _planned(_from_one, "1f1b")),
    BitsMutant("S02a", _planned(_warm_up(lambda ranks, rank: 1), "1f1b")),
    BitsMutant("S02b", _planned(_warm_up(lambda ranks, rank: -(ranks - 1 - rank)), "interleaved")),
    BitsMutant("S03", _planned(_weights_last, "zb1p", "zbv", *_DUAL)),
    BitsMutant("S04", _planned(_unsplit, *_DUAL)),
    BitsMutant("S05", _planned(_placed(_unmirrored), "dualpipe")),
    BitsMutant("S06", _planned(_ungrouped, "interleaved")),
    BitsMutant("S07", _planned(_placed(_in_loops), "zbv", "dualpipev")),
    BitsMutant("S08", _timed(lambda d: _durations(d, B=d.I, FB=d.F + d.I))),
    BitsMutant("S09", {"plan": _span}),
    BitsMutant("S10", _timed(lambda d: _durations(d, FB=d.F + d.B))),
    BitsMutant("S11", _timed(lambda d: _durations(d, latency=0))),
    BitsMutant("S12", {"plan": _released_early}),
    BitsMutant("S13a", _without_rule("deadlock")),
    BitsMutant("S13b", _without_rule("repeated")),
    BitsMutant("S13c", _without_rule("missing")),
    BitsMutant("S13d", _without_rule("order", "deadlock")),
    BitsMutant("S13e", _without_rule("rank")),
    BitsMutant("S13f", _without_rule("stage")),
    BitsMutant("S14", {"legality": lambda d: {"illegal": np.array([1], np.int32)}}),
    Mutant("S15", _gradients(lambda s, name: 1.0 / s.arguments["microbatches"])),
    Mutant("S16", _gradients(lambda s, name: 2.0 if name.endswith("lm_head.weight") else 1.0)),
)
