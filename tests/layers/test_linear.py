"""A linear without bias."""

import numpy as np
import pytest
from support import EXACT, FLOAT64, TOLERANCE, bits, context, worst_gradient_error

from refimpl.layers import linear
from refimpl.numerics.arithmetic import Operand
from refimpl.numerics.gradients import Gradients

X = np.array([[1.0, 2.0, 3.0], [-1.0, 0.5, 2.0]])
W = np.array([[2.0, 0.0, 1.0], [1.0, -1.0, 4.0]])


def run(ar, x, w):
    return linear.forward(context({"weight": w}, ar=ar), ar.operand("m.in", ar.array(x)))


@pytest.mark.parametrize("ar", [FLOAT64, EXACT])
class TestByHand:
    def test_forward_is_x_times_w_transposed(self, ar) -> None:
        y, _ = run(ar, X, W)
        assert y.tolist() == [[5.0, 11.0], [0.0, 6.5]]

    def test_backward_is_dgrad_and_wgrad(self, ar) -> None:
        _, saved = run(ar, X, W)
        grads, dy = Gradients(ar), np.array([[1.0, 2.0], [-1.0, 4.0]])
        dx = linear.backward(context({"weight": W}, ar=ar), dy, saved, grads)
        assert dx.tolist() == [[4.0, -2.0, 9.0], [2.0, -4.0, 15.0]]  # dy w
        assert grads.reduce()["m.weight"].tolist() == [[2.0, 1.5, 1.0], [-2.0, 6.0, 14.0]]  # dy^T x


def test_it_is_linear_and_exact_products_of_small_numbers_show_it() -> None:
    rng = np.random.default_rng(0)
    x, z, w = (rng.integers(-9, 9, s).astype(float) for s in ((4, 6), (4, 6), (5, 6)))
    together, _ = run(EXACT, 2 * x - z, w)
    assert bits(together) == bits(2 * run(EXACT, x, w)[0] - run(EXACT, z, w)[0])


def test_tokens_do_not_see_each_other_bit_for_bit_in_exact() -> None:
    rng = np.random.default_rng(5)
    x, w = rng.standard_normal((6, 40)), rng.standard_normal((7, 40))
    y, _ = run(EXACT, x, w)
    order = rng.permutation(6)
    assert bits(run(EXACT, x[order], w)[0]) == bits(y[order])
    assert bits(run(EXACT, x[2:3], w)[0]) == bits(y[2:3])


def test_the_weight_gradient_may_wait_for_the_w_pass() -> None:
    c = context({"weight": W})
    _, saved = run(FLOAT64, X, W)
    grads = Gradients(FLOAT64, deferred=True)
    linear.backward(c, np.ones((2, 2)), saved, grads)
    assert grads.run() == 1


def test_two_linears_may_read_one_operand() -> None:
    rng = np.random.default_rng(2)
    x = EXACT.operand("m.in", rng.standard_normal((3, 5)))
    w = rng.standard_normal((4, 5))
    first, _ = linear.forward(context({"weight": w}, ar=EXACT), x)
    second, _ = linear.forward(context({"weight": w}, ar=EXACT), x)
    assert bits(first) == bits(second) == bits(run(EXACT, x.value, w)[0])


def test_rows_of_an_operand_are_the_operand_of_the_rows() -> None:
    rng = np.random.default_rng(2)
    x, w, rows = rng.standard_normal((5, 6)), rng.standard_normal((4, 6)), np.array([3, 0, 3])
    gathered, _ = linear.forward(context({"weight": w}, ar=EXACT), EXACT.operand("m.in", x).rows(rows))
    assert bits(gathered) == bits(run(EXACT, x[rows], w)[0])


def test_gradients_are_those_of_the_complex_step() -> None:
    rng = np.random.default_rng(1)
    values = {"x": rng.standard_normal((4, 6)), "weight": rng.standard_normal((3, 6))}
    cotangent = rng.standard_normal((4, 3))
    grads = Gradients(FLOAT64)
    dx = linear.backward(
        context(values), cotangent, linear.forward(context(values), Operand(values["x"]))[1], grads
    )
    found = {"x": dx, "weight": grads.reduce()["m.weight"]}
    assert worst_gradient_error(
        lambda ar, at: run(ar, at["x"], at["weight"])[0], values, found, cotangent
    ) <= (TOLERANCE)


def test_a_cotangent_of_the_output_joins_where_its_gradient_is_formed() -> None:
    rng = np.random.default_rng(8)
    _, saved = run(FLOAT64, X, W)
    dy, more = rng.integers(-5, 5, (2, 2)) * 1.0, rng.integers(-5, 5, (2, 2)) * 1.0
    joined, plain = Gradients(FLOAT64), Gradients(FLOAT64)
    dx = linear.backward(context({"weight": W}, cotangents={"m": more}), dy, saved, joined)
    assert (dx == linear.backward(context({"weight": W}), dy + more, saved, plain)).all()
    assert (joined.reduce()["m.weight"] == plain.reduce()["m.weight"]).all()
