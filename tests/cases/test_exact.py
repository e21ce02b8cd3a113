"""Comparison of bits: NaN, positions, digests, and outputs that are wrong on purpose."""

import numpy as np
import pytest

from refimpl.cases import exact, format
from refimpl.cases.format import Tensor
from refimpl.checkpoint.dtypes import bf16_codes

ONE = np.array([0x3F800000, 0x40000000, 0x7FFFFFFF, 0x80000000], np.uint32)


def _tensor(codes, dtype="F32", **more):
    return Tensor("y", "required", dtype, codes.shape, format.digest(codes, dtype), **more)


def test_the_same_bits_hold_and_others_are_shown():
    assert exact.compare(_tensor(ONE), ONE, None, ONE).holds
    other = ONE.copy()
    other[1] ^= 1
    found = exact.compare(_tensor(ONE), ONE, None, other)
    assert not found.holds
    assert (found.wrong, found.at) == (1, 1)
    assert "1 of 4 compared elements differ, the first is 0x40000001 instead of 0x40000000" in found.text


def test_the_sign_of_a_zero_counts():
    other = ONE.copy()
    other[3] = 0
    assert not exact.compare(_tensor(ONE), ONE, None, other).holds


@pytest.mark.parametrize("nan", [0x7FC00000, 0xFFC00001, 0x7F800001])
def test_a_nan_of_another_payload_holds_only_where_any_does(nan):
    other = ONE.copy()
    other[2] = nan
    assert not exact.compare(_tensor(ONE), ONE, None, other).holds
    assert exact.compare(_tensor(ONE, any_nan=0x7FFFFFFF), ONE, None, other).holds
    other[2] = 0x7F800000
    assert not exact.compare(_tensor(ONE, any_nan=0x7FFFFFFF), ONE, None, other).holds


def test_the_digest_sees_what_the_kept_elements_do_not():
    other = ONE.copy()
    other[0] = 0
    found = exact.compare(_tensor(ONE), ONE[[1, 3]], np.array([1, 3]), other)
    assert not found.holds
    assert found.at == -1
    assert "the digest differs, though none of 2 kept elements does" in found.text


def test_positions_are_those_of_the_whole_tensor():
    other = ONE.copy()
    other[3] = 5
    assert exact.compare(_tensor(ONE), ONE[[1, 3]], np.array([1, 3]), other).at == 3


def test_wrong_outputs_are_wrong_in_the_way_of_their_name():
    codes = bf16_codes(np.array([[1.0, -2.0], [3.0, 0.5]]))
    wrong = exact.spoiled(codes, _tensor(codes, "BF16"))
    assert set(wrong) == set(exact.WRONG)
    assert not wrong["zeros"].any()
    assert np.array_equal(wrong["negated"], codes ^ np.uint16(0x8000))
    assert np.array_equal(wrong["rows"], codes[::-1])
    assert wrong["scaled"][0, 0] == bf16_codes(np.float64(0.8984375))


def test_integers_and_scales_have_no_sign():
    words = np.array([[1, 2], [3, 4]], np.int32)
    assert set(exact.spoiled(words, _tensor(words, "I32"))) == {"zeros", "rows"}
    scales = np.array([120, 130], np.uint8)
    assert set(exact.spoiled(scales, _tensor(scales, "F8_E8M0"))) == {"zeros", "rows", "scaled"}
