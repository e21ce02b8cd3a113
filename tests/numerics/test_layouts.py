"""Layouts of scales.  SPEC LAYOUT-1 to LAYOUT-4."""

import numpy as np
import pytest

from refimpl.errors import Invalid
from refimpl.numerics.layouts import (
    aligned,
    from_columns,
    from_ue8m0,
    pack,
    to_columns,
    to_ue8m0,
    unpack,
)


def test_rows_are_padded_to_sixteen_bytes():
    assert [aligned(m) for m in (0, 1, 4, 5, 576)] == [0, 4, 4, 8, 576]


def test_columns_by_hand_and_back():
    scales = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
    columns = to_columns(scales)
    assert columns.tolist() == [[1, 3, 5, 0], [2, 4, 6, 0]]
    assert np.array_equal(from_columns(columns, 3), scales)
    # what DeepGEMM sees: (M, G) with strides of 1 and M' elements
    seen = np.lib.stride_tricks.as_strided(columns, scales.shape, (4, 16))
    assert np.array_equal(seen, scales)


def test_words_by_hand_and_back():
    codes = np.array([[1, 2, 3, 4, 5], [0x7F, 0x80, 0x81, 0xFE, 0x10]], np.uint8)
    words = pack(codes)
    assert words.dtype == np.int32
    hand = [[0x04030201, 0xFE81807F, 0, 0], [5, 0x10, 0, 0]]
    assert np.array_equal(words.view(np.uint32), np.array(hand, np.uint32))
    assert np.array_equal(unpack(words, 2, 5), codes)


@pytest.mark.parametrize(("rows", "tiles"), [(1, 1), (4, 4), (5, 56), (576, 7)])
def test_layouts_lose_nothing(rows, tiles):
    codes = np.random.default_rng(rows).integers(0, 255, (rows, tiles)).astype(np.uint8)
    scales = from_ue8m0(codes)
    assert np.array_equal(to_ue8m0(scales), codes)
    assert np.array_equal(unpack(pack(codes), rows, tiles), codes)
    assert np.array_equal(from_columns(to_columns(scales), rows), scales)


def test_codes_are_the_exponent_field_of_float32():
    codes = np.arange(1, 255, dtype=np.uint8)
    assert np.array_equal(from_ue8m0(codes).view(np.uint32), codes.astype(np.uint32) << np.uint32(23))
    assert from_ue8m0(np.array([0], np.uint8)) == 2.0**-127
    assert np.isnan(from_ue8m0(np.array([255], np.uint8)))


def test_what_does_not_fit_is_refused():
    for value in (3.0, 0.0, -1.0, np.inf, np.nan):
        with pytest.raises(Invalid, match=r"scales have .* at \(1,\), but all must be powers of two\.$"):
            to_ue8m0(np.array([1.0, value], np.float32))
    with pytest.raises(Invalid, match=r"\(2, 4\), but for 5 rows it must have 8 columns\.$"):
        from_columns(np.zeros((2, 4), np.float32), 5)
    with pytest.raises(Invalid, match=r"words have shape \(2, 4\), but 9 tiles must have 3 rows\.$"):
        unpack(np.zeros((2, 4), np.int32), 4, 9)
    with pytest.raises(Invalid, match=r"scales are float64 \(2, 4\), but they must be a float32 matrix\.$"):
        to_columns(np.zeros((2, 4)))
