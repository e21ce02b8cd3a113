"""The collector of gradients: now or later, in any order, merged, and shared parameters."""

from fractions import Fraction

import numpy as np
import pytest
from support import EXACT, FLOAT64, bits, same_bits

from refimpl.numerics.arithmetic import Exact, Operand
from refimpl.numerics.gradients import Gradients

RNG = np.random.default_rng(0)
DY, X = RNG.standard_normal((8, 3)), RNG.standard_normal((8, 4))
PARTS = [slice(0, 3), slice(3, 4), slice(4, 8)]


class Counting(Exact):
    """Counts the contractions it does."""

    def __init__(self) -> None:
        self.done = 0

    def wgrad(self, dy: Operand, x: Operand) -> np.ndarray:
        self.done += 1
        return super().wgrad(dy, x)


def operands(rows=slice(None)):
    return Operand(DY[rows]), Operand(X[rows])


def correctly_rounded(dy: np.ndarray, x: np.ndarray) -> np.ndarray:
    """dy^T x in rational numbers, rounded once."""
    exact = [[sum(Fraction(a) * Fraction(b) for a, b in zip(d, c, strict=True)) for c in x.T] for d in dy.T]
    return np.array([[float(value) for value in row] for row in exact])


@pytest.mark.parametrize("deferred", [True, False])
@pytest.mark.parametrize("ar", [EXACT, FLOAT64])
def test_a_weight_s_gradient_is_dy_transposed_x(ar, deferred: bool) -> None:
    grads = Gradients(ar, deferred)
    grads.weight("w", 0, *operands())
    assert grads.reduce()["w"] == pytest.approx(DY.T @ X, rel=1e-14)


@pytest.mark.parametrize("ar", [EXACT, FLOAT64])
def test_a_gain_s_gradient_is_the_sum_of_products(ar) -> None:
    grads = Gradients(ar)
    grads.product_sum("g", 0, X, X + 1)
    assert grads.reduce()["g"] == pytest.approx((X * (X + 1)).sum(0), rel=1e-14)


@pytest.mark.parametrize("ar", [EXACT, FLOAT64])
def test_rows_go_to_their_ids(ar) -> None:
    grads = Gradients(ar)
    grads.rows("e", 0, np.array([2, 0, 2]), np.array([[1.0], [2.0], [4.0]]), 4)
    assert grads.reduce()["e"].tolist() == [[2], [0], [5], [0]]


class TestRoundedOnce:
    """Microbatches of one parameter are one contraction: the sum of rounded parts would differ."""

    def test_the_parts_of_a_weight(self) -> None:
        grads = Gradients(EXACT)
        for number, rows in enumerate(PARTS):
            grads.weight("w", number, *operands(rows))
        expected = correctly_rounded(DY, X)
        assert bits(grads.reduce()["w"]) == bits(expected)
        added = sum(correctly_rounded(DY[rows], X[rows]) for rows in PARTS)
        assert bits(added) != bits(expected)

    def test_any_order_and_any_split(self) -> None:
        expected = correctly_rounded(DY, X)
        for cuts in (
            [[0, 1, 2, 3, 4, 5, 6, 7]],
            [[7, 3], [0, 1], [2, 6, 5, 4]],
            [[i] for i in (5, 1, 0, 7, 2, 4, 3, 6)],
        ):
            for deferred in (True, False):
                grads = Gradients(EXACT, deferred)
                for number, rows in enumerate(cuts):
                    grads.weight("w", -number, *operands(rows))
                assert bits(grads.reduce()["w"]) == bits(expected)

    def test_what_cancels_between_microbatches_is_not_lost(self) -> None:
        grads = Gradients(EXACT)
        for number, value in enumerate((2.0**60, 1.0, -(2.0**60))):
            grads.product_sum("g", number, np.array([[value]]), np.array([[1.0]]))
            grads.rows("e", number, np.array([0]), np.array([[value]]), 1)
        assert {name: g.item() for name, g in grads.reduce().items()} == {"g": 1.0, "e": 1.0}


class TestDeferred:
    def filled(self, ar=FLOAT64, deferred=True):
        grads = Gradients(ar, deferred)
        for name in "abc":
            grads.weight(name, 0, *operands())
        return grads

    def test_run_does_the_oldest_and_says_how_many(self) -> None:
        grads = self.filled()
        last = grads.waiting[2]
        assert grads.run(2) == 2
        assert grads.waiting == (last,)  # first in, first out
        assert grads.run(5) == 1
        assert grads.waiting == ()
        assert grads.run() == 0

    def test_run_of_nothing_does_nothing(self) -> None:
        grads = self.filled()
        assert grads.run(0) == 0
        assert grads.run() == 3

    def test_not_deferred_nothing_waits(self) -> None:
        assert self.filled(deferred=False).run() == 0

    def test_reading_runs_what_waits(self) -> None:
        assert list(self.filled().reduce()) == ["a", "b", "c"]

    def test_gains_do_not_wait(self) -> None:
        grads = Gradients(FLOAT64, deferred=True)
        grads.product_sum("g", 0, X, X)
        assert grads.run() == 0
        assert list(grads.reduce()) == ["g"]

    def test_later_gives_the_bits_of_now(self) -> None:
        for ar in (EXACT, FLOAT64):
            same_bits(self.filled(ar).reduce(), self.filled(ar, deferred=False).reduce())

    def test_what_waits_keeps_its_place_among_the_contributions(self) -> None:
        grads = Gradients(FLOAT64, deferred=True)
        one, large = np.ones((1, 1)), np.full((1, 1), 2.0**60)
        for waits, does_not in ((one, large), (-large, one)):
            grads.weight("e", 0, Operand(waits), Operand(one))
            grads.rows("e", 0, np.array([0]), does_not, 1)
        assert grads.reduce()["e"].item() == 1.0  # ((1 + 2^60) - 2^60) + 1; put last it would give 0

    def test_exact_microbatches_are_contracted_once_when_read(self) -> None:
        ar = Counting()
        grads = Gradients(ar)
        for number, rows in enumerate(PARTS):
            grads.weight("w", number, *operands(rows))
        assert ar.done == 0
        grads.reduce()
        assert ar.done == 1


