"""Tensor cores by hand, against the plain twin, and against what an H100 computed."""

import tracemalloc

import adversary
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import instructions, load
from support import RECORDINGS, one_sentence

from refimpl.errors import Invalid
from refimpl.numerics import tensorcore_twin as twin
from refimpl.numerics.formats import FORMATS, encode
from refimpl.numerics.tensorcore import (
    HMMA,
    QGMMA,
    mma_bf16,
    mma_fp8,
    mma_fp16,
    wgmma_bf16,
    wgmma_fp8,
    wgmma_fp16,
)

H100 = RECORDINGS.parent / "h100"
MIXES = [("e4m3", "e4m3"), ("e4m3", "e5m2"), ("e5m2", "e4m3"), ("e5m2", "e5m2")]
SIXTEEN = [("bf16", wgmma_bf16), ("fp16", wgmma_fp16)]
NAN, INF = 0x7FFFFFFF, 0x7F800000


def row(*values: float, fmt: str = "e4m3", k: int = 32) -> np.ndarray:
    """(1, K) codes: the values, then zeros."""
    return encode(np.array([[*values, *[0.0] * (k - len(values))]]), FORMATS[fmt])


def single(x: float) -> np.ndarray:
    return np.array([[x]], np.float32)


def by_twin(a: np.ndarray, b: np.ndarray, c: np.ndarray, element) -> np.ndarray:
    left, right, start = a.tolist(), b.tolist(), c.view(np.uint32).tolist()
    return np.array(
        [[element(left[i], right[j], start[i][j]) for j in range(len(b))] for i in range(len(a))], np.uint32
    )


