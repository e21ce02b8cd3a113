"""RMS normalisation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import EXACT, FLOAT64, TOLERANCE, bits, context, worst_gradient_error

from refimpl.layers import norm
from refimpl.numerics.gradients import Gradients

X = np.array([[3.0, -4.0, 0.0], [1.0, 2.0, 2.0]])
GAIN = np.array([1.0, 2.0, -1.0])


def run(ar, x, gain, eps=1e-6):
    return norm.forward(context({"weight": gain}, ar=ar), ar.array(x), eps)


def back(x, gain, dy, eps=1e-6, ar=FLOAT64):
    c, grads = context({"weight": gain}, ar=ar), Gradients(ar)
    dx = norm.backward(c, dy, run(ar, x, gain, eps)[1], grads)
    return dx, grads.reduce()["m.weight"]


@pytest.mark.parametrize("ar", [FLOAT64, EXACT])
def test_the_formula_by_hand(ar) -> None:
    y, _ = run(ar, X, GAIN, eps=0.25)
    first, second = math.sqrt(25.0 / 3.0 + 0.25), math.sqrt(3.0 + 0.25)  # epsilon inside of the root
    expected = np.array([[3 / first, -8 / first, 0.0], [1 / second, 4 / second, -2 / second]])
    assert np.abs(y - expected).max() <= 4 * 2.0**-53 * 3


def test_the_gradient_by_hand() -> None:
    # One element: y = g x (x^2 + e)^(-1/2), dy/dx = g e (x^2 + e)^(-3/2), dy/dg = x (x^2 + e)^(-1/2).
    dx, dgain = back(np.array([[3.0]]), np.array([2.0]), np.array([[1.0]]), eps=16.0)
    assert dx.item() == pytest.approx(2.0 * 16.0 / 125.0, rel=1e-14)
    assert dgain.item() == pytest.approx(3.0 / 5.0, rel=1e-15)


@given(st.integers(-20, 20), st.integers(0, 10**6))
def test_a_power_of_two_in_x_cancels_bit_for_bit_when_epsilon_scales_too(k: int, seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal((3, 8))
    y, _ = run(EXACT, x, np.ones(8), 2.0**-20)
    scaled, _ = run(EXACT, x * 2.0**k, np.ones(8), 2.0 ** (2 * k - 20))
    assert bits(scaled) == bits(y)


def test_the_sign_of_x_is_the_sign_of_y() -> None:
    x = np.random.default_rng(4).standard_normal((3, 8))
    assert bits(run(EXACT, -x, np.ones(8))[0]) == bits(-run(EXACT, x, np.ones(8))[0])


def test_a_permutation_of_width_and_gain_is_a_permutation_of_y_bit_for_bit_in_exact() -> None:
    rng = np.random.default_rng(4)
    x, gain, order = rng.standard_normal((3, 33)), rng.standard_normal(33), rng.permutation(33)
    assert bits(run(EXACT, x[:, order], gain[order])[0]) == bits(run(EXACT, x, gain)[0][:, order])


def test_zeros_stay_zeros_and_are_no_division_by_zero() -> None:
    y, _ = run(EXACT, np.zeros((2, 4)), np.ones(4))
    assert not y.any()


def test_the_root_mean_square_of_the_normalised_is_one() -> None:
    x = np.random.default_rng(4).standard_normal((5, 64)) * 1e3
    y, _ = run(EXACT, x, np.ones(64), 1e-12)
    assert np.abs((y**2).mean(-1) - 1.0).max() < 1e-13


def test_without_epsilon_s_share_the_gradient_is_orthogonal_to_x() -> None:
    rng = np.random.default_rng(6)
    x, dy = rng.standard_normal((4, 16)), rng.standard_normal((4, 16))
    dx, _ = back(x, rng.standard_normal(16), dy, eps=1e-300)
    assert np.abs((dx * x).sum(-1)).max() < 1e-14


def test_in_exact_the_gain_s_gradient_is_rounded_once() -> None:
    x, dy = np.array([[1.0], [1.0], [1.0], [1.0]]), np.array([[2.0**60], [1.0], [-(2.0**60)], [2.0**-60]])
    _, dgain = back(x, np.array([1.0]), dy, eps=1e-300, ar=EXACT)
    assert dgain.item() == 1.0


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_gradients_are_those_of_the_complex_step(eps: float) -> None:
    rng = np.random.default_rng(1)
    values = {"x": rng.standard_normal((4, 6)), "weight": rng.standard_normal(6)}
    cotangent = rng.standard_normal((4, 6))
    dx, dgain = back(values["x"], values["weight"], cotangent, eps)

    def forward(ar, at):
        return run(ar, at["x"], at["weight"], eps)[0]

    worst = worst_gradient_error(forward, values, {"x": dx, "weight": dgain}, cotangent)
    assert worst <= TOLERANCE
