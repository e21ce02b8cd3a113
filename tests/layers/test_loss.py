"""Cross-entropy on the targets that count."""

import math

import mpmath
import numpy as np
import pytest
from support import EXACT, FLOAT64, TOLERANCE, bits, context, worst_gradient_error

from refimpl.layers import loss

TARGETS = np.array([2, -100, 0, 2])


def draw(seed: int = 0):
    return np.random.default_rng(seed).standard_normal((4, 3)) * 2


def run(ar, logits, targets=TARGETS, count=3):
    return loss.forward(context(ar=ar), ar.array(logits), targets, count)


@pytest.mark.parametrize("ar", [FLOAT64, EXACT])
def test_two_tokens_of_three_words_by_hand(ar) -> None:
    logits = np.log([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]]) + 4.0
    value, saved = run(ar, logits, np.array([1, 0]), 2)
    assert value == pytest.approx(-(math.log(0.5) + math.log(0.6)) / 2)
    assert saved.nll == pytest.approx([-math.log(0.5), -math.log(0.6)])
    dlogits = loss.backward(context(ar=ar), 1.0, saved)
    assert dlogits == pytest.approx(np.array([[0.1, -0.25, 0.15], [-0.2, 0.05, 0.15]]))


def test_a_token_without_a_target_counts_for_nothing() -> None:
    logits = draw()
    other = logits.copy()
    other[1] = [1e300, -np.inf, 7.0]
    value, saved = run(EXACT, logits)
    assert bits(run(EXACT, other)[0]) == bits(value)
    assert not loss.backward(context(ar=EXACT), 1.0, saved)[1].any()
    assert saved.nll.shape == (3,)


def test_the_divisor_is_the_count_that_is_given() -> None:
    value, saved = run(EXACT, draw(), count=3)
    half, of_half = run(EXACT, draw(), count=6)
    assert half == value / 2
    backward = [loss.backward(context(ar=EXACT), 1.0, s) for s in (saved, of_half)]
    assert backward[1] == pytest.approx(backward[0] / 2, rel=1e-15)


def test_without_any_target_it_is_zero_and_has_no_gradient() -> None:
    value, saved = run(EXACT, draw(), np.full(4, -100), count=5)
    assert value == 0.0
    assert not loss.backward(context(ar=EXACT), 1.0, saved).any()


def test_the_gradient_of_a_token_sums_to_zero() -> None:
    _, saved = run(FLOAT64, draw())
    assert np.abs(loss.backward(context(), 1.0, saved).sum(-1)).max() < 1e-15


def test_a_common_shift_of_logits_by_an_exact_amount_changes_no_bit() -> None:
    logits = np.random.default_rng(0).integers(-64, 64, (4, 3)) / 16.0
    assert bits(run(EXACT, logits)[0]) == bits(run(EXACT, logits + 1024.0)[0])


def test_logits_far_apart_neither_overflow_nor_lose_the_loss() -> None:
    value, saved = run(EXACT, np.array([[1e5, 0.0, -1e5]]), np.array([2]), 1)
    assert value == 2e5
    assert loss.backward(context(ar=EXACT), 1.0, saved).tolist() == [[1.0, 0.0, -1.0]]


def test_a_certain_prediction_keeps_its_small_loss() -> None:
    value, _ = run(EXACT, np.array([[30.0, 0.0, 0.0]]), np.array([0]), 1)
    with mpmath.workdps(40):
        expected = float(mpmath.log1p(2 * mpmath.exp(-30)))
    assert value == pytest.approx(expected, abs=2.0**-53 * 2)  # log of a sum near 1: absolute, not relative


def test_a_permutation_of_words_and_tokens_changes_no_bit_in_exact() -> None:
    rng = np.random.default_rng(0)
    logits, words, tokens = rng.standard_normal((6, 5)), rng.permutation(5), rng.permutation(6)
    targets = rng.integers(0, 5, 6)
    moved = np.argsort(words)[targets][tokens]
    value, _ = run(EXACT, logits[tokens][:, words], moved, 6)
    assert bits(value) == bits(run(EXACT, logits, targets, 6)[0])


@pytest.mark.parametrize("dloss", [1.0, -0.3])
def test_the_gradient_is_that_of_the_complex_step(dloss: float) -> None:
    at = {"logits": draw()}
    found = {"logits": loss.backward(context(), dloss, run(FLOAT64, at["logits"])[1])}

    def forward(ar, values):
        return run(ar, values["logits"])[0]

    assert worst_gradient_error(forward, at, found, np.array(dloss)) <= TOLERANCE
