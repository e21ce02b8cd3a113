"""Judging tensors: sets, rows that are open, experts in another order, layouts."""

import numpy as np
import toy

from refimpl.cases.claims import CLAIMS, claim
from refimpl.cases.judging import decided, judge, judge_set

FP32, BF16 = CLAIMS["fp32"], CLAIMS["bf16"]
NOTHING = {}.get
IDS = np.array([[3, 1], [7, 5], [2, 9]])
# The first two rows are certain in float32 (2^-24), none in bf16 (2^-8).
SETS = toy.members("gate.topk_idx", IDS, [1e-3, 1e-3, 1e-9])


def test_a_bound_scales_with_the_roundoff_of_the_claim():
    reference = toy.case(toy.number("y", [1.0, 2.0, 4.0]))
    t = reference.case.tensors[0]
    theirs = np.array([1.0, 2.0, 4.0 + 2.0**-10])
    assert not judge(reference, t, theirs, NOTHING, FP32).distance.holds
    assert judge(reference, t, theirs, NOTHING, BF16).distance.holds
    assert judge(reference, t, theirs, NOTHING, claim("u=2^-9")).distance.holds
    assert not judge(reference, t, theirs, NOTHING, claim("u=2^-12")).distance.holds


def test_sets_are_compared_in_any_order():
    reference = toy.case(SETS)
    assert judge_set(reference, reference.case.tensors[0], IDS[:, ::-1], FP32).holds


def test_a_set_may_differ_only_where_the_margin_is_within_the_error():
    reference = toy.case(SETS)
    t = reference.case.tensors[0]
    assert decided(reference, t, FP32).tolist() == [True, True, False]
    theirs = IDS.copy()
    theirs[2, 0] = 4
    found = judge_set(reference, t, theirs, FP32)
    assert (found.holds, found.undecided, found.differing) == (True, 1, 1)
    theirs[1, 0] = 4
    found = judge_set(reference, t, theirs, FP32)
    assert (found.holds, found.wrong, found.first) == (False, 1, 1)
    assert judge_set(reference, t, theirs, BF16).holds


def test_weights_are_matched_by_expert():
    weight = np.array([[0.7, 0.3], [0.6, 0.4], [0.9, 0.1]])
    number = toy.number("gate.topk_weight", weight, ordered_by="gate.topk_idx", decided_by=("gate.topk_idx",))
    reference = toy.case(SETS, number)
    t = reference.case.tensors[1]
    theirs = {"gate.topk_idx": IDS[:, ::-1]}.get
    assert judge(reference, t, weight[:, ::-1], theirs, FP32).distance.holds
    assert not judge(reference, t, weight, theirs, FP32).distance.holds


def test_rows_with_another_set_are_left_out_and_counted():
    y = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    reference = toy.case(SETS, toy.number("y", y, decided_by=("gate.topk_idx",)))
    t = reference.case.tensors[1]
    ids, theirs = IDS.copy(), y.copy()
    ids[2], theirs[2] = (4, 9), 100.0
    found = judge(reference, t, theirs, {"gate.topk_idx": ids}.get, FP32)
    assert found.distance.holds
    assert found.undecided == 1
    theirs[0, 0] = 100.0
    found = judge(reference, t, theirs, {"gate.topk_idx": ids}.get, FP32)
    assert not found.distance.holds
    assert found.at == 0


def test_without_the_ports_sets_only_certain_rows_count():
    reference = toy.case(SETS, toy.number("y", [[1.0], [2.0], [3.0]], decided_by=("gate.topk_idx",)))
    t = reference.case.tensors[1]
    assert judge(reference, t, np.array([[1.0], [2.0], [9.0]]), NOTHING, FP32).distance.holds
    assert judge(reference, t, np.array([[1.0], [2.0], [9.0]]), NOTHING, BF16).distance is None


def test_the_layout_in_halves_is_undone_where_it_is_permitted():
    y = np.arange(1.0, 9.0).reshape(1, 8)
    halves = y[:, [0, 2, 4, 6, 1, 3, 5, 7]]
    permitted = toy.case(toy.number("q_pe", y, layouts=("halves",)))
    found = judge(permitted, permitted.case.tensors[0], halves, NOTHING, FP32)
    assert found.distance.holds
    assert found.layout == "halves"
    strict = toy.case(toy.number("q_pe", y))
    assert not judge(strict, strict.case.tensors[0], halves, NOTHING, FP32).distance.holds


def test_exact_cases_demand_the_values_rounded_once_to_the_claim():
    part = toy.number("y", [1.0 + 2.0**-12, 3.0])
    reference = toy.case(part)
    object.__setattr__(reference.case, "tolerance", {"derivation": "exact", "text": ""})
    t = reference.case.tensors[0]
    assert judge(reference, t, np.array([1.0 + 2.0**-12, 3.0]), NOTHING, FP32).distance.holds
    assert not judge(reference, t, np.array([1.0, 3.0]), NOTHING, FP32).distance.holds
    assert judge(reference, t, np.array([1.0, 3.0]), NOTHING, BF16).distance.holds
