"""Exact times: by hand, beside every recorded metric, beside a naive simulation, and what is refused."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_orders import FOLDER, recorded
from support import one_sentence

from refimpl.errors import Invalid
from refimpl.pipeline import memory, simulate
from refimpl.pipeline.rules import RULES, plan
from refimpl.pipeline.schedule import Action, Pair, Schedule
from refimpl.pipeline.simulate import Durations, sequence, timed

RUN = ("makespan", "busy", "idle", "first", "last", "idle_within_span")
RECORDED = ("makespan", "busy", "idle", "start", "finish", "idle_within_span")
RELEASES = {
    "release_at_I": ("I", False),
    "release_at_W": ("W", False),
    "release_at_I_B_frees_before_F_in_FB": ("I", True),
    "release_at_W_B_frees_before_F_in_FB": ("W", True),
}


def two_ranks(*entries: str) -> Schedule:
    """Two stages on two ranks, microbatches as digits: "F0 B0" is what rank 0 does, and so on."""
    ranks = tuple(
        tuple(Action(word[0], rank, int(word[1:])) for word in own.split())
        for rank, own in enumerate(entries)
    )
    return Schedule("by hand", 2, 2, ((0,), (1,)), ranks)


def naive(schedule: Schedule, d: Durations) -> list[list[int]]:
    """When entries end, by looking at all ranks again and again."""
    done: dict[tuple[str, int, int], tuple[int, int]] = {}
    ends: list[list[int]] = [[] for _ in schedule.ranks]
    while any(len(end) < len(own) for end, own in zip(ends, schedule.ranks, strict=True)):
        for rank, own in enumerate(schedule.ranks):
            if len(ends[rank]) == len(own):
                continue
            entry, needs = own[len(ends[rank])], []
            for kind, stage, microbatch in entry.parts:
                if kind == "F":
                    needs += [("F", stage - 1, microbatch)] if stage else []
                elif kind == "W":
                    needs += [("I", stage, microbatch)]
                else:
                    needs += [("F", stage, microbatch)]
                    needs += [("I", stage + 1, microbatch)] if stage + 1 < schedule.stages else []
            if any(need not in done for need in needs):
                continue
            start = max(
                [
                    ends[rank][-1] if ends[rank] else 0,
                    *(done[need][0] + d.latency * (done[need][1] != rank) for need in needs),
                ]
            )
            scales = [d.scale[part.stage] if d.scale else 1 for part in entry.parts]
            if len(scales) == 1:
                took = getattr(d, entry.kind) * scales[0]
            elif scales[0] == scales[1]:
                took = d.FB * scales[0]
            else:
                took = d.F * scales[0] + d.B * scales[1]
            ends[rank].append(start + took)
            for part in entry.parts:
                done["I" if part.kind == "B" else part.kind, part.stage, part.microbatch] = start + took, rank
    return ends


def test_two_microbatches_through_two_stages_by_hand() -> None:
    timeline = simulate.simulate(two_ranks("F0 F1 B0 B1", "F0 B0 F1 B1"), Durations(2, 2, 1))
    assert timeline.start == ((0, 2, 7, 12), (2, 4, 7, 9))
    assert timeline.end == ((2, 4, 10, 15), (4, 7, 9, 12))
    assert (timeline.makespan, timeline.busy, timeline.idle) == (15, (10, 10), (5, 5))
    assert (timeline.first, timeline.last, timeline.idle_within_span) == ((0, 2), (15, 12), (5, 0))


def test_latency_delays_only_what_another_rank_made() -> None:
    timeline = simulate.simulate(two_ranks("F0 B0", "F0 B0"), Durations(2, 2, 1, latency=4))
    assert timeline.start == ((0, 15), (6, 8))


def test_a_pair_waits_for_both_inputs_and_hands_over_both_results_at_its_end() -> None:
    pair = Pair(Action("F", 0, 1), Action("B", 0, 0))
    schedule = Schedule(
        "pair", 2, 2, ((0,), (1,)),
        ((Action("F", 0, 0), pair, Action("B", 0, 1)),
         (Action("F", 1, 0), Action("B", 1, 0), Action("F", 1, 1), Action("B", 1, 1))),
    )  # fmt: skip
    timeline = simulate.simulate(schedule, Durations(2, 2, 1, FB=4))
    assert timeline.start == ((0, 7, 16), (2, 4, 11, 13))


def test_halves_of_a_pair_that_are_scaled_differently_do_not_overlap() -> None:
    pair = Pair(Action("F", 0, 1), Action("B", 1, 0))
    times = Durations(2, 3, 1, FB=5)
    assert replace(times, scale=(3, 3)).of(pair) == 15
    assert replace(times, scale=(3, 2)).of(pair) == 2 * 3 + 4 * 2


@pytest.mark.parametrize("source", ["torch", "deepseek", "megatron", "sail"])
def test_every_recorded_metric_is_the_same_integer(source: str) -> None:
    with gzip.open(FOLDER / "metrics.json.gz", "rt", encoding="utf-8") as file:
        rows = [row for row in json.load(file)["rows"] if row["file"].startswith(source)]
    assert rows
    for row in rows:
        schedule = recorded(row["file"])
        for rule, peaks in row["peak_in_flight"].items():
            assert memory.peak(schedule, *RELEASES[rule]) == tuple(peaks), row["file"]
        steps = sequence(schedule)
        for run in row["runs"]:
            kinds = [run[kind] for kind in ("F", "I", "W", "B", "FB")]
            timeline = timed(schedule, steps, Durations(*kinds, run["lat"], run.get("stage_scale", ())))
            found = {name: getattr(timeline, name) for name in RUN}
            expected = [tuple(v) if isinstance(v, list) else v for v in (run[name] for name in RECORDED)]
            assert list(found.values()) == expected, (row["file"], run["durations"])


TIMES = st.integers(0, 12)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_times_equal_those_of_a_naive_simulation(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(list(RULES)))
    ranks = 2 * data.draw(st.integers(1, 3))
    microbatches = 2 * data.draw(st.integers(ranks, 8))
    schedule = plan(name, ranks, microbatches)
    scale = data.draw(st.sampled_from([(), tuple(1 + s % 3 for s in range(schedule.stages))]))
    times = Durations(*(data.draw(TIMES) for _ in range(6)), scale=scale)
    assert [list(end) for end in simulate.simulate(schedule, times).end] == naive(schedule, times)


def test_each_entry_is_looked_at_once_and_once_for_each_need(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    needed = simulate.Results.needed
    monkeypatch.setattr(simulate.Results, "needed", lambda self, e: looked.append(e) or needed(self, e))
    for name in RULES:
        looked.clear()
        steps = sequence(plan(name, 8, 64))
        assert len(looked) <= len(steps) + sum(len(step.needs) for step in steps)


@pytest.mark.parametrize("value", [-1, 1.0, "2", None, True, 10.5])
@pytest.mark.parametrize("field", ["F", "I", "W", "latency"])
def test_a_duration_is_a_whole_number_that_is_not_negative(field: str, value: object) -> None:
    with pytest.raises(Invalid) as caught:
        Durations(**{"F": 1, "I": 1, "W": 1, field: value})  # type: ignore[arg-type]
    one_sentence(caught, field, repr(value), "whole number")


def test_durations_are_durations() -> None:
    with pytest.raises(Invalid) as caught:
        simulate.simulate(plan("1f1b", 2, 2), (1, 1, 1))  # type: ignore[arg-type]
    one_sentence(caught, "tuple", "Durations")


def test_numpy_s_integers_are_whole_numbers() -> None:
    assert Durations(np.int64(2), np.int32(1), np.uint8(1)).FB == 4  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [(1,), (1, 1, 1), (1, -1), (1, 1.5)])
def test_there_is_a_whole_scale_for_each_stage(scale: tuple[int, ...]) -> None:
    with pytest.raises(Invalid) as caught:
        simulate.simulate(two_ranks("F0 B0", "F0 B0"), Durations(1, 1, 1, scale=scale))
    one_sentence(caught, "scale")


@pytest.mark.parametrize(
    ("entries", "fragments"),
    [
        (("F0 B0", "B0 F0"), ("rank 1 waits at position 0 for the F of stage 1 on microbatch 0",)),
        (("B0", "F0 B0"), ("rank 0 waits at position 0 for the F of stage 0", "no rank makes")),
        (("F0 W0 I0", "F0 B0"), ("rank 0 waits at position 1 for the I of stage 0 on microbatch 0",)),
        (("F0 B0 F1 B1", "F1 F0 B0 B1"), ("rank 0 waits at position 1", "rank 1 waits at position 0")),
        (("F0 F0 B0", "F0 B0"), ("rank 0", "position 1", "F of stage 0 on microbatch 0 again")),
        (("F0 B0 I0", "F0 B0"), ("position 2", "I of stage 0 on microbatch 0 again")),
        (("F0 B0 F7", "F0 B0"), ("position 2", "microbatch 7", "2 microbatches")),
        (("F0 X0", "F0 B0"), ("position 1", "X of stage 0")),
    ],
)
def test_what_waits_forever_or_comes_twice_is_named(
    entries: tuple[str, ...], fragments: tuple[str, ...]
) -> None:
    with pytest.raises(Invalid) as caught:
        simulate.simulate(two_ranks(*entries), Durations(1, 1, 1))
    one_sentence(caught, *fragments)
