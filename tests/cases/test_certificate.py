"""Certificates: a verdict that cannot fail is found out."""

import numpy as np
import pytest
import toy

from refimpl.cases.certificate import certified
from refimpl.errors import Invalid

Y = np.array([[1.0, -2.0], [3.0, 4.0]])


def _certified(reference, offered=None):
    return certified(
        reference.case, reference.expected, reference.extras, offered or {"fp32": None, "bf16": None}
    )


def test_every_wrong_output_is_rejected_by_a_tight_verdict():
    case = _certified(toy.case(toy.number("y", Y)))
    assert case.claims == ("fp32", "bf16")
    factors = case.certificate["rejects"]["bf16"]
    assert set(factors) == {"zeros", "negated", "scaled", "rows"}
    assert all(factor > 1 for factor in factors.values())
    assert factors["negated"] > factors["zeros"] > factors["scaled"]


def test_a_claim_under_which_a_wrong_output_passes_is_not_offered():
    loose = toy.number("y", Y, bound=2.0**8, spread=2.0**8, bias=2.0**8)
    case = _certified(toy.case(loose))
    assert case.claims == ("fp32",)
    assert case.refused["bf16"].startswith("the verdict would accept y when it is wrong")


def test_a_case_without_any_claim_is_no_case():
    endless = toy.number("y", Y, bound=2.0**30, spread=2.0**30, bias=2.0**30)
    with pytest.raises(Invalid, match="offered for no claim"):
        _certified(toy.case(endless))


def test_a_gradient_that_cannot_be_judged_is_listed_and_the_others_carry_the_claim():
    loose = toy.number("grad.w", Y, bound=2.0**8, spread=2.0**8, bias=2.0**8)
    case = _certified(toy.case(toy.number("y", Y), toy.number("grad.x", Y), loose))
    assert case.claims == ("fp32", "bf16")
    assert case.tensor("grad.w").unjudged == ("bf16",)
    assert case.tensor("grad.x").unjudged == ()


def test_wrong_outputs_that_are_right_are_named():
    case = _certified(
        toy.case(toy.number("y", Y), toy.number("same", np.ones((3, 2))), toy.number("none", np.zeros(3)))
    )
    unfit = case.certificate["not_applicable"]
    assert set(unfit["same"]) == {"rows"}
    assert set(unfit["none"]) == {"zeros", "negated", "scaled", "rows"}
    assert "y" not in unfit


def test_sets_are_spoiled_as_sets():
    case = _certified(toy.case(toy.members("topk_idx", [[3, 1], [7, 5]], [1.0, 1.0])))
    assert set(case.certificate["rejects"]["fp32"]) == {"zeros", "rows"}


def test_a_claim_that_leaves_every_row_open_is_not_offered():
    sets = toy.members("topk_idx", [[3, 1], [7, 5]], [1e-3, 1e-3])
    assert _certified(toy.case(sets)).claims == ("fp32",)