class TestByHand:
    def test_small_sums_are_exact(self) -> None:
        assert wgmma_fp8(row(1.5, -2, 0.25), row(3, 0.5, 8), single(10)) == 10 + 4.5 - 1 + 2

    def test_addends_are_cut_to_13_bits_below_the_largest_toward_zero(self) -> None:
        assert wgmma_fp8(row(256, 0.03125), row(1, 1)) == 256 + 2.0**-5
        assert wgmma_fp8(row(256, 0.03125), row(1, 0.9375)) == 256  # 0.94 of the last bit
        assert wgmma_fp8(row(256, -0.03125), row(1, 0.9375)) == 256
        many = row(256, *[0.03125] * 31)
        assert wgmma_fp8(many, row(1, *[0.9375] * 31)) == 256  # 29 last bits are lost

    def test_alignment_is_to_the_exponent_not_to_the_normalised_product(self) -> None:
        # 1.5 * 1.5 = 2.25 has the exponent 0: 2^-13 still counts, although 14 bits below the leading one ...
        assert wgmma_fp8(row(1.5, *[-(2.0**-6)] * 2), row(1.5, *[2.0**-7] * 2)) == 2.25 - 2.0**-12
        # ... and the smallest exponent of a subnormal is -6: 2^-9 * 2^8 aligns like 2^2.
        assert wgmma_fp8(row(2.0**-9), row(256), single(2.0**-12)) == 0.5

    def test_the_sum_is_cut_toward_zero_to_13_fraction_bits(self) -> None:
        assert wgmma_fp8(row(448, 448, 0.03125), row(1, 1, 1)) == 896
        assert wgmma_fp8(row(-448, -448, -0.03125), row(1, 1, 1)) == -896

    def test_an_accumulator_loses_its_low_bits_even_to_zeros(self) -> None:
        assert wgmma_fp8(row(0), row(0), single(1 + 2.0**-23)) == 1
        assert wgmma_bf16(row(0, fmt="bf16"), row(0, fmt="bf16"), single(1 + 2.0**-23)) == 1 + 2.0**-23

    def test_the_exponent_of_a_zero_product_does_not_take_part(self) -> None:
        c = single(2.0**-20)
        assert wgmma_fp8(row(0, 0), row(448, 448), c) == c
        assert wgmma_fp8(row(0, 2.0**-9), row(448, 2.0**-9), c) == 2.0**-20 + 2.0**-18

    def test_16_bit_products_are_cut_to_25_bits_and_never_finer_than_2_to_minus_158(self) -> None:
        big, small = row(1, 2.0**-13, fmt="bf16"), row(1, 2.0**-12, fmt="bf16")
        assert wgmma_bf16(big, small, single(0)) == 1  # 2^-25 is added, then the sum is cut
        assert wgmma_bf16(big, small, single(-(2.0**-24))) == 1 - 2.0**-24
        tiny = row(2.0**-80, fmt="bf16"), row(2.0**-79, fmt="bf16")
        assert wgmma_bf16(*tiny).view(np.uint32) == 0  # 2^-159, positive
        assert wgmma_bf16(*tiny, single(2.0**-149)) == 2.0**-149

    def test_the_finest_grid_of_16_bit_products_is_2_to_minus_158(self) -> None:
        unit = 2.0**-79  # 7 * 73 = 511 units^2 are one short of 2^-149
        a, b = row(7 * unit, unit, 0, fmt="bf16"), row(73 * unit, unit, 0, fmt="bf16")
        assert wgmma_bf16(a, b) == 2.0**-149
        halves = row(73 * unit, unit / 2, unit / 2, fmt="bf16")
        assert wgmma_bf16(row(7 * unit, unit, unit, fmt="bf16"), halves) == 0

    def test_zeros_are_positive(self) -> None:
        for c in (0.0, -0.0):
            assert wgmma_fp8(row(-1, 1), row(1, 1), single(c)).view(np.uint32) == 0
            assert mma_fp8(row(-1, 1), row(1, 1), single(0.0)).view(np.uint32) == 0

    def test_nan_and_infinities(self) -> None:
        def bits(a: float, b: float, c: float) -> int:
            fmt = {"fmt": "e5m2"}
            return int(
                wgmma_fp8(row(a, **fmt), row(b, **fmt), single(c), "e5m2", "e5m2").view(np.uint32)[0, 0]
            )

        inf, nan = np.inf, np.nan
        assert bits(nan, 0, 1) == bits(0, nan, inf) == bits(1, 1, nan) == bits(inf, 0, 1) == NAN
        assert bits(inf, 1, -inf) == NAN
        assert bits(inf, -1, 1) == bits(1, 1, -inf) == INF | 1 << 31
        assert bits(inf, 1, inf) == bits(inf, 2, -1) == INF

    def test_bf16_overflows_in_a_chain_and_infinity_meets_its_opposite_later(self) -> None:
        a = row(*[2.0**127] * 16, *[0.0] * 16, fmt="bf16", k=32)
        b = row(*[1.0] * 16, *[0.0] * 16, fmt="bf16", k=32)
        assert wgmma_bf16(a, b) == np.inf
        a[0, 16], b[0, 16] = encode(-np.inf, FORMATS["bf16"]), encode(1.0, FORMATS["bf16"])
        assert wgmma_bf16(a, b).view(np.uint32) == NAN
        swap = np.roll(np.arange(32), 16)  # the infinity first: the overflow is no more
        assert wgmma_bf16(a[:, swap], b[:, swap]) == -np.inf


class TestProperties:
    def test_the_order_within_a_step_does_not_matter(self) -> None:
        rng = np.random.default_rng(0)
        e4m3 = FORMATS["e4m3"]
        a, b = adversary.codes(rng, e4m3, 18, 32), adversary.codes(rng, e4m3, 9, 32)
        order = rng.permutation(32)
        assert (wgmma_fp8(a, b).view(np.uint32) == wgmma_fp8(a[:, order], b[:, order]).view(np.uint32)).all()

    def test_a_chain_is_its_steps(self) -> None:
        rng = np.random.default_rng(1)
        a, b = (adversary.codes(rng, FORMATS["e4m3"], rows, 1088) for rows in (9, 18))
        d = adversary.accumulators(rng, 9, 18)
        whole = wgmma_fp8(a, b, d)
        for k in range(0, 1088, 32):
            d = wgmma_fp8(a[:, k : k + 32], b[:, k : k + 32], d)
        assert (whole.view(np.uint32) == d.view(np.uint32)).all()

    def test_an_element_does_not_depend_on_the_others(self) -> None:
        rng = np.random.default_rng(2)
        a, b = (adversary.codes(rng, FORMATS["e4m3"], rows, 96) for rows in (70, 300))
        whole = wgmma_fp8(a, b).view(np.uint32)
        for i, j in ((0, 0), (69, 299), (16, 256), (15, 255)):
            assert whole[i, j] == wgmma_fp8(a[i : i + 1], b[j : j + 1]).view(np.uint32)[0, 0]

    def test_the_accumulator_given_is_not_changed(self) -> None:
        c = single(1 + 2.0**-23)
        wgmma_fp8(row(1), row(1), c)
        assert c == 1 + 2.0**-23

    def test_no_rows_are_no_result(self) -> None:
        assert wgmma_fp8(np.zeros((0, 32), np.uint8), np.zeros((3, 32), np.uint8)).shape == (0, 3)

    def test_memory_is_bounded_whatever_the_shape(self) -> None:
        a, b = np.ones((2, 1 << 18), np.uint8), np.ones((300, 1024), np.uint8)
        for operands in ((a, a), (b, b)):
            wgmma_fp8(operands[0][:, :32], operands[1][:, :32])  # tables
            tracemalloc.start()
            wgmma_fp8(*operands)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 16 << 20


