"""The integer functions against mpmath; as functions of floats they are tested beside the fast ones."""

import random
from fractions import Fraction

import mpmath
import pytest
from mpmath import libmp

from refimpl.numerics import fixedpoint


@pytest.mark.parametrize("bits", [10, 64, 192, 1000, 5000])
def test_constants_are_within_a_unit(bits):
    assert abs(fixedpoint.pi(bits) - libmp.pi_fixed(bits)) <= 1
    assert abs(fixedpoint.ln2(bits) - libmp.ln2_fixed(bits)) <= 1


@pytest.mark.parametrize(
    ("name", "low", "high"), [("exp", -1, 1), ("log", Fraction(1, 2), 2), ("sin", -1, 1), ("cos", -1, 1)]
)
@pytest.mark.parametrize("bits", [53, 160, 600])
def test_functions_are_within_four_units(name, low, high, bits):
    rng = random.Random(0)
    one = 1 << bits
    few, many = int(low * one), int(high * one)
    near = [t for t in (-1, 0, 1, one - 1, one, one + 1) if few <= t <= many]
    with mpmath.workprec(bits + 60):
        for t in [few, many, *near, *(rng.randint(few, many) for _ in range(200))]:
            exact = getattr(mpmath, name)(mpmath.mpf(t) / one) * one
            assert abs(getattr(fixedpoint, f"{name}_fixed")(t, bits) - exact) < 4


def test_nearest_rounds_once_into_subnormals_and_to_infinity():
    assert fixedpoint.nearest(3, 1075) == 1e-323  # a tie: 1.5 steps go to 2
    assert fixedpoint.nearest(1, 1075) == 0.0
    assert fixedpoint.nearest((1 << 60) + 1, 1135) == 5e-324
    assert fixedpoint.nearest(-((1 << 53) + 1), 0) == -(2.0**53)
    assert fixedpoint.nearest(1, -1024) == float("inf")
    assert fixedpoint.nearest(-1, -1024) == -float("inf")


def test_double_double_keeps_106_bits():
    t = fixedpoint.pi(160)
    high, low = fixedpoint.double_double(t, 160)
    assert high == 3.141592653589793
    assert abs(Fraction(high) + Fraction(low) - Fraction(t, 1 << 160)) < Fraction(1, 1 << 105)


@pytest.mark.parametrize("name", ["exp", "sin", "cos"])
def test_the_smallest_arguments_are_settled_too(name):
    assert getattr(fixedpoint, name)(5e-324) == (5e-324 if name == "sin" else 1.0)
