"""Loads and MaxVio."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.training import loads


def test_counts_of_microbatches_and_sequences_add_up_by_layer() -> None:
    one = {1: np.array([[1, 2], [3, 0]]), 4: np.array([[5, 5], [0, 1]])}
    two = {1: np.array([[0, 7]]), 4: np.array([[1, 0]])}
    total = loads.add([one, two])
    assert {layer: load.tolist() for layer, load in total.items()} == {1: [4, 9], 4: [6, 6]}


@pytest.mark.parametrize(
    ("load", "expected"), [([2, 2, 2], 0.0), ([6, 0, 0], 2.0), ([3, 1, 2, 2], 0.5), ([0, 0], 0.0)]
)
def test_max_violation_by_hand(load: list[int], expected: float) -> None:
    assert loads.max_violation(np.array(load)) == expected


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=300))
def test_max_violation_is_one_division_of_integers(load: list[int]) -> None:
    found = loads.max_violation(np.array(load))
    total = sum(load)
    assert found == ((max(load) * len(load) - total) / total if total else 0.0)
    assert 0.0 <= found <= len(load) - 1


def test_shares_are_of_the_choices_and_of_each_row() -> None:
    assert loads.shares(np.array([[1, 3], [0, 0], [5, 5]])).tolist() == [[0.25, 0.75], [0.0, 0.0], [0.5, 0.5]]