class TestTwin:
    @pytest.mark.parametrize(("fa", "fb"), MIXES)
    @settings(max_examples=6)
    @given(seed=st.integers(0, 1 << 32))
    def test_wgmma_fp8_agrees(self, fa: str, fb: str, seed: int) -> None:
        rng = np.random.default_rng(seed)
        a, b = adversary.codes(rng, FORMATS[fa], 18, 64), adversary.codes(rng, FORMATS[fb], 9, 64)
        c = adversary.accumulators(rng, 18, 9)
        expected = by_twin(a, b, c, lambda x, y, z: twin.chain(x, y, z, FORMATS[fa], FORMATS[fb], QGMMA))
        assert (wgmma_fp8(a, b, c, fa, fb).view(np.uint32) == expected).all()

    @pytest.mark.parametrize(("name", "fast"), SIXTEEN)
    @settings(max_examples=10)
    @given(seed=st.integers(0, 1 << 32))
    def test_16_bit_instructions_agree(self, name: str, fast, seed: int) -> None:
        rng, fmt = np.random.default_rng(seed), FORMATS[name]
        a, b = adversary.codes(rng, fmt, 18, 48), adversary.codes(rng, fmt, 9, 48)
        c = adversary.accumulators(rng, 18, 9)
        expected = by_twin(a, b, c, lambda x, y, z: twin.chain(x, y, z, fmt, fmt, HMMA))
        assert (fast(a, b, c).view(np.uint32) == expected).all()

    @pytest.mark.parametrize("name", ["e4m3", "e5m2"])
    @settings(max_examples=4)
    @given(seed=st.integers(0, 1 << 32))
    def test_mma_fp8_agrees(self, name: str, seed: int) -> None:
        rng, fmt = np.random.default_rng(seed), FORMATS[name]
        a, b = adversary.codes(rng, fmt, 18, 64), adversary.codes(rng, fmt, 9, 64)
        c = adversary.accumulators(rng, 18, 9)
        expected = by_twin(a, b, c, lambda x, y, z: twin.mma_fp8(x, y, z, fmt, fmt))
        assert (mma_fp8(a, b, c, name, name).view(np.uint32) == expected).all()

    @pytest.mark.parametrize(("fa", "fb"), MIXES)
    def test_all_exponents_meet_all_exponents(self, fa: str, fb: str) -> None:
        a, b = np.zeros((128, 32), np.uint8), np.zeros((16, 32), np.uint8)
        a[:, 5] = np.arange(128)
        b[:, 5] = np.linspace(0, 127, 16).astype(np.uint8) | np.arange(16) % 2 << 7
        c = np.ldexp(np.float32(1.9999999), np.arange(128)[:, None] % 60 - 30 + np.zeros((1, 16), int))
        expected = by_twin(a, b, c, lambda x, y, z: twin.chain(x, y, z, FORMATS[fa], FORMATS[fb], QGMMA))
        assert (wgmma_fp8(a, b, c, fa, fb).view(np.uint32) == expected).all()

    @pytest.mark.parametrize("name", ["e4m3", "e5m2", "bf16", "fp16"])
    def test_what_is_special_meets_all_that_is(self, name: str) -> None:
        fmt = FORMATS[name]
        unit, fast = (QGMMA, wgmma_fp8) if name in ("e4m3", "e5m2") else (HMMA, dict(SIXTEEN)[name])
        values = [0.0, -0.0, 1.0, -fmt.largest, fmt.smallest, np.inf, -np.inf, np.nan]
        pairs = encode(np.array([(x, y) for x in values for y in values]), fmt)  # (64, 2)
        a, b = np.zeros((64, unit.products), fmt.code_type), np.zeros((8, unit.products), fmt.code_type)
        a[:, :2] = pairs
        b[:, 0], b[:, 1] = encode(np.array(values), fmt), encode(1.0, fmt)
        named = [name, name] if unit is QGMMA else []
        for c in (0.0, -0.0, 1.0, -1e38, 1e-45, np.inf, -np.inf, np.nan):
            start = np.full((64, 8), c, np.float32)
            expected = by_twin(a, b, start, lambda x, y, z: twin.chain(x, y, z, fmt, fmt, unit))
            assert (fast(a, b, start, *named).view(np.uint32) == expected).all()

    def test_the_twin_gives_what_was_recorded(self) -> None:
        tensors, _ = load(H100, "wgmma_fp8")
        e4m3 = FORMATS["e4m3"]
        a, b, c, d = (tensors[f"{name}_e4m3_e4m3_k32"] for name in "ABCD")
        for t in range(len(a)):
            i, j = t % a.shape[1], t % 8
            found = twin.chain(a[t, i].tolist(), b[t, j].tolist(), int(c[t, i, j]), e4m3, e4m3, QGMMA)
            assert found == d[t, i, j]


