"""float32 of the GPU's ordinary units, against exact fractions and by the bits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.numerics import tensorcore_twin as twin
from refimpl.numerics.float32 import canonical, fma, to_bf16
from refimpl.numerics.formats import BF16, encode

EDGES = [0x0, 0x1, 0x7FFFFF, 0x800000, 0x3F800000, 0x3F800001, 0x33800000, 0x7F7FFFFF, 0x7F800000, 0x7FC00000]


def floats(*bits: int) -> np.ndarray:
    return np.array(bits, np.uint32).view(np.float32)


def by_twin(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    triples = zip(*(x.view(np.uint32).tolist() for x in (a, b, c)), strict=True)
    return np.array([twin.fma(*t) for t in triples], np.uint32)


class TestFma:
    def test_it_rounds_once_where_float64_rounds_to_the_middle(self) -> None:
        # (1 + 2^-23) + 2^-24 (1 - 2^-46) lies just below the middle, which is where float64 puts it
        a, b = np.float32(2.0**-12 * (1 + 2.0**-23)), np.float32(2.0**-12 * (1 - 2.0**-23))
        c = np.float32(1 + 2.0**-23)
        assert np.float32(np.float64(a) * b + c) == np.float32(1 + 2.0**-22)
        assert fma(a, b, c) == c
        assert fma(-a, b, -c) == -c

    def test_edges_agree_with_the_twin(self) -> None:
        values = np.array([*EDGES, *(e | 1 << 31 for e in EDGES)], np.uint32).view(np.float32)
        a, b, c = (x.ravel() for x in np.meshgrid(values, values, values))
        assert (canonical(fma(a, b, c)).view(np.uint32) == by_twin(a, b, c)).all()

    @settings(max_examples=20)
    @given(seed=st.integers(0, 1 << 32))
    def test_sums_near_the_middle_agree_with_the_twin(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        near = rng.integers(0, 40, 200)
        c = (rng.integers(50 - near, 250 - near) << 23 | rng.integers(0, 1 << 23, 200)).astype(np.uint32)
        c = (c | rng.integers(0, 2, 200).astype(np.uint32) << 31).view(np.float32)
        # a product just beside half a step of c: (h + d)(1 - d / h) or its like
        spacing = np.abs(c).view(np.uint32) >> 23
        e = spacing.astype(int) - 127 - 24
        d = np.ldexp(1.0, -23) * rng.integers(-2, 3, 200)
        a = np.ldexp(1 + d, e // 2 + near % 2).astype(np.float32)
        b = np.ldexp(1 - d, e - e // 2 - near % 2).astype(np.float32) * rng.choice([1, -1], 200)
        b = b.astype(np.float32)
        assert (fma(a, b, c).view(np.uint32) == by_twin(a, b, c)).all()

    @settings(max_examples=20)
    @given(seed=st.integers(0, 1 << 32))
    def test_any_bits_agree_with_the_twin(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        a, b, c = rng.integers(0, 1 << 32, (3, 200), dtype=np.uint32).view(np.float32)
        with np.errstate(all="ignore"):
            c[:100] = -(a[:100] * b[:100])  # so that much cancels
        assert (canonical(fma(a, b, c)).view(np.uint32) == by_twin(a, b, c)).all()

    def test_subnormal_results_are_rounded_once(self) -> None:
        rng = np.random.default_rng(0)
        a = np.ldexp(1 + rng.integers(0, 1 << 23, 2000) * 2.0**-23, -70).astype(np.float32)
        b = np.ldexp(1 + rng.integers(0, 1 << 23, 2000) * 2.0**-23, rng.integers(-85, -55, 2000)).astype(
            np.float32
        )
        c = rng.integers(0, 1 << 24, 2000).astype(np.uint32).view(np.float32)
        assert (fma(a, b, c).view(np.uint32) == by_twin(a, b, c)).all()

    def test_a_subnormal_result_just_below_the_middle_is_rounded_down(self) -> None:
        a, b = np.float32(2.0**-75 * (1 + 2.0**-23)), np.float32(2.0**-75 * (1 - 2.0**-23))
        c = np.float32(2.0**-127 + 2.0**-149)
        assert np.float32(np.float64(a) * b + c) == c + np.float32(2.0**-149)
        assert fma(a, b, c) == c

    def test_shapes_broadcast(self) -> None:
        a, b, c = np.ones((3, 1), np.float32), np.ones((1, 4), np.float32), np.zeros((3, 4), np.float32)
        assert fma(a, b, c).shape == (3, 4)
        assert fma(np.float32(2), np.float32(3), np.float32(1)) == 7


class TestBf16:
    def test_it_is_the_nearest_with_ties_to_even(self) -> None:
        x = np.random.default_rng(1).integers(0, 1 << 32, 100_000, dtype=np.uint32)
        x[:50_000] &= 0xFFFF8000  # ties and exact values
        x = x.view(np.float32)
        x = x[~np.isnan(x)]
        assert (to_bf16(x) == encode(x, BF16)).all()

    @pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF])
    def test_every_nan_is_7fff(self, bits: int) -> None:
        assert to_bf16(floats(bits)) == 0x7FFF


def test_every_nan_becomes_that_of_the_gpu_in_place() -> None:
    x = floats(0xFFC00000, 0x7F800001, 0x7F800000, 0x80000000)
    assert canonical(x) is x
    assert x.view(np.uint32).tolist() == [0x7FFFFFFF, 0x7FFFFFFF, 0x7F800000, 0x80000000]
