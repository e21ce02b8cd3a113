"""Formats against exact fractions, NumPy's and ml_dtypes' casts, and all codes of at most 16 bits."""

import itertools
import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.errors import Invalid
from refimpl.numerics import formats as table
from refimpl.numerics import generator
from refimpl.numerics.formats import (
    BF16,
    E4M3,
    E4M3FNUZ,
    E5M2,
    E5M2FNUZ,
    E5M6,
    E5M6FN,
    FORMATS,
    FP16,
    FP32,
    TF32,
    UE8M0,
    Stochastic,
    decode,
    encode,
    round_to,
)

ALL = [FP32, TF32, BF16, FP16, E5M2, E4M3, E5M6, E5M6FN, E4M3FNUZ, E5M2FNUZ]  # UE8M0 has tests of its own
EIGHT = [
    (E4M3, ml_dtypes.float8_e4m3fn),
    (E5M2, ml_dtypes.float8_e5m2),
    (E4M3FNUZ, ml_dtypes.float8_e4m3fnuz),
    (E5M2FNUZ, ml_dtypes.float8_e5m2fnuz),
]
SIXTEEN = [(BF16, ml_dtypes.bfloat16), (FP16, np.float16)]
SINGLE = [*SIXTEEN, (FP32, np.float32)]
formats = pytest.mark.parametrize("fmt", ALL, ids=[f.name for f in ALL])
eight = pytest.mark.parametrize(("fmt", "dtype"), EIGHT, ids=[f.name for f, _ in EIGHT])
sixteen = pytest.mark.parametrize(("fmt", "dtype"), SIXTEEN, ids=["bf16", "fp16"])


def twin(x, fmt):
    """Round by the definition, in exact fractions."""
    if math.isnan(x):
        return x
    if math.isinf(x):
        return math.copysign(fmt.overflow, x)
    exponent = max(math.frexp(x)[1] - 1, fmt.smallest_exponent)
    step = Fraction(2) ** (exponent - fmt.fraction_bits)
    y = round(abs(Fraction(x)) / step) * step  # Fraction rounds halves to even
    size = float(y) if y <= Fraction(fmt.largest) else fmt.overflow
    return 0.0 if size == 0 and fmt.kind == "fnuz" else math.copysign(size, x)


def assert_same(made, expected):
    """Equal bits, and NaN where the other has NaN."""
    made, expected = (np.asarray(v, np.float64) for v in (made, expected))
    assert np.array_equal(np.isnan(made), np.isnan(expected))
    numbers = ~np.isnan(expected)
    assert np.array_equal(made[numbers].view(np.int64), expected[numbers].view(np.int64))


def ties_and_neighbours(fmt, codes):
    """The values of codes, the middles to their successors, and the float64 next to each."""
    value, above = decode(codes, fmt), decode(codes + 1, fmt)
    keep = np.isfinite(value)
    value, above = value[keep], np.where(np.isfinite(above), above, 2 * value - decode(codes - 1, fmt))[keep]
    grid = np.concatenate([value, (value + above) / 2])
    grid = np.concatenate([grid, np.nextafter(grid, np.inf), np.nextafter(grid, -np.inf)])
    return np.concatenate([grid, -grid])


@formats
def test_table_is_consistent_with_the_bit_layout(fmt):
    bias = 1 - fmt.smallest_exponent
    assert bias == (1 << fmt.exponent_bits - 1) - (fmt.kind != "fnuz")
    assert decode([fmt.top], fmt) == fmt.largest
    assert np.isnan(decode([fmt.nan], fmt))
    beyond = decode([fmt.top + 1], fmt)[0]
    assert np.isposinf(beyond) if fmt.kind == "ieee" else np.isnan(beyond)
    if fmt.kind == "ieee":
        assert fmt.largest == (2 - 2.0**-fmt.fraction_bits) * 2.0**bias
        assert fmt.nan == ((1 << fmt.exponent_bits + 1) - 1) << fmt.fraction_bits - 1
    assert FORMATS[fmt.name] is fmt


