"""Attention on cached keys, whole and in parts of the keys."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import COMPLEX, EXACT, FLOAT64, bits, context, one_sentence

from refimpl.decoding.attend import attend, merged, partial, split
from refimpl.errors import Invalid
from refimpl.numerics.floating import Floating

U = 2.0**-53
HEADS, WIDTH, VALUE = 2, 6, 3


def draw(queries: int, keys: int, seed: int, spread: float = 1.0):
    """query, key, value, and who sees what: the last query sees all, every query a key."""
    rng = np.random.default_rng(seed)
    query = spread * rng.standard_normal((HEADS, queries, WIDTH))
    key, value = rng.standard_normal((HEADS, keys, WIDTH)), rng.standard_normal((HEADS, keys, VALUE))
    seen = np.arange(keys) <= np.linspace(rng.integers(keys), keys - 1, queries).astype(int)[:, None]
    return query, key, value, seen


def whole(c, given, parts=None):
    query, key, value, seen = given
    return attend(c, *map(c.ar.array, (query, key, value)), 0.3, seen, parts)


def bound(given) -> np.ndarray:
    """How far whole and split may be apart, (H, N, 1).

    With d the spread of a query's scores, n their number and l the largest |lse|, in units of U and to first
    order: exp(s - m) has the relative error d + 1, a softmax 2 (d + 1) + 2, an output one more, relative to
    the largest |value|: 2 d + 5, for the whole and for a part.  lse of a part has the absolute error
    (d + 2) + log n + l; its distance from the largest is at most d + log n and is rounded, so that the
    weights of the parts have 2 ((d + 2 + log n + l) + (d + log n) + 1) + 2, and the merged output one more.
    """
    query, key, value, seen = given
    scores = np.where(seen, 0.3 * np.einsum("hnw,hsw->hns", query, key), np.nan)
    d = np.nanmax(scores, -1) - np.nanmin(scores, -1)
    n = np.log(seen.sum(-1))
    largest = np.nanmax(np.abs(scores), -1) + n
    units = 2 * (2 * d + 5) + 2 * ((d + 2 + n + largest) + (d + n) + 1) + 3
    return (1 + 1e-9) * U * units[..., None] * np.abs(value).max((1, 2))[:, None, None]


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.sampled_from([0.1, 1.0, 30.0]), st.lists(st.integers(0, 17), max_size=6))
def test_any_parts_give_the_whole_within_the_bound(seed: int, spread: float, cuts: list[int]) -> None:
    """Cuts may coincide: then a part has no key at all."""
    given, c = draw(3, 17, seed, spread), context(ar=EXACT)
    parts = [slice(start, stop) for start, stop in pairwise([0, *sorted(cuts), 17])]
    want, found = whole(c, given), whole(c, given, parts)
    assert (np.abs(found - want) <= bound(given)).all()
    if len([part for part in parts if part.start < part.stop]) == 1:
        assert bits(found) == bits(want)


@pytest.mark.parametrize("ar", [EXACT, FLOAT64, Floating(np.float32)], ids=lambda ar: ar.name)
def test_what_is_not_split_is_the_whole_bit_for_bit(ar) -> None:
    c, given = context(ar=ar), draw(3, 17, 1)
    query, key, value, seen = given
    out, lse = partial(c, *map(ar.array, (query, key, value)), 0.3, seen)
    assert bits(out) == bits(merged(c, out[..., None], lse[..., None])) == bits(whole(c, given))
    assert bits(whole(c, given, [slice(0, 17)])) == bits(whole(c, given))


def test_a_part_without_keys_has_no_weight() -> None:
    c, (query, key, value, seen) = context(ar=EXACT), draw(3, 17, 2)
    none = np.zeros_like(seen)
    out, lse = partial(c, query, key, value, 0.3, none)
    assert not out.any()
    assert (lse == -np.inf).all()
    empty = partial(c, query, key[:, :0], value[:, :0], 0.3, none[:, :0])
    assert [bits(x) for x in empty] == [bits(out), bits(lse)]
    first, last = (partial(c, query, key, value, 0.3, seen & rows) for rows in (SMALL, ~SMALL))
    two = [np.stack(arrays, -1) for arrays in zip(first, last, strict=True)]
    more = [np.stack(arrays, -1) for arrays in zip(empty, first, (out, lse), last, strict=True)]
    assert bits(merged(c, *more)) == bits(merged(c, *two))


SMALL = np.arange(17) < 4


def test_queries_of_one_call_may_differ_in_whether_they_see_a_part() -> None:
    c, (query, key, value, seen) = context(ar=EXACT), draw(3, 17, 3)
    seen[0], seen[1, :3] = np.arange(17) < 5, False
    out, lse = partial(c, query, key[:, 6:], value[:, 6:], 0.3, seen[:, 6:])
    assert (lse[:, 0] == -np.inf).all()
    assert not out[:, 0].any()
    alone = partial(c, query[:, 1:], key[:, 6:], value[:, 6:], 0.3, seen[1:, 6:])
    assert [bits(out[:, 1:]), bits(lse[:, 1:])] == [bits(x) for x in alone]


def test_lse_is_the_logarithm_of_the_sum_of_exponentials() -> None:
    c, (query, key, value, seen) = context(ar=EXACT), draw(3, 17, 4)
    _, lse = partial(c, query, key, value, 0.3, seen)
    scores = np.where(seen, 0.3 * np.einsum("hnw,hsw->hns", query, key), -np.inf)
    assert lse == pytest.approx(np.log(np.exp(scores).sum(-1)), rel=1e-14)


def test_scores_beyond_the_range_of_exp_are_merged() -> None:
    c = context(ar=EXACT)
    query, value = np.ones((1, 1, 1)), np.array([[[1.0], [2.0], [3.0], [4.0]]])
    key, seen = np.array([[[5000.0], [5000.0], [-5000.0], [4000.0]]]), np.ones((1, 4), bool)
    for size in (1, 2, 3):
        assert attend(c, query, key, value, 1.0, seen, split(4, size)).item() == 1.5


def test_a_later_key_changes_no_bit_of_an_earlier_query() -> None:
    """Parts are counted from the first key: more keys are more parts, which an earlier query does not see."""
    c, (query, key, value, _) = context(ar=EXACT), draw(2, 17, 5)
    seen = np.arange(17) <= np.array([6, 16])[:, None]
    both = attend(c, query, key, value, 0.3, seen, split(17, 4))
    first = attend(c, query[:, :1], key[:, :7], value[:, :7], 0.3, seen[:1, :7], split(7, 4))
    assert bits(both[:, :1]) == bits(first)


def test_parts_have_the_derivative_of_the_whole() -> None:
    query, key, value, seen = draw(3, 17, 6)
    step = 1e-30 * np.random.default_rng(7).standard_normal(key.shape)
    moved = (query, key + 1j * step, value, seen)
    c = context(ar=COMPLEX)
    want, found = (whole(c, moved, parts) for parts in (None, split(17, 5)))
    assert found == pytest.approx(want, rel=1e-13)
    assert found.imag == pytest.approx(want.imag, rel=1e-12)


def test_the_keys_of_parts_are_all_keys_once() -> None:
    assert split(9, None) is None
    assert split(0, 4) == []
    for length, size in ((1, 1), (9, 4), (8, 4), (3, 100)):
        parts = split(length, size)
        assert parts is not None
        assert [j for part in parts for j in range(length)[part]] == list(range(length))
    with pytest.raises(Invalid) as caught:
        split(9, 0)
    one_sentence(caught, "is 0", "at least 1")
