"""AdamW and clipping."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import EXACT, FLOAT64, bits

from refimpl import TrainingConfig
from refimpl.numerics.precision import arithmetic
from refimpl.training import adamw
from refimpl.training.adamw import Powers

PLAIN = TrainingConfig(weight_decay=0.0)


def one(training: TrainingConfig, powers: Powers, *values: float, rate: float = 0.001) -> list[float]:
    arrays = [np.array([[value]]) for value in values]
    return [float(x[0, 0]) for x in adamw.update(FLOAT64, training, rate, powers, *arrays)]


class TestByHand:
    def test_a_warm_step(self) -> None:
        """Step 2, with the numbers of the specification's example."""
        w, m, v = one(TrainingConfig(), Powers(0.81, 0.9025), 0.5, 0.02, 0.0009, 0.04)
        assert w == pytest.approx(0.498767596959, abs=1e-12)
        assert (m, v) == (pytest.approx(0.022), pytest.approx(0.000935))

    def test_the_first_step_from_zero_is_the_sign_of_the_gradient(self) -> None:
        for gradient in (3.0, -0.002):
            w, _, _ = one(PLAIN, Powers().next(PLAIN), 1.0, 0.0, 0.0, gradient, rate=0.25)
            assert w == pytest.approx(1.0 - math.copysign(0.25, gradient), rel=1e-5)

    def test_a_parameter_without_gradient_decays_and_its_moments_fade(self) -> None:
        w, m, v = one(TrainingConfig(), Powers(0.5, 0.5), 2.0, 0.0, 0.0, 0.0, rate=0.5)
        assert (w, m, v) == (2.0 - 0.05 * 2.0, 0.0, 0.0)
        _, m, v = one(TrainingConfig(), Powers(0.5, 0.5), 2.0, 1.0, 1.0, 0.0)
        assert (m, v) == (1.0 + (1.0 - 0.9) * -1.0, 0.95)

    def test_decay_is_not_divided_by_the_second_moment(self) -> None:
        without = one(PLAIN, Powers(0.81, 0.9025), 0.5, 0.02, 0.0009, 0.04)[0]
        decayed = one(TrainingConfig(), Powers(0.81, 0.9025), 0.5, 0.02, 0.0009, 0.04)[0]
        assert without - decayed == pytest.approx(0.001 * 0.1 * 0.5)

    def test_epsilon_is_added_to_the_corrected_root(self) -> None:
        training = TrainingConfig(adam_epsilon=1.0, weight_decay=0.0, adam_beta1=0.0, adam_beta2=0.0)
        w, _, _ = one(training, Powers(0.0, 0.75), 0.0, 0.0, 0.0, 2.0, rate=1.0)
        assert w == -2.0 / (2.0 / 0.5 + 1.0)


def test_gains_and_biases_are_spared_where_only_matrices_decay() -> None:
    training = TrainingConfig(weight_decay_on="matrices")
    for shape, decays in (((3,), False), ((3, 1), True)):
        zero = np.zeros(shape)
        w, _, _ = adamw.update(EXACT, training, 0.5, Powers(0.5, 0.5), np.ones(shape), zero, zero, zero)
        assert w.reshape(-1).tolist() == [0.95 if decays else 1.0] * 3


def test_powers_are_running_products() -> None:
    powers = Powers()
    for _ in range(3):
        powers = powers.next(PLAIN)
    assert (powers.beta1, powers.beta2) == (0.9 * 0.9 * 0.9, 0.95 * 0.95 * 0.95)


class TestClipping:
    def test_the_norm_is_of_all_tensors_together(self) -> None:
        parts = [np.array([[3.0, 0.0], [0.0, 4.0]]), np.array([12.0])]
        for ar in (EXACT, FLOAT64):
            assert float(adamw.norm(ar, parts)) == 13.0

    def test_a_large_norm_is_brought_to_the_limit_but_for_the_epsilon(self) -> None:
        coefficient = adamw.clip_coefficient(EXACT, TrainingConfig(), np.float64(4.0))
        assert coefficient == 1.0 / (4.0 + 1e-6)

    @pytest.mark.parametrize("norm", [0.0, 0.5, 1.0 - 1e-6])
    def test_a_small_norm_changes_nothing(self, norm: float) -> None:
        assert adamw.clip_coefficient(EXACT, TrainingConfig(), np.float64(norm)) == 1.0

    @given(st.integers(0, 10**9))
    def test_in_exact_the_norm_is_one_rounding_of_each_sum(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        parts = [rng.standard_normal((3, 4)), rng.standard_normal(7) * 1e8, rng.standard_normal(2) * 1e-8]
        exact = [math.fsum(_squares(part)) for part in parts]
        assert float(adamw.norm(EXACT, parts)) == math.sqrt(math.fsum(exact))


def _squares(part: np.ndarray) -> list[float]:
    """Three numbers for each square, whose sum it is to about a hundred bits."""
    found = []
    for x in part.reshape(-1).tolist():
        high = float(np.float32(x))
        low = x - high
        found += [high * high, 2 * high * low, low * low]
    return found


@given(st.integers(0, 10**9))
def test_it_is_torch_s_order_in_plain_python(seed: int) -> None:
    rng = np.random.default_rng(seed)
    training = TrainingConfig(
        adam_beta1=float(rng.random()), adam_beta2=float(rng.random()), weight_decay=float(rng.random())
    )
    steps, rate = int(rng.integers(1, 9)), float(rng.random())
    powers = Powers()
    w, m, v = 1.0, 0.0, 0.0
    ours = [np.array([[x]]) for x in (w, m, v)]
    for n in range(1, steps + 1):
        g = float(rng.standard_normal())
        powers = powers.next(training)
        ours = list(adamw.update(EXACT, training, rate, powers, *ours, np.array([[g]])))
        w -= rate * training.weight_decay * w
        m += (1 - training.adam_beta1) * (g - m)
        v = training.adam_beta2 * v + (1 - training.adam_beta2) * g * g
        root = math.sqrt(v) / math.sqrt(1 - training.adam_beta2**n) + training.adam_epsilon
        w -= rate / (1 - training.adam_beta1**n) * m / root
    assert [float(x[0, 0]) for x in ours] == pytest.approx([w, m, v], rel=1e-9)


def test_a_recipe_keeps_moments_in_bf16_and_masters_in_fp32() -> None:
    rng = np.random.default_rng(0)
    ar: Any = arithmetic("bf16")
    arrays = [rng.standard_normal((4, 4)) ** 2 for _ in range(4)]
    w, m, v = adamw.update(ar, PLAIN, 0.1, Powers(0.5, 0.5), *arrays)
    assert (w == w.astype(np.float32)).all()
    for moment in (m, v):
        assert not (moment.astype(np.float32).view(np.uint32) & 0xFFFF).any()


class TestAverage:
    def test_it_moves_towards_the_weight(self) -> None:
        assert adamw.average(EXACT, 0.75, np.array([1.0]), np.array([3.0])).tolist() == [1.5]

    def test_a_weight_that_stays_is_its_own_average(self) -> None:
        w = np.random.default_rng(0).standard_normal(9)
        assert bits(adamw.average(EXACT, 0.9, w, w)) == bits(w)