@pytest.mark.parametrize(
    ("fmt", "info"),
    [(FP32, np.finfo(np.float32)), (FP16, np.finfo(np.float16)), (BF16, ml_dtypes.finfo("bfloat16"))]
    + [(fmt, ml_dtypes.finfo(dtype)) for fmt, dtype in EIGHT],
)
def test_limits_are_those_of_numpy_and_ml_dtypes(fmt, info):
    assert fmt.largest == float(info.max)
    assert fmt.smallest_normal == float(info.smallest_normal)
    assert fmt.smallest == float(info.smallest_subnormal)
    assert fmt.roundoff == float(info.eps) / 2
    assert fmt.bits == info.bits


def test_round_by_hand():
    x = [1.0, 1.00390625, 1.01171875, 1.0039062500000002, -1.00390625, 256.5, 257.0, 259.0]
    assert round_to(x, BF16).tolist() == [1.0, 1.0, 1.015625, 1.0078125, -1.0, 256.0, 256.0, 260.0]


@formats
@given(x=st.floats(), scale=st.sampled_from([1.0, 2.0**-126, 2.0**-14, 2.0**-133]))
def test_rounding_is_that_of_exact_fractions(fmt, x, scale):
    assert_same(round_to([x], fmt), [twin(x, fmt)])
    scaled = (math.frexp(x)[0] if math.isfinite(x) else x) * 4 * scale
    assert_same(round_to([scaled], fmt), [twin(scaled, fmt)])


@formats
def test_random_bits_of_every_range_round_as_exact_fractions(fmt):
    rng = np.random.default_rng(0)
    low, high = (int(np.float64(v).view(np.int64)) for v in (fmt.smallest / 4, fmt.largest * 2))
    x = rng.integers(low, high, 4000).view(np.float64) * rng.choice([-1.0, 1.0], 4000)
    assert_same(round_to(x, fmt), [twin(v, fmt) for v in x.tolist()])


@formats
def test_ties_and_their_neighbours_round_as_exact_fractions(fmt):
    top = (1 << fmt.bits - 1) - 1
    at = [1, 2, 3, 1 << fmt.fraction_bits, (1 << fmt.exponent_bits - 1) << fmt.fraction_bits, fmt.nan & top]
    codes = np.unique(np.clip(np.add.outer([*at, fmt.top + 1], np.arange(-20, 20)), 1, fmt.top))
    x = ties_and_neighbours(fmt, codes)
    assert_same(round_to(x, fmt), [twin(v, fmt) for v in x.tolist()])


@sixteen
def test_all_ties_and_their_neighbours_round_as_numpy_from_exact_halves(fmt, dtype):
    """Every middle of two values and its float64 neighbours, against the sorted table of all values."""
    codes = np.arange(1, 1 << 15)
    codes = codes[np.isfinite(decode(codes, fmt))]
    x = ties_and_neighbours(fmt, codes)
    values = np.unique(codes.astype(np.uint16).view(dtype).astype(np.float64))
    values = np.concatenate([[0.0], values, [2 * values[-1] - values[-2]]])
    size = np.abs(x)
    i = np.minimum(np.searchsorted(values, size, "right") - 1, values.size - 2)
    left, right = size - values[i], values[i + 1] - size  # exact: neighbours on one grid
    up = (right < left) | ((right == left) & (i % 2 == 1))
    expected = values[i + up]
    expected = np.copysign(np.where(expected > fmt.largest, np.inf, expected), x)
    assert_same(round_to(x, fmt), expected)


