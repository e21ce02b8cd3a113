"""Metrics and tables.  SPEC PIPE-45, PIPE-46."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from fractions import Fraction
from functools import cache
from typing import Any

import pytest
from recorded_orders import FOLDER, recorded

from refimpl.pipeline import summary
from refimpl.pipeline.rules import RULES, plan
from refimpl.pipeline.schedule import Schedule
from refimpl.pipeline.simulate import Durations, simulate


@cache
def rows() -> dict[str, dict[str, Any]]:
    with gzip.open(FOLDER / "metrics.json.gz", "rt", encoding="utf-8") as file:
        return {row["file"]: row for row in json.load(file)["rows"]}


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


RECORDED = [
    "torch_gpipe_P4_M8_V1",
    "torch_1f1b_P8_M20_V1",
    "torch_interleaved1f1b_P4_M10_V3",
    "torch_interleavedzerobubble_P4_M8_V1",
    "torch_zbvzerobubble_P4_M10_V2",
    "deepseek_dualpipe_P8_M20_V2",
    "deepseek_dualpipev_P4_M10_V2",
]


@pytest.mark.parametrize("name", RECORDED)
def test_metrics_are_the_recorded_ones_under_the_same_names(name: str) -> None:
    row, schedule = rows()[name], recorded(name)
    for run in row["runs"]:
        times = [run[kind] for kind in ("F", "I", "W", "B", "FB")]
        durations = Durations(*times, latency=run["lat"], scale=run.get("stage_scale") or ())
        found = as_json(summary.metrics(simulate(schedule, durations)))
        for key in ("makespan", "busy", "idle", "start", "finish", "idle_within_span"):
            assert found[key] == run[key], (run["durations"], key)
        assert found["peak_in_flight"] == row["peak_in_flight"]
        assert [{k: n for k, n in own.items() if n} for own in found["counts"]] == [
            {k: n for k, n in own.items() if n} for own in row["counts"]
        ]


def test_a_published_formula_stands_beside_the_simulated_value() -> None:
    found = as_json(summary.metrics(simulate(plan("dualpipe", 8, 20), Durations(2, 2, 2))))
    assert (found["published"]["value"], found["published"]["applies"], max(found["idle"])) == (12, True, 12)
    assert found["closed"]["idle"] == found["idle"]
    assert found["durations"] == {"F": 2, "I": 2, "W": 2, "B": 4, "FB": 6, "latency": 0, "scale": []}
    assert found["parameter_copies"] == [2.0] * 8


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line]


def test_the_table_has_a_row_for_each_rank() -> None:
    text = lines(summary.text(simulate(plan("zb1p", 2, 3), Durations(2, 3, 1))))
    assert text[0] == "ZB1P, 2 ranks, 3 microbatches"
    assert text[1].split()[:8] == ["rank", "stages", "F", "I", "W", "busy", "idle", "idle"]
    cells = [line.split() for line in text[3:5]]
    assert [row[:5] for row in cells] == [["0", "0", "3", "3", "3"], ["1", "1", "3", "3", "3"]]
    assert [row[5] for row in cells] == ["18", "18"]
    assert text[5] == "F 2, I 3, W 1: makespan 22, idle 4 (18.2%)"
    assert text[6] == (
        "published idle: (PP - 1)(F + B - 2W) = 4, simulated 4; the formula applies: it holds on every rank"
    )


def test_a_formula_that_does_not_apply_says_why() -> None:
    text = summary.text(simulate(plan("zb1p", 4, 2), Durations(1, 1, 1)))
    assert "does not apply: it needs M >= P" in text


def test_an_order_that_is_not_the_rules_has_a_formula_that_does_not_apply() -> None:
    timeline = simulate(replace(plan("1f1b", 4, 8), name="zb1p"), Durations(1, 1, 1))
    assert "does not apply: its order is not that of zb1p" in summary.text(timeline)
    found = as_json(summary.metrics(timeline))
    assert [found[kind]["applies"] for kind in ("published", "closed")] == [False, False]


def test_idle_within_the_span_is_set_beside_a_formula_about_it() -> None:
    text = summary.text(simulate(plan("zbv", 4, 8), Durations(1, 1, 1)))
    assert "published idle within span: 0, simulated 0; the formula applies" in text


def test_a_schedule_of_ones_own_has_no_formula() -> None:
    assert "no formula is published for it" in summary.text(
        simulate(recorded("torch_gpipe_P4_M8_V1"), Durations(1, 1, 1))
    )


@pytest.mark.parametrize("names", [["1f1b", "zbv"], ["gpipe", "zb1p", "dualpipe"], list(RULES)])
def test_schedules_that_are_compared_do_the_same_work(names: list[str]) -> None:
    schedules = [plan(name, 4, 10) for name in names]
    timelines = summary.alike(schedules, Durations(3, 2, 1, latency=5))
    assert len({sum(one.busy) for one in timelines}) == 1
    assert {one.durations.latency for one in timelines} == {5}


def test_a_stage_takes_as_long_as_the_part_of_the_model_that_it_is() -> None:
    schedules = [plan("1f1b", 4, 12), plan("zbv", 4, 12), plan("interleaved", 4, 12, 3)]
    found = [one.durations for one in summary.alike(schedules, Durations(1, 2, 3, 4, 5))]
    assert [one.F for one in found] == [6, 3, 2]
    assert (found[1].I, found[1].W, found[1].B, found[1].FB) == (6, 9, 12, 15)


def test_compared_schedules_are_rows() -> None:
    schedules = [plan(name, 8, 20) for name in ("1f1b", "zbv", "dualpipe")]
    durations = Durations(1, 1, 1)
    text = lines(summary.compared(summary.alike(schedules, durations), durations))
    assert text[0].startswith("8 ranks, 20 microbatches; F 1, B 2, I 1, W 1, F&B 3, latency 0: times of 1/16")
    rows = [line.split() for line in text[3:6]]
    assert rows[0][:6] == ["1F1B", "8", "x", "2", "162", "42"]
    assert rows[0][-6:] == ["42", "8", "8", "1", "42", "yes"]
    assert rows[1][:6] == ["ZB-V", "16", "x", "1", "127", "7"]
    assert rows[1][8:11] == ["8", "8", "1"]
    assert rows[2][:6] == ["DualPipe", "8", "x", "2", "132", "12"]
    assert rows[2][-5:] == ["9", "9", "2", "12", "yes"]


def test_copies_are_shares_of_the_model() -> None:
    uneven = Schedule("mine", 1, 3, ((0, 1), (2,)), ((), ()))
    assert summary._copies(uneven) == [Fraction(4, 3), Fraction(2, 3)]
