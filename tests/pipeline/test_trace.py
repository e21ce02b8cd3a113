"""Chrome traces: a slice for each entry, arrows along what is sent.  SPEC PIPE-43."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from refimpl.pipeline import trace
from refimpl.pipeline.rules import RULES, plan
from refimpl.pipeline.simulate import Durations, Timeline, simulate


def timeline(name: str = "dualpipe", ranks: int = 4, microbatches: int = 10, **more: Any) -> Timeline:
    return simulate(plan(name, ranks, microbatches), Durations(5, 4, 3, FB=9, **more))


def events(*timelines: Timeline) -> list[dict[str, Any]]:
    found = json.loads(trace.text(timelines))
    assert set(found) == {"displayTimeUnit", "traceEvents"}
    events: list[dict[str, Any]] = found["traceEvents"]
    return events


def test_one_rank_by_hand() -> None:
    found = events(simulate(plan("gpipe", 1, 1), Durations(5, 4, 3)))
    assert [event["ph"] for event in found] == ["M", "M", "M", "M", "X", "X"]
    common = {"cat": "GPipe,F", "ph": "X", "pid": 0, "tid": 0, "args": {"stage": 0, "microbatch": 0}}
    assert found[4] == common | {"name": "F 0", "ts": 0, "dur": 5, "cname": "rail_idle"}
    assert found[5] == common | {"name": "B 0", "cat": "GPipe,B", "ts": 5, "dur": 7, "cname": "rail_load"}


@pytest.mark.parametrize("name", RULES)
def test_every_entry_is_a_slice_at_its_time(name: str) -> None:
    one = timeline(name, latency=2)
    slices = [event for event in events(one) if event["ph"] == "X"]
    expected = [
        (rank, start, end - start)
        for rank, own in enumerate(one.start)
        for start, end in zip(own, one.end[rank], strict=True)
    ]
    assert [(event["tid"], event["ts"], event["dur"]) for event in slices] == expected
    assert {event["cname"] for event in slices} <= set(trace.COLOURS.values())


@pytest.mark.parametrize("name", RULES)
def test_an_arrow_goes_from_each_message_to_the_one_that_waits_for_it(name: str) -> None:
    one = timeline(name)
    found = events(one)
    sent = {event["id"]: event for event in found if event["ph"] == "s"}
    received = {event["id"]: event for event in found if event["ph"] == "f"}
    assert set(sent) == set(received)
    hops = one.schedule.stages - 1
    if name in ("zbv", "dualpipev"):
        hops -= 1  # the two stages in the turn of the V are on one rank
    assert len(sent) == 2 * hops * one.schedule.microbatches
    kinds = Counter(event["name"] for event in sent.values())
    assert kinds["activation"] == kinds["gradient"]
    slices = [(e["tid"], e["ts"], e["ts"] + e["dur"]) for e in found if e["ph"] == "X"]
    begins = {(rank, start) for rank, start, _ in slices}
    for number, start in sent.items():
        end = received[number]
        assert start["tid"] != end["tid"]
        assert start["ts"] < end["ts"]
        assert any(rank == start["tid"] and a <= start["ts"] < b for rank, a, b in slices)
        assert (end["tid"], end["ts"]) in begins


def test_a_pair_names_both_halves() -> None:
    pairs = [event for event in events(timeline()) if event.get("cat") == "DualPipe,FB"]
    assert pairs[0]["name"] == "F 3 & B 6"
    assert pairs[0]["args"] == {"F stage": 0, "F microbatch": 3, "B stage": 3, "B microbatch": 6}


def test_several_schedules_are_processes_of_their_own() -> None:
    found = events(timeline("1f1b"), timeline("zb1p"))
    names = [event["args"]["name"] for event in found if event["name"] == "process_name"]
    assert names == ["1F1B, 4 ranks, 10 microbatches", "ZB1P, 4 ranks, 10 microbatches"]
    assert {event["pid"] for event in found} == {0, 1}
    arrows = [event["id"] for event in found if event["ph"] == "s"]
    assert len(arrows) == len(set(arrows))


def test_threads_are_named_after_ranks() -> None:
    named = [event for event in events(timeline()) if event["name"] == "thread_name"]
    assert [(event["tid"], event["args"]["name"]) for event in named] == [
        (rank, f"Device {rank}") for rank in range(4)
    ]


def test_without_durations_there_are_no_arrows() -> None:
    found = events(simulate(plan("1f1b", 2, 2), Durations(0, 0, 0)))
    assert {event["ph"] for event in found} == {"M", "X"}
