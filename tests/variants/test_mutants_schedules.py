"""Mistakes of schedules: what each makes is what its catalogue entry says."""

import numpy as np
import pytest

from refimpl.cases.build import build
from refimpl.cases.instruments import Data
from refimpl.cases.suites import definition
from refimpl.pipeline import arrays
from refimpl.pipeline.check import check
from refimpl.variants.mutants import BITS_MUTANTS


def made(id: str, case: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(what the mutant gives for a case, what is right)."""
    d = definition(f"schedule/{case}")
    built = build(d)
    found = BITS_MUTANTS[id].runs[d.component](Data(built.given, {}, d.arguments))
    return dict(found), dict(built.expected)


def schedule(order: np.ndarray, case: str):
    given = definition(f"schedule/{case}").arguments
    expected = build(definition(f"schedule/{case}")).expected
    return arrays.schedule(order, expected["placement"], given["stages"], given["microbatches"])


def test_the_last_rank_counts_from_one() -> None:
    found, right = made("S01", "1f1b-4x10")
    forwards = found["order"][3][found["order"][3, :, 0] == 0]
    assert forwards[:, 2].tolist() == list(range(1, 11))
    assert np.array_equal(found["order"][:3], right["order"][:3])
    assert set(found) == {"order"}  # it cannot run


@pytest.mark.parametrize(
    ("id", "case"),
    [("S02a", "1f1b-4x10"), ("S03", "zb1p-4x10"), ("S03", "zbv-4x10"), ("S04", "dualpipe-8x20")],
)
def test_a_quiet_one_is_a_legal_schedule_that_costs_time_or_memory(id: str, case: str) -> None:
    found, right = made(id, case)
    assert check(schedule(found["order"], case)) == []
    times, peaks = "makespan", "peak.released_at_W"
    worse = (found[times] > right[times]).any() or (found[peaks] > right[peaks]).any()
    assert worse or not np.array_equal(found["start"], right["start"])


def test_warm_up_off_by_one_holds_one_more_activation_where_there_are_more() -> None:
    found, right = made("S02a", "1f1b-4x10")
    assert (found["peak.released_at_W"] - right["peak.released_at_W"]).tolist() == [1, 1, 1, 1]


def test_a_warm_up_without_the_factor_of_two_is_shorter() -> None:
    found, right = made("S02b", "interleaved-4x16-v2-g8")
    shorter = []
    for rank in range(4):
        first = [int(np.argmax(order[rank, :, 0] == 1)) for order in (found["order"], right["order"])]
        shorter.append(first[1] - first[0])
    assert shorter == [3, 2, 1, 0]


def test_whole_backwards_at_the_end_are_as_many() -> None:
    found, right = made("S04", "dualpipe-4x10")
    kinds = [[int((o[..., 0] == kind).sum()) for kind in range(5)] for o in (found["order"], right["order"])]
    (f, b, i, w, fb), (f_, b_, i_, w_, fb_) = kinds
    assert (f, fb, b + i) == (f_, fb_, b_ + i_)
    assert i == w < i_ == w_


@pytest.mark.parametrize(
    ("id", "case", "rule"), [("S05", "dualpipe-4x10", "deadlock"), ("S07", "zbv-4x10", "stage")]
)
def test_another_placement_is_illegal_on_that_of_the_rule(id: str, case: str, rule: str) -> None:
    found, _ = made(id, case)
    assert rule in {finding.rule for finding in check(schedule(found["order"], case))}


def test_groups_that_are_ignored_are_those_of_no_group_size() -> None:
    found, _ = made("S06", "interleaved-4x16-v2-g8")
    assert np.array_equal(found["order"], arrays.order(arrays.plan("interleaved", 4, 16, 2, 4).ranks))


def test_a_backward_that_takes_as_long_as_i_makes_ranks_less_busy() -> None:
    found, right = made("S08", "1f1b-4x10")
    assert (right["busy"][0] - found["busy"][0]).tolist() == [20, 20, 20, 20]  # W of ten microbatches


@pytest.mark.parametrize("id", ["S13a", "S13b", "S13c", "S13d", "S13e", "S13f"])
def test_a_checker_without_a_rule_passes_what_only_that_rule_forbids(id: str) -> None:
    case = {
        "S13a": "deadlock-1f1b",
        "S13b": "doubled-1f1b",
        "S13c": "dropped-1f1b",
        "S13d": "w-before-i-zb1p",
        "S13e": "wrong-rank-dualpipe",
        "S13f": "wrong-rank-1f1b",
    }[id]
    found, right = made(id, f"illegal-{case}")
    assert (found["illegal"][0], right["illegal"][0]) == (0, 1)
