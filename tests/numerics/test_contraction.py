"""Contractions are correctly rounded, whatever the data, the shapes and the blocking."""

from __future__ import annotations

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import twin
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from refimpl.errors import Invalid
from refimpl.numerics import contraction, slicing, summation
from refimpl.numerics.contraction import Prepared, contract, dot, mean, prepare, segment_sum, sum_

RANDOM = np.random.Generator(np.random.PCG64(20241227))
any_float64 = st.integers(0, 2**64 - 1).map(lambda word: np.array([word], np.uint64).view(np.float64)[0])


def normal(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape)


def ranged(*shape: int, decades: int) -> np.ndarray:
    return normal(*shape) * 10.0 ** RANDOM.integers(-decades, decades + 1, shape)


def bits(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 2**64, shape, dtype=np.uint64).view(np.float64)


def narrowed(dtype: type, *shape: int) -> np.ndarray:
    return normal(*shape).astype(dtype).astype(np.float64)


def cancelling(m: int, n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs whose sums cancel to about 2^-60 of their terms, or to nothing at all."""
    a, b = normal(m, k), normal(n, k)
    rest = ranged(n, 1, decades=20)
    rest[::2] = 0.0
    return np.concatenate([a, a, np.ones((m, 1))], axis=1), np.concatenate([b, -b, rest], axis=1)


def ties(m: int, n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums that lie exactly between two float64, or a hair beside."""
    a, b = np.zeros((m, k)), np.zeros((n, k))
    a[:, 0] = 1.0 + RANDOM.integers(0, 8, m) * 2.0**-52
    b[:, 0] = 1.0
    a[:, 1], b[:, 1] = 2.0**-30, 2.0**-23
    a[:, 2], b[:, 2] = 2.0**-100, RANDOM.integers(-1, 2, n) * 2.0**-100
    return a, b


DATA = {
    "normal": (normal(4, 65), normal(5, 65)),
    "a batch": (normal(2, 3, 4, 16), normal(2, 3, 5, 16)),
    "a range of 10^40 in a row": (ranged(4, 33, decades=20), ranged(5, 33, decades=20)),
    "a range of 10^600 in a row": (ranged(4, 33, decades=300), ranged(5, 33, decades=300)),
    "one operand of a vast range": (ranged(4, 33, decades=300), normal(5, 33)),
    "any bits": (bits(6, 20), bits(5, 20)),
    "few values of any bits": (bits(20, 2), bits(20, 2)),
    "overflow": (normal(4, 20) * 1e300, normal(5, 20) * 1e8),
    "products overflow, sums do not": (np.array([[1e300, -1e300, 3.0]]), np.array([[1e300, 1e300, 7.0]])),
    "the largest float64 and half an ulp": (
        np.array([[np.finfo(float).max, 2.0**969], [np.finfo(float).max, 2.0**970]]),
        np.array([[1.0, 1.0]]),
    ),
    "subnormal results": (normal(4, 20) * 1e-160, normal(5, 20) * 1e-160),
    "a subnormal tie": (np.array([[3.0, 2.0**-40]]), np.array([[2.0**-1074, 2.0**-1074]]) / [[1, 1]] * 0.5),
    "results below everything": (normal(4, 20) * 1e-300, normal(5, 20) * 1e-160),
    "subnormal operands": (normal(4, 20) * 1e-310, normal(5, 20) * 1e300),
    "cancellation": cancelling(5, 6, 30),
    "ties": ties(6, 7, 5),
    "float32": (narrowed(np.float32, 4, 200), narrowed(np.float32, 5, 200)),
    "long rows of float32": (narrowed(np.float32, 3, 5000), narrowed(np.float32, 3, 5000)),
    "long rows of bfloat16": (narrowed(ml_dtypes.bfloat16, 3, 5000), narrowed(ml_dtypes.bfloat16, 3, 5000)),
    "outliers": (normal(4, 300) * np.where(np.arange(300) % 97, 1, 2.0**30), normal(5, 300)),
    "a wide format with a narrow partner": (narrowed(np.float32, 6, 12), RANDOM.integers(-8, 8, (20, 12))),
    "bfloat16": (narrowed(ml_dtypes.bfloat16, 4, 700), narrowed(ml_dtypes.bfloat16, 5, 700)),
    "E4M3": (narrowed(ml_dtypes.float8_e4m3fn, 4, 200), narrowed(ml_dtypes.float8_e4m3fn, 5, 200)),
    "bfloat16 with E4M3": (narrowed(ml_dtypes.bfloat16, 4, 200), narrowed(ml_dtypes.float8_e4m3fn, 5, 200)),
    "bfloat16 with float64": (narrowed(ml_dtypes.bfloat16, 4, 200), normal(5, 200)),
    "sparse low bits": (np.where(RANDOM.random((4, 400)) < 0.01, 2.0**-60, 1.0), normal(5, 400)),
    "zero rows": (normal(4, 9) * [[1], [0], [1], [0]], normal(5, 9) * [[0], [1], [1], [0], [0]]),
    "negative zeros": (np.zeros((2, 3)), -np.ones((2, 3))),
    "one column": (normal(4, 1), normal(5, 1)),
    "small integers": (np.arange(12).reshape(3, 4), np.arange(8, dtype=np.float32).reshape(2, 4)),
}


@pytest.mark.parametrize("name", DATA)
def test_contract_is_the_nearest_float64(name):
    a, b = DATA[name]
    assert twin.same_bits(contract(a, b), twin.contract(a, b))


@pytest.mark.parametrize("name", DATA)
def test_dot_is_the_nearest_float64(name):
    a, b = DATA[name]
    rows = min(a.shape[-2], b.shape[-2])
    got = dot(a[..., :rows, :], b[..., :rows, :])
    want = [
        twin.dot(x, y)
        for x, y in zip(*(v[..., :rows, :].reshape(-1, v.shape[-1]) for v in (a, b)), strict=True)
    ]
    assert twin.same_bits(got.ravel(), want)


@pytest.mark.parametrize("name", DATA)
def test_sums_and_means_are_the_nearest_float64(name):
    for x in DATA[name]:
        rows = x.reshape(-1, x.shape[-1])
        assert twin.same_bits(sum_(rows), [twin.total(row) for row in rows])
        assert twin.same_bits(mean(rows), [twin.total(row, len(row)) for row in rows])


def test_contract_by_hand():
    assert contract([[1.0, 2.0, 3.0]], [[1.0, 0.0, -1.0], [2.0, 2.0, 2.0]]).tolist() == [[-2.0, 12.0]]


def test_contract_keeps_what_cancellation_leaves():
    assert contract([[1e20, 1.0, -1e20]], [[1.0, 1.0, 1.0]]).tolist() == [[1.0]]


def test_a_plain_product_of_matrices_is_not_the_nearest_float64():
    # what the other tests ask for is not what BLAS gives
    for name in ("normal", "cancellation", "float32"):
        a, b = DATA[name]
        assert not twin.same_bits(a @ b.T, twin.contract(a, b))


def test_without_the_error_bound_ties_come_out_wrong(monkeypatch):
    a, b = DATA["ties"]
    assert twin.same_bits(contract(a, b), twin.contract(a, b))
    monkeypatch.setattr(contraction, "_error", lambda fa, fb: np.zeros((len(fa.x), len(fb.x))))
    assert not twin.same_bits(contract(a, b), twin.contract(a, b))


def test_the_error_bound_holds_with_room_to_spare():
    a, b = normal(3, 3000), normal(3, 3000)
    fa, fb = slicing.frame(a), slicing.frame(b)
    sa, sb = slicing.cut(fa, slicing.Room()), slicing.cut(fb, slicing.Room())
    low, bound = contraction._low(fa, sa, fb, sb), contraction._error(fa, fb)
    for m, n in np.ndindex(3, 3):
        parts = [(sa.middle[m], b[n] - sb.head[n]), (sa.head[m], sb.tail[n]), (sa.tail[m], b[n])]
        exact = sum(
            (Fraction(x) * Fraction(y) for p, q in parts for x, y in zip(p, q, strict=True)), Fraction(0)
        )
        assert abs(Fraction(low[m, n]) - exact) <= Fraction(bound[m, n]) / 2


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 16, 17, 48, 1000, 5000])
def test_slices_are_exact_and_as_short_as_the_proof_needs(length):
    x = ranged(5, length, decades=4)
    f = slicing.frame(x)
    s = slicing.cut(f, slicing.Room())
    coarse = np.ldexp(1.0, f.exponent - 26)[:, None]
    spread = 2.0 ** slicing.spread_bits(length)
    assert spread >= math.sqrt(length) / 2 > spread / 2 - 1e-9
    assert (s.head % coarse == 0).all()
    total = s.head.copy()
    columns = slice(None) if s.columns is None else s.columns
    if s.middle is not None:
        total[:, columns] += s.middle
        assert (s.middle % (coarse * spread * 2.0**-25) == 0).all()
        assert (np.abs(s.middle) <= coarse / 2).all()
    if s.tail is not None:
        total[:, slice(None) if s.tail_columns is None else s.tail_columns] += s.tail
        assert (np.abs(s.tail) <= coarse * spread * 2.0**-26).all()
    assert twin.same_bits(total, x)
    assert (np.linalg.norm(s.head / coarse, axis=1) <= 2.0**26 + math.sqrt(length)).all()


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_contract_of_any_float64(data):
    m, n, k = (data.draw(st.integers(1, 4)) for _ in range(3))
    elements = st.one_of(
        any_float64, st.sampled_from([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 2.0**-1074])
    )
    a, b = (data.draw(hnp.arrays(np.float64, (r, k), elements=elements)) for r in (m, n))
    assert twin.same_bits(contract(a, b), twin.contract(a, b))
    assert twin.same_bits(sum_(a), [twin.total(row) for row in a])
    assert twin.same_bits(mean(a), [twin.total(row, k) for row in a])


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_contract_of_neighbouring_powers_of_two(data):
    # many ties, cancellations and sums just beside a midpoint
    k = data.draw(st.integers(1, 6))
    powers = st.builds(lambda sign, e: sign * 2.0**e, st.sampled_from([-1, 1]), st.integers(-60, 60))
    a, b = (data.draw(hnp.arrays(np.float64, (2, k), elements=powers)) for _ in range(2))
    assert twin.same_bits(contract(a, b), twin.contract(a, b))


