"""The update of the selection bias."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import EXACT, bits

from refimpl.numerics.precision import arithmetic
from refimpl.training import bias


def test_underloaded_experts_rise_and_overloaded_ones_fall() -> None:
    moved = bias.update(EXACT, np.array([0.5, 0.0, -1.0]), [np.array([[4, 2, 0]])], 0.25)
    assert moved.tolist() == [0.25, 0.0, -0.75]


def test_an_expert_of_exactly_mean_load_is_left_alone() -> None:
    """A mean of 7/3 is no float; 3 * 7 / 3 in integers is."""
    load = np.array([[2, 2, 3]])
    assert bias.update(EXACT, np.zeros(3), [load], 1.0).tolist() == [1.0, 1.0, -1.0]
    even = np.full((1, 7), 10**15 + 1)
    assert not bias.update(EXACT, np.zeros(7), [even], 1.0).any()


def test_one_token_more_than_the_mean_counts_at_any_size() -> None:
    load = np.full((1, 4), 2**52)
    load[0, 0] += 1
    load[0, 1] -= 1
    assert bias.update(EXACT, np.zeros(4), [load], 1.0).tolist() == [-1.0, 1.0, 0.0, 0.0]


@given(st.integers(0, 10**9))
def test_only_the_whole_batch_counts(seed: int) -> None:
    """Microbatches, ranks and sequences in any division and order give the same bits."""
    rng = np.random.default_rng(seed)
    experts = int(rng.integers(1, 9))
    counts = rng.integers(0, 5, (6, experts))
    start = rng.standard_normal(experts)
    whole = bias.update(EXACT, start, [counts], 0.001)
    order = rng.permutation(6)
    parts = np.split(counts[order], np.sort(rng.integers(0, 7, 2)))
    assert bits(bias.update(EXACT, start, parts, 0.001)) == bits(whole)
    mean = counts.sum(0).mean()
    signs = np.sign(np.round((whole - start) / 0.001))
    assert (signs == np.sign(np.round(mean - counts.sum(0), 9))).all()


@pytest.mark.parametrize("name", ["float32", "bf16"])
def test_the_bias_is_kept_in_fp32(name: str) -> None:
    ar = arithmetic(name)
    moved = bias.update(ar, ar.array([0.1]), [np.array([[1]])], 0.0)
    assert moved.astype(np.float64) == np.float64(np.float32(0.1))
    tenth = bias.update(ar, ar.array([0.0, 0.0]), [np.array([[1, 0]])], 0.001)
    assert tenth.astype(np.float64).tolist() == [-float(np.float32(0.001)), float(np.float32(0.001))]