@pytest.mark.parametrize(("fmt", "dtype"), SINGLE, ids=["bf16", "fp16", "fp32"])
def test_float32_input_rounds_as_the_cast_of_numpy_or_ml_dtypes(fmt, dtype):
    rng = np.random.default_rng(1)
    x = rng.integers(0, 1 << 32, 1_000_000, dtype=np.uint32).view(np.float32)
    with np.errstate(all="ignore"):  # there are signalling NaNs among them
        if dtype == np.float32:
            x = x.astype(np.float64) * (1 + rng.integers(-9, 9, x.size) * 2.0**-29)
        expected = x.astype(dtype).astype(np.float64)
    assert_same(round_to(x, fmt), expected)


def test_one_rounding_differs_from_two():
    x = 1 + 2.0**-8 + 2.0**-30  # just above a tie of bf16; float32 drops the excess
    assert np.float64(np.float32(x).astype(ml_dtypes.bfloat16)) == 1.0
    assert round_to(x, BF16) == 1 + 2.0**-7


@sixteen
def test_all_codes_decode_as_numpy_and_ml_dtypes_do_and_round_trip(fmt, dtype):
    codes = np.arange(1 << 16).astype(np.uint16)
    values = decode(codes, fmt)
    assert values.dtype == np.float64
    with np.errstate(invalid="ignore"):
        assert_same(values, codes.view(dtype).astype(np.float64))
    assert_same(round_to(values, fmt), values)
    back = encode(values, fmt)
    assert back.dtype == np.uint16
    assert np.array_equal(back, np.where(np.isnan(values), fmt.nan, codes))


def test_codes_of_float32_are_its_bits():
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 1 << 32, 200_000, dtype=np.uint32)
    with np.errstate(invalid="ignore"):
        values = codes.view(np.float32).astype(np.float64)
    assert_same(decode(codes, FP32), values)
    assert encode(values, FP32).dtype == np.uint32
    assert np.array_equal(encode(values, FP32), np.where(np.isnan(values), FP32.nan, codes))


def test_all_codes_of_tf32_round_trip_and_are_the_upper_bits_of_float32():
    codes = np.arange(1 << 19)
    values = decode(codes, TF32)
    with np.errstate(invalid="ignore"):
        assert_same(values, (codes.astype(np.uint32) << np.uint32(13)).view(np.float32).astype(np.float64))
    assert np.array_equal(encode(values, TF32), np.where(np.isnan(values), TF32.nan, codes))


@sixteen
def test_encoding_rounds_first(fmt, dtype):
    x = np.random.default_rng(3).normal(size=10_000) * 2.0 ** np.arange(-40, 40).repeat(125)
    assert_same(decode(encode(x, fmt), fmt), round_to(x, fmt))


@formats
def test_overflow_starts_half_a_step_above_the_largest_value(fmt):
    step = 2.0 ** (math.frexp(fmt.largest)[1] - 1 - fmt.fraction_bits)
    edge = fmt.largest + step / 2  # exact in float64; a tie, which goes to the even code
    at_edge = fmt.overflow if fmt.top % 2 else fmt.largest
    x = [math.nextafter(edge, 0), edge, -edge, math.nextafter(edge, math.inf)]
    assert_same(round_to(x, fmt), [fmt.largest, at_edge, math.copysign(at_edge, -1), fmt.overflow])


@formats
def test_special_values(fmt):
    least, minus = fmt.smallest, 0.0 if fmt.kind == "fnuz" else -0.0
    x = [0.0, -0.0, np.inf, -np.inf, np.nan, 5e-324, -5e-324, least, least / 2, least * 0.75]
    over = fmt.overflow
    expected = [0.0, minus, over, math.copysign(over, -1), np.nan, 0.0, minus, least, 0.0, least]
    with np.errstate(all="raise"):
        assert_same(round_to(x, fmt), expected)
        assert_same(decode(encode(x, fmt), fmt), expected)
    odd = np.array([0x7FF0000000000001, 0x7FFFFFFFFFFFFFFF, -1], np.int64).view(np.float64)
    assert np.array_equal(round_to(odd, fmt).view(np.int64), np.full(3, np.nan).view(np.int64))
    for alone in odd:  # with no infinity beside it
        assert np.isnan(round_to(alone, fmt))
        assert encode(alone, fmt) == fmt.nan


