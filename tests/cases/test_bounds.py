"""Error bounds: by hand, and against float32 itself."""

import numpy as np
import pytest

from refimpl.cases.bounded import ACCUMULATE, PENDING, PRODUCT, STORAGE, Bounded, lift, stored
from refimpl.cases.bounds import Bounding
from refimpl.numerics.floating import Floating
from refimpl.numerics.generator import tensor

AR = Bounding()
U = 2.0**-24
A = np.array([[1.0, -2.0, 3.0], [0.5, 4.0, -1.0]])
B = np.array([[2.0, 1.0, 1.0], [-1.0, 3.0, 2.0]])


def _with(value, storage):
    return Bounded(np.array(value), (np.array(storage), None, None, None))


def test_a_product_of_matrices_is_bounded_by_absolute_values():
    y = AR.matmul(A, B)
    assert np.array_equal(y.plain, A @ B.T)
    assert np.array_equal(y.parts[ACCUMULATE], 3 * np.abs(A) @ np.abs(B).T)
    assert y.parts[PRODUCT] is None  # both are given, and exact in bf16
    assert y.parts[STORAGE] is None


def test_a_computed_operand_is_rounded_when_it_is_read():
    y = AR.matmul(_with(A, 0.1 * np.abs(A)), B)
    both = np.abs(A) @ np.abs(B).T
    for part, exact in ((y.parts[STORAGE], 0.1 * both), (y.parts[PRODUCT], both)):
        assert (part >= exact * (1 - 1e-12)).all()  # bounds are rounded upwards to a few bits
        assert (part <= exact * 1.02).all()


def test_elementary_operations_propagate_absolute_errors():
    x, y = _with([3.0], [0.25]), _with([-2.0], [0.5])
    assert (x + y).parts[STORAGE] == 0.75
    assert (x * y).parts[STORAGE] == 3 * 0.5 + 2 * 0.25
    assert np.isclose((x / y).parts[STORAGE], 0.25 / 2 + 3 * 0.5 / 4)
    assert (x * y).parts[ACCUMULATE] == 6.0
    assert (1.0 - x).parts[STORAGE] == 0.25
    assert (-x).parts[STORAGE] == 0.25


def test_roundings_between_boundaries_are_pending_until_the_value_is_stored():
    x = lift(np.array([3.0])) * 2.0 + 1.0
    assert x.parts[PENDING] == 6.0 + 7.0
    assert x.parts[STORAGE] is None
    assert stored(x).parts[STORAGE] == 6.0 + 7.0 + 7.0
    assert stored(x).parts[PENDING] is None


def test_sums_and_functions_drop_what_is_pending():
    x = lift(np.array([[3.0, 1.0]])) * 2.0
    assert AR.sum(x).parts[PENDING] is None
    assert AR.exp(x).parts[STORAGE] is None


def test_a_masked_score_has_no_error():
    scores = np.where(np.array([True, False]), lift(np.array([1.0, 2.0])) * 3.0, -np.inf)
    exps = AR.exp(scores - AR.max(scores))
    assert exps.plain[1] == 0.0
    assert all(part is None or (np.isfinite(part).all() and part[1] == 0.0) for part in exps.parts)


def test_rearrangements_move_errors_with_values():
    x = _with(A, np.abs(A) / 8)
    both = np.concatenate([x[:, 1:], lift(B[:, :1])], -1)
    assert np.array_equal(both.parts[STORAGE], np.concatenate([np.abs(A[:, 1:]) / 8, np.zeros((2, 1))], -1))
    picked = np.take_along_axis(x, np.array([[2], [0]]), -1)
    assert np.array_equal(picked.parts[STORAGE], np.abs(picked.plain) / 8)
    dense = np.zeros_like(x)
    np.put_along_axis(dense, np.array([[2], [0]]), picked, -1)
    assert np.array_equal(dense.parts[STORAGE], np.abs(dense.plain) / 8)
    dense[0] = x[1]
    assert np.array_equal(dense.parts[STORAGE][0], np.abs(A[1]) / 8)
    assert np.array_equal(x.T.reshape(6).parts[STORAGE], np.abs(A.T).reshape(6) / 8)
    assert np.array_equal(np.stack([x, x]).parts[STORAGE], np.stack([np.abs(A)] * 2) / 8)


def test_what_has_no_rule_is_refused():
    with pytest.raises(TypeError):
        np.tanh(lift(A))
    with pytest.raises(TypeError):
        np.cumsum(lift(A))


def _program(ar, x, w, g):
    """A norm, a linear, a softmax, a gated product and a sum: everything that layers do."""
    x, gain = ar.array(x), ar.array(g)
    inv = 1.0 / ar.sqrt(ar.mean(x * x) + 1e-6)[:, None]
    normed = ar.at("norm.out", ar.at("norm.normed", x * inv) * gain)
    y = ar.at("linear.out", ar.fprop(ar.operand("linear.in", normed), ar.weight(w)))
    exps = ar.exp(y - ar.max(y)[:, None])
    probs = ar.at("probs", exps / ar.sum(exps)[:, None])
    out = ar.at("act", y * ar.sigmoid(y) * probs)
    return ar.matmul(out, ar.array(w).T), ar.dot(out, y), ar.log(ar.sum(exps)), ar.sin(y) + ar.cos(y)


def test_float32_stays_within_the_bounds():
    x, w, g = (
        tensor(1, "x", (6, 64), 2.0**-7),
        tensor(1, "w", (32, 64), 2.0**-9),
        tensor(1, "g", (64,), 2.0**-7),
    )
    exact = _program(Floating(np.float64), x, w, g)
    for single, bounded, double in zip(
        _program(Floating(np.float32), x, w, g), _program(AR, x, w, g), exact, strict=True
    ):
        bound = sum(U * part for part in stored(bounded).parts[:3] if part is not None)
        assert np.allclose(bounded.plain, double, rtol=1e-12)
        assert (np.abs(single - double) <= bound).all()
        assert (np.abs(single - double) > bound / 1000).any()  # and they are not endless
