"""float32 with a stated order of sums, against a plain twin that adds one number at a time."""

import numpy as np
import pytest

from refimpl.numerics.emulated import ORDERS, Emulated, Fine, cut_to_tf32, to_bf16, to_tf32
from refimpl.numerics.formats import BF16, TF32, round_to

F = np.float32


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(F)


def plain(a: list, b: list, order: str) -> np.float32:
    """The sum of a[k] b[k] by the words of the order."""
    n = len(a)
    one = lambda ks: _chain([F(a[k] * b[k]) for k in ks])  # noqa: E731
    match order:
        case "one by one":
            return one(range(n))
        case "reversed":
            return one(range(n - 1, -1, -1))
        case "split-K 2":
            return _chain([one(range(n // 2)), one(range(n // 2, n))])
        case "split-K 8":
            return _chain([one(range(n * i // 8, n * (i + 1) // 8)) for i in range(8)])
        case "chunks":
            return _chain([one(range(i, min(i + 128, n))) for i in range(0, n, 128)])
        case "tree":
            return _tree([F(a[k] * b[k]) for k in range(n)])
        case "lanes":
            return _tree([one(range(i, n, 16)) for i in range(16)])
        case _:
            raise AssertionError(order)


def _chain(terms: list) -> np.float32:
    total = terms[0]
    for term in terms[1:]:
        total = F(total + term)
    return total


def _tree(terms: list) -> np.float32:
    while len(terms) > 1:
        pairs = [F(terms[i] + terms[i + 1]) for i in range(0, len(terms) - 1, 2)]
        terms = pairs + terms[len(terms) // 2 * 2 :]
    return terms[0]


@pytest.mark.parametrize(
    "order", ["one by one", "reversed", "split-K 2", "split-K 8", "chunks", "tree", "lanes"]
)
def test_a_product_is_added_in_its_order(order: str) -> None:
    a, b = numbers(3, 256), numbers(2, 256, seed=1)
    expected = [[plain(list(x), list(y), order) for y in b] for x in a]
    assert np.array_equal(Emulated(order).matmul(a, b), np.array(expected, F))


def test_orders_differ() -> None:
    a, b = numbers(8, 300), numbers(8, 300, seed=1)
    found = {order: Emulated(order).matmul(a, b).tobytes() for order in ORDERS}
    assert len(set(found.values())) == len(ORDERS)


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_is_close_to_the_exact_sum(order: str) -> None:
    a, b = numbers(2, 4, 5, 40), numbers(2, 4, 3, 40, seed=1)
    exact = np.einsum("...ik,...jk->...ij", a.astype(float), b.astype(float))
    bound = 2.0**-23 * 40 * np.einsum("...ik,...jk->...ij", abs(a.astype(float)), abs(b.astype(float)))
    found = Emulated(order).matmul(a, b)
    assert found.dtype == F
    assert (abs(found - exact) <= bound).all()


@pytest.mark.parametrize("order", [name for name, own in ORDERS.items() if not isinstance(own, Fine)])
@pytest.mark.parametrize("terms", [1, 2, 7])
def test_few_terms_are_added_too(order: str, terms: int) -> None:
    x = np.arange(1, terms + 1, dtype=F)
    assert Emulated(order).sum(x) == x.sum()
    assert Emulated(order).matmul(x[None], np.ones((1, terms), F)) == x.sum()


def test_blocks_of_rows_do_not_change_a_bit() -> None:
    a, b = numbers(700, 5), numbers(300, 5, seed=1)
    whole = Emulated().matmul(a, b)
    assert np.array_equal(whole[433], Emulated().matmul(a[433:434], b)[0])


def test_storing_and_reading_round_as_the_formats_do() -> None:
    x = np.concatenate([numbers(4000), [0.0, -0.0, np.inf, -np.inf]]).astype(F)
    assert np.array_equal(to_bf16(x), round_to(x, BF16))
    assert np.array_equal(to_tf32(x), round_to(x, TF32))
    assert np.array_equal(cut_to_tf32(x), round_to(x, TF32, "zero"))
