"""Token embedding."""

import numpy as np
from support import EXACT, FLOAT64, TOLERANCE, bits, config, context, worst_gradient_error

from refimpl.layers import embedding
from refimpl.numerics.gradients import Gradients

TABLE = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])


def test_a_token_is_its_row() -> None:
    y, _ = embedding.forward(context({"weight": TABLE}), np.array([1, 0, 1]))
    assert y.tolist() == [[4, 5, 6], [1, 2, 3], [4, 5, 6]]


def test_gradients_of_one_id_add_up_and_absent_ids_get_zero() -> None:
    c = context({"weight": np.zeros((4, 2))}, cfg=config(vocab_size=4))
    _, saved = embedding.forward(c, np.array([2, 0, 2]))
    grads = Gradients(FLOAT64)
    assert embedding.backward(c, np.array([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]]), saved, grads) is None
    assert grads.reduce()["m.weight"].tolist() == [[2, 20], [0, 0], [5, 50], [0, 0]]


def test_in_exact_a_row_s_sum_is_rounded_once() -> None:
    c = context({"weight": np.zeros((1, 1))}, cfg=config(vocab_size=1), ar=EXACT)
    dy = np.array(
        [[1.0], [2.0**60], [-(2.0**60)], [2.0**-60]]
    )  # added in order the first and the last are lost
    _, saved = embedding.forward(c, np.zeros(4, np.int64))
    grads = Gradients(EXACT)
    embedding.backward(c, dy, saved, grads)
    assert grads.reduce()["m.weight"].item() == 1.0


def test_the_gradient_is_that_of_the_complex_step() -> None:
    rng = np.random.default_rng(3)
    values, cotangent = {"weight": rng.standard_normal((5, 3))}, rng.standard_normal((7, 3))
    ids = rng.integers(0, 4, 7)
    c = context(values, cfg=config(vocab_size=5))
    grads = Gradients(FLOAT64)
    embedding.backward(c, cotangent, embedding.forward(c, ids)[1], grads)
    found = {"weight": grads.reduce()["m.weight"]}

    def forward(ar, at):
        return embedding.forward(context(at, ar=ar), ids)[0]

    assert worst_gradient_error(forward, values, found, cotangent) <= TOLERANCE


def test_the_bits_are_those_of_the_table() -> None:
    table = np.random.default_rng(1).standard_normal((3, 4))
    y, _ = embedding.forward(context({"weight": table}, ar=EXACT), np.array([2, 2, 0]))
    assert bits(y) == bits(table[[2, 2, 0]])
