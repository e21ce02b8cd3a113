"""Distances and the three tests on them."""

import numpy as np
import pytest

from refimpl.cases.claims import CLAIMS
from refimpl.cases.judge import Tolerance, measure, spread_factor

FP32 = CLAIMS["fp32"]
OURS = np.array([1.0, -2.0, 4.0, 0.5])


def _loose(element=1.0, spread=1.0, bias=1.0):
    return Tolerance(np.full(4, element), spread, bias)


def test_the_worst_element_is_the_one_that_exceeds_its_own_bound_most():
    theirs = OURS + np.array([0.0, 0.3, 0.4, -0.2])
    bounds = np.array([1.0, 1.0, 4.0, 0.1])
    found = measure(OURS, theirs, Tolerance(bounds, 1.0, 1.0), FP32)
    assert (found.at, found.ours, found.theirs) == (3, 0.5, 0.3)
    assert np.isclose(found.absolute, 0.2)
    assert np.isclose(found.relative, 0.4)
    assert np.isclose(found.excess, 2.0)
    assert found.outside == 0.25
    assert found.reason == "elements outside of their bound"


def test_ulps_are_those_of_the_claim():
    theirs = OURS * (1 + 2.0**-7)
    assert measure(OURS, theirs, _loose(), CLAIMS["bf16"]).ulps == 1.0
    assert measure(OURS, theirs, _loose(), FP32).ulps == 2.0**16


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_never_pass(bad):
    theirs = OURS.copy()
    theirs[2] = bad
    found = measure(OURS, theirs, Tolerance(np.full(4, np.inf), np.inf, np.inf), FP32)
    assert not found.holds
    assert found.reason == "NaN or infinity"
    assert found.at == 2


@pytest.mark.parametrize(
    ("theirs", "holds"), [(-np.inf, True), (-1e9, True), (-100.0, False), (np.inf, False), (np.nan, False)]
)
def test_a_masked_score_may_be_very_negative(theirs, holds):
    ours = np.array([1.0, -np.inf])
    assert measure(ours, np.array([1.0, theirs]), Tolerance(np.ones(2), 1.0, 1.0), FP32).holds == holds


def test_without_a_tolerance_only_the_same_values_pass():
    assert measure(OURS, OURS.copy(), None, FP32).holds
    assert not measure(OURS, OURS * (1 + 2.0**-50), None, FP32).holds
    assert measure(np.zeros(1), np.array([-0.0]), None, FP32).holds


def test_spread_catches_what_is_a_little_wrong_everywhere():
    found = measure(OURS, OURS + np.array([0.5, -0.5, 0.5, -0.5]), _loose(spread=0.1), FP32)
    assert found.excess == 0.5
    assert found.spread == 5.0
    assert found.reason == "errors spread wider than roundings do"


def test_bias_catches_a_common_factor():
    found = measure(OURS, 1.01 * OURS, _loose(bias=0.001), FP32)
    assert np.isclose(found.bias, 0.01)
    assert found.reason == "off by a common factor"


def test_huge_and_tiny_values_do_not_overflow():
    for scale in (1e300, 1e-300):
        found = measure(OURS * scale, 1.5 * OURS * scale, Tolerance(np.full(4, scale), scale, 1.0), FP32)
        assert np.isfinite([found.spread, found.bias]).all()
        assert np.isclose(found.bias, 0.5)


def test_few_elements_may_spread_more():
    assert spread_factor(1) == 8.0
    assert spread_factor(10**6) < 4.01