def test_special_values_touch_only_their_rows_and_columns():
    a, b = normal(4, 9), normal(5, 9)
    a[1, 2], a[1, 3], a[2, 4], b[3, 2], b[4, 4] = np.inf, -np.inf, np.nan, 0.0, np.inf
    got, plain = contract(a, b), contract(np.where(np.isfinite(a), a, 0), np.where(np.isfinite(b), b, 0))
    assert twin.same_bits(got, twin.contract(a, b))
    keep = np.ix_([0, 3], [0, 1, 2, 3])
    assert twin.same_bits(got[keep], plain[keep])


@pytest.mark.parametrize(
    ("a", "b"), [((3, 0), (2, 0)), ((0, 3), (2, 3)), ((0, 2, 3), (0, 4, 3)), ((2, 2, 0), (2, 1, 0))]
)
def test_empty_shapes_give_zeros(a, b):
    got = contract(np.ones(a), np.ones(b))
    assert got.shape == (*a[:-1], b[-2])
    assert twin.same_bits(got, np.zeros(got.shape))


def test_the_order_of_the_inner_axis_does_not_matter():
    a, b = ranged(6, 300, decades=10), ranged(7, 300, decades=10)
    order = RANDOM.permutation(300)
    assert twin.same_bits(contract(a, b), contract(a[:, order], b[:, order]))
    assert not twin.same_bits(a @ b.T, a[:, order] @ b[:, order].T)