@pytest.mark.parametrize("name", ["wgmma_fp8", "tc_bf16"])
def test_all_recorded_values_of_an_h100_agree_bit_for_bit(name: str) -> None:
    wrong = {key: int((x != y).sum()) for key, x, y in instructions(H100, name)}
    assert len(wrong) > 9
    assert not any(wrong.values()), wrong


class TestErrors:
    def refuses(self, *fragments: str, call=wgmma_fp8, **changes: object) -> None:
        given = {"a": np.zeros((2, 64), np.uint8), "b": np.zeros((3, 64), np.uint8), **changes}
        with pytest.raises(Invalid) as caught:
            call(**given)
        one_sentence(caught, *fragments)

    def test_k_must_fit_the_instruction(self) -> None:
        half = {"a": np.zeros((2, 48), np.uint8), "b": np.zeros((3, 48), np.uint8)}
        self.refuses("K of a and b is 48", "multiple of 32", **half)
        self.refuses("K of a and b is 48", "multiple of 32", call=mma_fp8, **half)
        none = {"a": np.zeros((2, 0), np.uint8), "b": np.zeros((3, 0), np.uint8)}
        self.refuses("K of a and b is 0", "positive multiple of 32", **none)
        sixteen = {"a": np.zeros((2, 24), np.uint16), "b": np.zeros((3, 24), np.uint16)}
        self.refuses("K of a and b is 24", "multiple of 16", call=mma_bf16, **sixteen)
        self.refuses("a has K = 64 and b has K = 32", "the same", b=np.zeros((3, 32), np.uint8))

    def test_codes_must_be_of_the_format(self) -> None:
        self.refuses("a holds uint16", "e4m3", "uint8", a=np.zeros((2, 64), np.uint16))
        self.refuses("b holds int64", "e4m3", "uint8", b=np.full((3, 64), 256))
        self.refuses("b holds list", "uint8", b=[[1, 2]])
        self.refuses("a holds uint8", "fp16", "uint16", call=mma_fp16)
        self.refuses("a_format is 'e5m6'", "e4m3 or e5m2", a_format="e5m6")
        self.refuses("b_format is 'bf16'", "e4m3 or e5m2", b_format="bf16", call=mma_fp8)

    def test_shapes_must_fit(self) -> None:
        self.refuses("a has the shape (64,)", "two axes", a=np.zeros(64, np.uint8))
        self.refuses("c has the shape (2, 2)", "(2, 3)", c=np.zeros((2, 2), np.float32))
        self.refuses("c holds float64", "float32", c=np.zeros((2, 3)))
