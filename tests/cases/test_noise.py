"""The noise floor: reproducible, and like the roundings it stands for."""

import numpy as np
import pytest

from refimpl.cases.noise import UNIT, Noisy
from refimpl.numerics.arithmetic import Exact
from refimpl.numerics.generator import tensor

A, B = tensor(1, "noise a", (40, 512), 2.0**-7), tensor(1, "noise b", (50, 512), 2.0**-7)


def _error(ar, a=A, b=B):
    return ar.matmul(a, b) - a @ b.T


@pytest.mark.parametrize("kind", ["storage", "product", "accumulate"])
def test_the_same_seed_gives_the_same_noise(kind):
    x = np.sqrt(np.abs(A))
    first, again, other = (Noisy(kind, seed).at("s", Noisy(kind, seed).exp(x)) for seed in (3, 3, 5))
    assert np.array_equal(first, again)
    assert kind == "product" or not np.array_equal(first, other)


def test_operands_that_bf16_holds_lose_nothing_when_they_are_read():
    assert not _error(Noisy("product", 0)).any()
    assert _error(Noisy("product", 0), np.sqrt(np.abs(A))).all()


def test_a_query_is_read_as_computed_because_some_scale_it_first():
    noisy = Noisy("product", 0)
    assert _error(noisy, noisy.at("attention.query", A)).all()
    assert not _error(noisy, noisy.at("attention.key", A)).any()


def test_a_stored_value_moves_by_at_most_the_unit_and_evenly():
    moved = (Noisy("storage", 0).at("s", A) - A) / (UNIT * np.where(A == 0, 1, A))
    assert np.abs(moved).max() <= 1.0 + 1e-7
    assert abs(moved.mean()) < 0.02
    assert abs(moved.std() - 1 / np.sqrt(3)) < 0.01


def test_every_second_run_cuts_products():
    x = np.sqrt(np.abs(A))
    cut = Noisy("product", 1).operand("s", x).value
    assert (np.abs(cut) <= np.abs(x)).all()


@pytest.mark.parametrize("terms", ["of random sign", "positive"])
def test_the_noise_of_a_sum_is_that_of_adding_one_by_one_or_more(terms):
    a, b = (np.cbrt(x).astype(np.float32).astype(np.float64) for x in (A, B))  # few bits would add exactly
    a, b = (a, b) if terms == "of random sign" else (np.abs(a), np.abs(b))
    one_by_one = np.zeros((40, 50), np.float32)
    for k in range(512):
        one_by_one += np.float32(a[:, k : k + 1]) * np.float32(b[:, k])
    real = np.sqrt(np.mean((one_by_one - a @ b.T) ** 2))
    model = np.sqrt(np.mean(_error(Noisy("accumulate", 0), a, b) ** 2))
    assert real < 1.5 * model
    assert model < 8 * real


def test_without_its_kind_of_rounding_a_run_is_exact():
    plain, noisy = Exact(), Noisy("storage", 0)
    x = np.sqrt(np.abs(A))
    for name in ("exp", "sin", "cos", "sqrt", "sigmoid", "sum", "mean"):
        assert np.array_equal(getattr(plain, name)(x), getattr(noisy, name)(x))
    assert np.array_equal(noisy.segment_sum(x[:4], np.array([1, 0, 1, 1]), 3)[0], x[1])


def test_a_masked_score_stays_masked():
    scores = np.array([[1.0, -np.inf]])
    for kind in ("storage", "accumulate"):
        noisy = Noisy(kind, 0)
        assert noisy.at("s", scores)[0, 1] == -np.inf
        assert noisy.exp(scores)[0, 1] == 0.0
