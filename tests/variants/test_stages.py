"""Pieces of changes."""

import numpy as np
from changed import differing, outputs
from support import context

from refimpl.variants.stages import Other, Step, behind, columns, computing, gathered, inside, named
from refimpl.variants.variation import operations

DOUBLED = Step(lambda c, y: (2.0 * y, None), lambda c, dy, kept: 2.0 * dy)


def test_a_step_is_taken_where_it_shall_be_and_what_was_saved_stays() -> None:
    change = operations(**behind("linear", DOUBLED, named("down_proj")))
    right, found = outputs("mlp/narrow-vjp"), outputs("mlp/narrow-vjp", change)
    path = "model.layers.3.mlp.experts.17"
    assert np.array_equal(found[f"{path}.gate_proj"], right[f"{path}.gate_proj"])
    assert np.array_equal(found[f"{path}.down_proj"], right[f"{path}.down_proj"])  # the product itself
    assert all(np.allclose(found[n], 2.0 * right[n]) for n in right if n.startswith("grad."))


def test_an_operation_inside_of_another_is_replaced_there_only() -> None:
    change = inside("moe", **behind("linear", DOUBLED, named("down_proj")))
    assert differing("mlp/narrow-vjp", change) == []
    assert differing("block/dense-vjp", change) == []
    assert differing("block/experts-vjp", change)


def test_what_is_inside_of_two_operations_has_both_changes() -> None:
    once = inside("moe", **behind("linear", DOUBLED, named("down_proj")))
    right, found = (outputs("block/experts-vjp", m) for m in (once, lambda s: once(once(s))))
    name = "model.layers.3.mlp"
    assert np.allclose(found[name], 2.0 * right[name])


def test_elements_that_are_read_twice_have_both_gradients() -> None:
    c = context()
    step = gathered(lambda c, shape: np.array([[0, 0, 1], [5, 4, 3]]))
    y, kept = step.forward(c, np.arange(6.0).reshape(2, 3))
    assert y.tolist() == [[0, 0, 1], [5, 4, 3]]
    assert step.backward(c, np.arange(1.0, 7.0).reshape(2, 3), kept).tolist() == [[3, 3, 0], [6, 5, 4]]


def test_columns_beyond_a_row_are_those_of_the_next_and_the_last_row_reads_the_first() -> None:
    y, _ = columns(lambda c, width: np.arange(width) + 2).forward(None, np.arange(6.0).reshape(2, 3))
    assert y.tolist() == [[2, 3, 4], [5, 0, 1]]


def test_one_operation_computes_in_another_arithmetic() -> None:
    change = computing("norm", lambda ar, *given: Other(ar, mean=lambda x: 4.0 * ar.mean(x)))
    right, found = outputs("norm/hidden"), outputs("norm/hidden", change)
    assert all(np.allclose(found[name], right[name] / 2.0, rtol=1e-5) for name in right)
    assert differing("mlp/narrow-vjp", change) == []