@formats
def test_shapes_and_types(fmt):
    grid = np.random.default_rng(4).normal(size=(90, 110))
    part = round_to(grid, fmt).T[::3, 1::2]
    assert_same(round_to(grid.T[::3, 1::2], fmt), part)
    assert_same(decode(encode(grid.T[::3, 1::2], fmt), fmt), part)
    for shape, f in itertools.product([(), (0,), (3, 0, 2)], [round_to, encode, decode]):
        assert f(np.zeros(shape, np.uint8), fmt).shape == shape
    assert round_to(1.5, fmt) == 1.5
    assert round_to(np.float32(1.5), fmt).dtype == np.float64


@formats
def test_the_argument_is_left_as_it_was(fmt):
    x = np.array([1 / 3, np.inf, 1e-300])
    round_to(x, fmt)
    assert x.tolist() == [1 / 3, np.inf, 1e-300]


@eight
def test_all_codes_of_8_bits_decode_as_in_ml_dtypes_and_round_trip(fmt, dtype):
    codes = np.arange(256).astype(np.uint8)
    values = decode(codes, fmt)
    assert_same(values, codes.view(dtype).astype(np.float64))
    back = encode(values, fmt)
    assert back.dtype == np.uint8
    assert np.array_equal(back, np.where(np.isnan(values), fmt.nan, codes))


@pytest.mark.parametrize("fmt", [E5M6, E5M6FN], ids=["e5m6", "e5m6fn"])
def test_all_codes_of_12_bits_are_the_upper_bits_of_fp16_and_round_trip(fmt):
    codes = np.arange(1 << 12)
    values = decode(codes, fmt)
    finite = np.isfinite(decode(codes << 4, FP16))
    assert_same(values[finite], decode(codes << 4, FP16)[finite])
    back = encode(values, fmt)
    assert back.dtype == np.uint16
    assert np.array_equal(back, np.where(np.isnan(values), fmt.nan, codes))
    assert np.isfinite(values).sum() == (2 * 31 << 6 if fmt is E5M6 else (1 << 12) - 2)


def test_ue8m0_has_powers_of_two_and_nan():
    values = decode(np.arange(256), UE8M0)
    assert_same(values, [*(2.0 ** np.arange(-127, 128)), np.nan])
    assert np.array_equal(encode(values, UE8M0), np.arange(256))
    x = [
        0.0,
        -0.0,
        1e-300,
        2.0**-127,
        1.5 * 2.0**-127,
        0.75,
        1.0,
        1.5,
        3.0,
        3.1,
        1.6 * 2.0**127,
        np.inf,
        -1.0,
    ]
    assert encode(x, UE8M0).tolist() == [0, 0, 0, 0, 0, 126, 127, 128, 128, 129, 255, 255, 255]
    assert encode(x, UE8M0, "away").tolist() == [0, 0, 0, 0, 1, 127, 127, 128, 129, 129, 255, 255, 255]
    assert encode(x, UE8M0, "zero").tolist() == [0, 0, 0, 0, 0, 126, 127, 127, 128, 128, 254, 255, 255]


def neighbours(x, fmt):
    """The values of the format below and above |x|, in exact fractions, without an end."""
    exponent = max(math.frexp(x)[1] - 1, fmt.smallest_exponent)
    step = Fraction(2) ** (exponent - fmt.fraction_bits)
    below = abs(Fraction(x)) // step * step
    return below, step