BLOCKED = ["normal", "a batch", "any bits", "bfloat16", "cancellation", "long rows of float32", "zero rows"]


@pytest.mark.parametrize("block", [1, 40, 300, 12000])
@pytest.mark.parametrize("name", BLOCKED)
def test_blocking_does_not_matter(monkeypatch, name, block):
    a, b = DATA[name]
    want = contract(a, b)
    monkeypatch.setattr(contraction, "SMALL", 0)
    assert twin.same_bits(contract(a, b), want)
    monkeypatch.setattr(contraction, "BLOCK", block)
    monkeypatch.setattr(slicing, "CHUNK", block)
    monkeypatch.setattr(summation, "CHUNK", block)
    assert twin.same_bits(contract(a, b), want)
    assert twin.same_bits(contract(prepare(a), prepare(b)), want)


@pytest.mark.parametrize("name", BLOCKED)
def test_pieces_of_the_inner_axis_do_not_matter(monkeypatch, name):
    a, b = DATA[name]
    want = contract(a, b)
    monkeypatch.setattr(contraction, "LONG", a.shape[-1] // 5 + 1)
    assert twin.same_bits(contract(a, b), want)


def test_rows_longer_than_a_piece():
    a, b = normal(2, 17000), normal(2, 17000)
    assert a.shape[1] > contraction.LONG
    assert twin.same_bits(contract(a, b), twin.contract(a, b))


@pytest.mark.parametrize("name", ["normal", "a batch", "any bits", "bfloat16", "overflow", "sparse low bits"])
def test_a_row_does_not_depend_on_other_rows(name):
    a, b = DATA[name]
    whole, some = contract(a, b), [2, 0, 2]
    assert twin.same_bits(contract(a[..., some, :], b), whole[..., some, :])
    assert twin.same_bits(contract(a, b[..., some, :]), whole[..., some])


@pytest.mark.parametrize("name", ["normal", "a batch", "any bits", "bfloat16", "overflow", "sparse low bits"])
def test_rows_of_a_prepared_operand(name):
    a, b = DATA[name]
    whole, some = contract(a, b), np.array([2, 0, 2])
    pa, pb = prepare(a), prepare(b)
    assert twin.same_bits(contract(pa.rows(some), pb), whole[..., some, :])  # not yet cut
    assert twin.same_bits(contract(pa, pb), whole)
    assert twin.same_bits(contract(pa.rows(some), pb.rows(slice(1, 3))), whole[..., some, 1:3])  # cut before
    assert pa.rows(some).shape == a[..., some, :].shape
    assert isinstance(pa, Prepared)
    assert prepare(pa) is pa


def test_few_bits_are_one_product():
    # the speed of narrow formats rests on this
    for dtype in (ml_dtypes.float8_e4m3fn, np.int8):
        assert prepare((normal(8, 3000) * 4).astype(dtype).astype(np.float64)).slices.middle is None


def test_operands_are_converted_exactly():
    a = np.array([[2**24 + 1, 3]], np.int64)
    assert contract(a, a).tolist() == [[(2**24 + 1) ** 2 + 9]]
    with pytest.raises(Invalid, match="cannot represent"):
        contract(np.array([[2**53 + 1]]), np.array([[1]]))
    with pytest.raises(Invalid, match="real numbers"):
        contract(np.array([[1j]]), np.array([[1]]))


def test_shapes_that_do_not_fit_are_rejected():
    with pytest.raises(Invalid, match="do not contract"):
        contract(np.ones((2, 3)), np.ones((2, 4)))
    with pytest.raises(Invalid, match="rows and columns"):
        contract(np.ones(3), np.ones((2, 3)))
    with pytest.raises(Invalid, match="at least one"):
        mean(np.ones((2, 0)))
    with pytest.raises(Invalid, match="integer ids"):
        segment_sum(np.ones((2, 3)), [0, 5], 2)


def test_dot_broadcasts():
    a, b = normal(3, 1, 8), normal(4, 8)
    want = [[twin.dot(a[i, 0], b[j]) for j in range(4)] for i in range(3)]
    assert twin.same_bits(dot(a, b), want)
    assert twin.same_bits(dot(a[0, 0], b[0]), want[0][0])


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_sums_along_any_axis_agree_with_fsum(axis):
    x = ranged(3, 4, 50, decades=10)
    rows = np.moveaxis(x, axis, -1)
    want = np.array([math.fsum(row) for row in rows.reshape(-1, rows.shape[-1])]).reshape(rows.shape[:-1])
    assert twin.same_bits(sum_(x, axis), want)


def test_empty_sums_are_zero():
    assert twin.same_bits(sum_(np.ones((2, 0))), np.zeros(2))
    assert twin.same_bits(dot(np.ones((2, 0)), np.ones((2, 0))), np.zeros(2))
    assert twin.same_bits(segment_sum(np.ones((0, 2)), np.zeros(0, int), 2), np.zeros((2, 2)))


@pytest.mark.parametrize("rows", [normal(40, 6), ranged(40, 6, decades=30), bits(40, 6)])
def test_segment_sum_sums_the_rows_of_each_id(rows):
    ids = RANDOM.integers(0, 9, 40)
    ids[ids == 4] = 5
    want = [[twin.total(rows[ids == g, d]) for d in range(6)] for g in range(10)]
    assert twin.same_bits(segment_sum(rows, ids, 10), want)
    assert twin.same_bits(segment_sum(rows[::-1], ids[::-1], 10), want)


def test_segment_sum_does_not_depend_on_chunks(monkeypatch):
    rows, ids = ranged(40, 6, decades=30), RANDOM.integers(0, 9, 40)
    want = segment_sum(rows, ids, 9)
    monkeypatch.setattr(summation, "CHUNK", 50)
    assert twin.same_bits(segment_sum(rows, ids, 9), want)