class TestOrder:
    def test_float64_adds_in_the_order_of_microbatches(self) -> None:
        values = {0: 1.0, 1: 2.0**60, 2: -(2.0**60)}
        for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
            grads = Gradients(FLOAT64)
            for number in order:
                grads.product_sum("g", number, np.array([[values[number]]]), np.ones((1, 1)))
            assert grads.reduce()["g"].item() == 0.0  # (1 + 2^60) - 2^60, whatever came first

    def test_exact_does_not_care(self) -> None:
        ids, dy = np.array([1, 0, 1, 1]), RNG.standard_normal((4, 2))
        results = []
        for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
            grads = Gradients(EXACT)
            for i in order:
                grads.rows("e", i % 2, ids[i : i + 1], dy[i : i + 1], 3)
            results.append(bits(grads.reduce()["e"]))
        assert results[0] == results[1]


class TestBranches:
    def test_a_merged_branch_counts_like_its_owner_s_own(self) -> None:
        for deferred in (True, False):
            whole, owner = Gradients(EXACT, deferred), Gradients(EXACT, deferred)
            for number, rows in enumerate(PARTS):
                whole.weight("w", number, *operands(rows))
                branch = owner.branch()
                branch.weight("w", number, *operands(rows))
                branch.product_sum("g", number, X[rows], X[rows])
                whole.product_sum("g", number, X[rows], X[rows])
                owner.merge(branch)
            same_bits(owner.reduce(), whole.reduce())

    def test_a_branch_is_of_the_same_kind(self) -> None:
        branch = Gradients(FLOAT64, True, {"a": "b"}).branch()
        branch.weight("a", 0, *operands())
        assert branch.run() == 1
        assert list(branch.reduce()) == ["b"]

    def test_what_waits_in_a_branch_waits_in_its_owner(self) -> None:
        owner = Gradients(FLOAT64, deferred=True)
        owner.weight("first", 0, *operands())
        branch = owner.branch()
        branch.weight("second", 0, *operands())
        second = branch.waiting
        owner.merge(branch)
        assert owner.run(1) == 1
        assert owner.waiting == second
        assert owner.run() == 1


class TestReduced:
    def test_what_is_reduced_already_is_added_in_its_place(self) -> None:
        grads = Gradients(FLOAT64, aliases={"a": "b"})
        grads.add("b", 2, np.array([1.0]))
        grads.add("a", 1, np.array([-(2.0**60)]))
        grads.add("a", 0, np.array([2.0**60]))
        assert {name: g.tolist() for name, g in grads.reduce().items()} == {"b": [1.0]}

    def test_an_order_free_arithmetic_takes_none(self) -> None:
        with pytest.raises(AssertionError):
            Gradients(EXACT).add("w", 0, np.ones(1))


SHARED = {"head": "embedding"}


class TestAliases:
    def fill(self, grads):
        grads.rows("embedding", 0, np.array([0, 2]), np.array([[2.0**60], [3.0]]), 3)
        grads.weight("head", 0, Operand(np.array([[1.0, 0.0, 2.0]])), Operand(np.array([[-(2.0**60)]])))
        grads.weight("head", 1, Operand(np.array([[1.0, 5.0, 0.0]])), Operand(np.array([[2.0**-30]])))
        return grads.reduce()

    @pytest.mark.parametrize("deferred", [True, False])
    def test_both_uses_of_a_shared_parameter_add_up_under_one_name_rounded_once(self, deferred: bool) -> None:
        found = self.fill(Gradients(EXACT, deferred, SHARED))
        assert list(found) == ["embedding"]
        assert found["embedding"].tolist() == [[2.0**-30], [5 * 2.0**-30], [3.0 - 2.0**61]]

    def test_float64_adds_them_too(self) -> None:
        found = self.fill(Gradients(FLOAT64, aliases=SHARED))
        assert found["embedding"][1:].tolist() == [[5 * 2.0**-30], [3.0 - 2.0**61]]


def test_draining_hands_out_every_name_once_and_releases_it() -> None:
    grads = Gradients(EXACT)
    grads.weight("w", 0, *operands())
    grads.product_sum("g", 0, X, X)
    stream = grads.drain()
    assert next(stream)[0] == "w"
    assert "w" not in grads._parts
    assert [name for name, _ in stream] == ["g"]
    assert grads.reduce() == {}