@formats
def test_directed_rounding_is_that_of_exact_fractions(fmt):
    rng = np.random.default_rng(4)
    low, high = (int(np.float64(v).view(np.int64)) for v in (fmt.smallest / 4, fmt.largest))
    x = rng.integers(low, high, 2000).view(np.float64) * rng.choice([-1.0, 1.0], 2000)
    x[:200] = round_to(x[:200], fmt)  # values of the format stay
    for rounding in ("zero", "away"):
        expected = []
        for v in x.tolist():
            below, step = neighbours(v, fmt)
            size = float(below + (step if rounding == "away" and below != abs(Fraction(v)) else 0))
            size = size if size <= fmt.largest else fmt.overflow
            expected.append(0.0 if size == 0 and fmt.kind == "fnuz" else math.copysign(size, v))
        assert_same(round_to(x, fmt, rounding), expected)


@formats
def test_toward_zero_never_overflows_and_keeps_infinity(fmt):
    x = [1.5e308, -1.5e308, math.inf, math.nextafter(fmt.largest, math.inf)]
    assert_same(round_to(x, fmt, "zero"), [fmt.largest, -fmt.largest, fmt.overflow, fmt.largest])
    assert_same(round_to(x, fmt, "away"), [fmt.overflow, -fmt.overflow, fmt.overflow, fmt.overflow])


@formats
def test_stochastic_rounding_compares_the_distance_with_the_random_number(fmt):
    rng = np.random.default_rng(5)
    low, high = (int(np.float64(v).view(np.int64)) for v in (fmt.smallest / 4, fmt.largest / 2))
    x = rng.integers(low, high, 2001).view(np.float64) * rng.choice([-1.0, 1.0], 2001)
    x[:100] = round_to(x[:100], fmt)
    words = generator.words(generator.tensor_key(7, "r"), 0, 1001).tolist()
    numbers = [half for word in words for half in (word & 0xFFFFFFFF, word >> 32)]
    expected = []
    for v, r in zip(x.tolist(), numbers, strict=False):
        below, step = neighbours(v, fmt)
        distance = (abs(Fraction(v)) - below) / step
        size = float(below + (step if (distance * 2**32) // 1 + r >= 2**32 else 0))
        expected.append(math.copysign(size, v) if size or fmt.kind != "fnuz" else 0.0)
    assert_same(round_to(x, fmt, Stochastic(7, "r")), expected)
    assert_same(round_to(x[777:], fmt, Stochastic(7, "r", 777)), expected[777:])


def test_stochastic_rounding_is_unbiased_in_the_mean_and_keeps_what_is_exact():
    n = 1 << 16
    made = round_to(np.full(n, 1.03125), E4M3, Stochastic(1, "mean"))  # a quarter of the way to 1.125
    assert set(made.tolist()) == {1.0, 1.125}
    assert abs((made == 1.125).mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / n)
    exact = decode(np.arange(0x7F), E4M3)
    assert_same(round_to(exact, E4M3, Stochastic(1, "exact")), exact)


def test_what_is_not_a_format_a_rounding_or_a_code_is_refused():
    with pytest.raises(Invalid, match=r"the format is 'fp8', but it must be one of fp32, .*\.$"):
        table.named("fp8")
    assert table.named("e4m3") is E4M3
    with pytest.raises(
        Invalid, match=r"rounding is 'up', but it must be one of nearest, zero, away or Stoch"
    ):
        round_to(1.0, E4M3, "up")
    with pytest.raises(Invalid, match=r"codes have the value 4096, but those of e5m6 must be 0 to 4095\.$"):
        decode(np.array([0, 4096], np.uint16), E5M6)
    with pytest.raises(Invalid, match=r"codes have the value -1, but those of e4m3 must be 0 to 255\.$"):
        decode([-1], E4M3)
    with pytest.raises(Invalid, match=r"codes have the type float64, but they must be integers of 8 bits\.$"):
        decode([1.0], E4M3)


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("bits", [2**63 - 1, 2**64 - 1, 0x7FF8 << 48, 0x7FFFFFFFE << 28])
def test_a_nan_alone_in_its_block_stays_a_nan(name, bits):
    x = np.array([bits], np.uint64).view(np.float64)
    assert np.isnan(round_to(x, FORMATS[name])).all()
