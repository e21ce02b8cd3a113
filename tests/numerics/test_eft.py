"""Error-free transformations keep every bit."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from refimpl.numerics import eft

numbers = st.floats(min_value=-1e150, max_value=1e150, allow_subnormal=True)


def array(x: float) -> np.ndarray:
    return np.array([x])


def test_two_sum_by_hand():
    s, e = eft.two_sum(np.array([1.0]), np.array([2.0**-60]))
    assert (s[0], e[0]) == (1.0, 2.0**-60)


def test_two_prod_by_hand():
    p, e = eft.two_prod(np.array([1 + 2.0**-52]), np.array([1 + 2.0**-52]))
    assert (p[0], e[0]) == (1 + 2.0**-51, 2.0**-104)


@given(numbers, numbers)
def test_two_sum_is_exact(x, y):
    s, e = eft.two_sum(array(x), array(y))
    assert s[0] == x + y
    assert Fraction(s[0]) + Fraction(e[0]) == Fraction(x) + Fraction(y)


@given(numbers, numbers)
def test_fast_two_sum_is_exact_for_ordered_magnitudes(x, y):
    x, y = (x, y) if abs(x) >= abs(y) else (y, x)
    s, e = eft.fast_two_sum(array(x), array(y))
    assert s[0] == x + y
    assert Fraction(s[0]) + Fraction(e[0]) == Fraction(x) + Fraction(y)


@given(numbers)
def test_split_gives_two_halves_of_26_bits(x):
    high, low = eft.split(array(x))
    assert Fraction(high[0]) + Fraction(low[0]) == Fraction(x)
    for part in (high[0], low[0]):
        numerator = abs(Fraction(part).numerator)
        assert numerator == 0 or (numerator // (numerator & -numerator)).bit_length() <= 26


@given(numbers, numbers)
def test_two_prod_is_exact(x, y):
    assume(x == 0 or y == 0 or abs(x * y) >= 2.0**-967)
    p, e = eft.two_prod(array(x), array(y))
    assert p[0] == x * y
    assert Fraction(p[0]) + Fraction(e[0]) == Fraction(x) * Fraction(y)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (0,)])
def test_inputs_stay_untouched(shape):
    x, y = np.full(shape, 1.1), np.full(shape, 2.3)
    eft.two_sum(x, y)
    eft.two_prod(x, y)
    assert (x == 1.1).all()
    assert (y == 2.3).all()
