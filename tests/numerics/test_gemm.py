"""Block-scaled products against exact fractions, the plain twin, and what an H100 computed."""

import tracemalloc
from fractions import Fraction

import adversary
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import products
from support import RECORDINGS, one_sentence

from refimpl.errors import Invalid
from refimpl.numerics import tensorcore_twin as twin
from refimpl.numerics.float32 import to_bf16
from refimpl.numerics.formats import E4M3, FORMATS, decode, encode
from refimpl.numerics.gemm import KERNELS, NAMES, gemm_fp8
from refimpl.numerics.tensorcore import wgmma_fp8

H100 = RECORDINGS.parent / "h100"


def case(seed: int, m: int, n: int, k: int, width: float = 1.0) -> tuple[np.ndarray, ...]:
    """a, a_scale, b, b_scale with normal codes of all sizes and any scales."""
    rng = np.random.default_rng(seed)
    a, b = (encode(rng.standard_normal((rows, k)) * 100, E4M3) for rows in (m, n))
    sa, sb = (
        np.exp2(rng.uniform(-width, width, (rows, k // 128))).astype(np.float32) for rows in (m, -(-n // 128))
    )
    return a, sa, b, sb


def bits(x: np.ndarray) -> np.ndarray:
    return x.view(np.uint32)


def by_twin(a: np.ndarray, sa: np.ndarray, b: np.ndarray, sb: np.ndarray, kernel: str) -> np.ndarray:
    return np.array(
        [
            [
                twin.gemm(
                    a[i].tolist(), bits(sa)[i].tolist(), b[j].tolist(), bits(sb)[j // 128].tolist(), kernel
                )
                for j in range(len(b))
            ]
            for i in range(len(a))
        ],
        np.uint32,
    )


def exact_partial(a: np.ndarray, b: np.ndarray, block: int) -> Fraction:
    part = slice(128 * block, 128 * block + 128)
    x, y = (decode(codes[part], E4M3).tolist() for codes in (a, b))
    return sum((Fraction(u) * Fraction(v) for u, v in zip(x, y, strict=True)), Fraction(0))


def nearest(x: Fraction) -> int:
    return twin.float32_bits(x) if x else 0


class TestRecordings:
    def test_all_recorded_products_of_an_h100_agree_bit_for_bit(self) -> None:
        wrong = {key: int((x != y).sum()) for key, x, y in products(H100)}
        assert len(wrong) >= 6 * 3 + 2 + 3
        assert not any(wrong.values()), wrong

    def test_a_promotion_without_fma_would_not_agree(self) -> None:
        # so that the agreement above says something about the multiply-add
        a, sa, b, sb = case(3, 8, 16, 512)
        acc = np.zeros((8, 16), np.float32)
        for k in range(4):
            part = slice(128 * k, 128 * k + 128)
            acc = acc + sa[:, k, None] * sb[0, k] * wgmma_fp8(a[:, part], b[:, part])
        differing = (acc != gemm_fp8(a, sa, b, sb, "deepgemm")).mean()
        assert 0.2 < differing < 0.7


class TestTwin:
    @pytest.mark.parametrize("kernel", ["deepgemm", "triton_wgmma", "triton_mma"])
    @settings(max_examples=3)
    @given(seed=st.integers(0, 1 << 32))
    def test_kernels_agree(self, kernel: str, seed: int) -> None:
        given_case = case(seed, 3, 4, 384, width=4)
        assert (bits(gemm_fp8(*given_case, kernel)) == by_twin(*given_case, kernel)).all()

    @pytest.mark.parametrize("kernel", ["deepgemm", "triton_wgmma", "triton_mma"])
    def test_kernels_agree_on_adversarial_operands_and_scales(self, kernel: str) -> None:
        rng = np.random.default_rng(5)
        a, b = adversary.codes(rng, E4M3, 10, 256), adversary.codes(rng, E4M3, 10, 256)
        sa = rng.choice([0, 1e-45, 1e-38, 1, 3e38, np.inf, np.nan], (10, 2)).astype(np.float32)
        sb = rng.choice([1e-44, 1e-30, 1.1, 3e38], (1, 2)).astype(np.float32)
        assert (bits(gemm_fp8(a, sa, b, sb, kernel)) == by_twin(a, sa, b, sb, kernel)).all()


class TestIdeal:
    def test_promote_fp32_has_exact_partial_sums(self) -> None:
        a, sa, b, sb = case(1, 3, 4, 384)
        found = bits(gemm_fp8(a, sa, b, sb, "promote_fp32"))
        for i in range(3):
            for j in range(4):
                acc = 0
                for k in range(3):
                    p = nearest(exact_partial(a[i], b[j], k))
                    acc = twin.fma(twin.product(int(bits(sa)[i, k]), int(bits(sb)[0, k])), p, acc)
                assert found[i, j] == acc

    def test_exact_is_rounded_once(self) -> None:
        a, sa, b, sb = case(2, 3, 4, 384, width=20)
        found = bits(gemm_fp8(a, sa, b, sb, "exact"))
        for i in range(3):
            for j in range(4):
                total = sum(
                    Fraction(float(sa[i, k])) * Fraction(float(sb[0, k])) * exact_partial(a[i], b[j], k)
                    for k in range(3)
                )
                assert found[i, j] == nearest(total)

    @pytest.mark.parametrize(("sign", "expected"), [(1, 1 + 2.0**-22), (-1, 1 + 2.0**-23), (0, 1 + 2.0**-22)])
    def test_exact_sees_what_float64_does_not(self, sign: int, expected: float) -> None:
        # (1 + 2^-23) + 2^-24 is the middle of two float32 values; then something 2^-100 as large
        a, b = (np.zeros((1, 512), np.uint8) for _ in range(2))
        one = encode(1.0, E4M3)
        a[0, ::128], b[0, ::128] = one, one
        a[0, 384] = encode(float(sign), E4M3)
        sa = np.array([[1, 2.0**-23, 2.0**-24, 2.0**-50]], np.float32)
        sb = np.array([[1, 1, 1, 2.0**-50]], np.float32)
        assert gemm_fp8(a, sa, b, sb, "exact") == np.float32(expected)

    @pytest.mark.parametrize("formats", [("e5m2", "e4m3"), ("e5m2", "e5m2")])
    def test_the_range_of_e5m2_is_summed_exactly_too(self, formats: tuple[str, str]) -> None:
        fa, fb = (FORMATS[name] for name in formats)
        a, b = (np.zeros((1, 128), np.uint8) for _ in range(2))
        # 60 of the largest products, one of the smallest, and the former again with the other sign
        a[0, :121] = encode([fa.largest] * 60 + [fa.smallest] + [-fa.largest] * 60, fa)
        b[0, :121] = encode([fb.largest] * 60 + [fb.smallest] + [fb.largest] * 60, fb)
        one = np.ones((1, 1), np.float32)
        for kernel in ("promote_fp32", "exact"):
            found = gemm_fp8(a, one, b, one, kernel, a_format=formats[0], b_format=formats[1])
            assert found == fa.smallest * fb.smallest

    def test_the_emulated_kernels_are_near_the_exact_product(self) -> None:
        a, sa, b, sb = case(4, 40, 140, 1024)
        exact = gemm_fp8(a, sa, b, sb, "exact").astype(float)
        size = np.abs(exact).max()
        bounds = {"promote_fp32": 2e-7, "triton_mma": 2e-6, "deepgemm": 1e-3, "triton_wgmma": 1e-3}
        for kernel, bound in bounds.items():
            found = gemm_fp8(a, sa, b, sb, kernel)
            assert 0 < np.abs(found - exact).max() < bound * size


class TestForms:
    def test_a_last_block_of_rows_may_be_partial(self) -> None:
        a, sa, b, sb = case(6, 3, 192, 256)
        whole = gemm_fp8(a, sa, b, sb, "deepgemm")
        assert (whole[:, 128:] == gemm_fp8(a, sa, b[128:], sb[1:], "deepgemm")).all()

    def test_a_scale_for_every_row_of_b_is_the_same_as_one_for_its_block(self) -> None:
        a, sa, b, sb = case(7, 3, 192, 256)
        rows = np.repeat(sb, 128, axis=0)[:192]
        for kernel in [*KERNELS, "exact"]:
            assert (gemm_fp8(a, sa, b, sb, kernel) == gemm_fp8(a, sa, b, rows, kernel)).all()

    @pytest.mark.parametrize("kernel", [*KERNELS, "exact"])
    def test_bf16_is_the_rounded_float32(self, kernel: str) -> None:
        given_case = case(8, 5, 7, 256)
        wide, narrow = gemm_fp8(*given_case, kernel), gemm_fp8(*given_case, kernel, out="bf16")
        assert narrow.dtype == np.uint16
        assert (narrow == to_bf16(wide)).all()

    def test_parts_of_k_are_added_at_the_end(self) -> None:
        a, sa, b, sb = case(9, 6, 5, 1024)
        halves = [
            gemm_fp8(a[:, s], sa[:, t], b[:, s], sb[:, t], "deepgemm")
            for s, t in ((slice(0, 512), slice(0, 4)), (slice(512, 1024), slice(4, 8)))
        ]
        split = gemm_fp8(a, sa, b, sb, "cublas", split=2)
        assert (split == halves[0] + halves[1]).all()
        assert (split != gemm_fp8(a, sa, b, sb, "deepgemm")).any()
        assert (gemm_fp8(a, sa, b, sb, "cublas") == gemm_fp8(a, sa, b, sb, "deepgemm")).all()

    @pytest.mark.parametrize("kernel", ["deepgemm", "promote_fp32"])
    def test_memory_does_not_grow_with_k(self, kernel: str) -> None:
        codes, scale = np.ones((2, 1 << 17), np.uint8), np.ones((2, 1 << 10), np.float32)
        gemm_fp8(codes[:, :128], scale[:, :1], codes[:, :128], scale[:, :1], kernel)  # tables
        tracemalloc.start()
        gemm_fp8(codes, scale, codes, scale, kernel)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 19  # the operands are twice that, decoded sixteen times

    def test_one_scale_for_all_multiplies_at_the_end(self) -> None:
        a, _, b, _ = case(10, 6, 5, 512)
        two, half = np.float32(2), np.array([0.375], np.float32)
        fast = gemm_fp8(a, two, b, half, "cublas_tensor")
        assert (fast == wgmma_fp8(a, b) * np.float32(0.75)).all()
        acc = np.zeros((6, 5), np.float32)
        for k in range(0, 512, 128):
            acc = acc + wgmma_fp8(a[:, k : k + 128], b[:, k : k + 128])
        blocks = gemm_fp8(a, two, b, half, "cublas_tensor", accumulation="blocks")
        assert (blocks == acc * np.float32(0.75)).all()

    def test_an_element_does_not_depend_on_tiles(self) -> None:
        a, sa, b, sb = case(11, 300, 260, 128)
        for kernel in NAMES:
            if kernel == "cublas_tensor":
                continue
            whole = gemm_fp8(a, sa, b, sb, kernel)
            assert whole[299, 259] == gemm_fp8(a[299:], sa[299:], b[259:], sb[2:], kernel)[0, 0]

    def test_nan_and_infinite_scales_reach_what_they_scale(self) -> None:
        a, sa, b, sb = case(12, 4, 3, 256)
        sa[1, 0], sa[2, 1] = np.nan, np.inf
        for kernel in [*KERNELS, "exact"]:
            found = gemm_fp8(a, sa, b, sb, kernel)
            assert (bits(found)[1] == 0x7FFFFFFF).all()
            # to `exact`, infinity is a factor of every term, of both signs
            assert (np.isnan if kernel == "exact" else np.isinf)(found[2]).all()
            assert np.isfinite(found[[0, 3]]).all()
        assert (gemm_fp8(a, sa, b, sb, "exact", out="bf16")[1] == 0x7FFF).all()


class TestErrors:
    def refuses(self, *fragments: str, **changes: object) -> None:
        a, sa, b, sb = case(0, 4, 192, 256)
        given = {"a": a, "a_scale": sa, "b": b, "b_scale": sb, "kernel": "deepgemm", **changes}
        with pytest.raises(Invalid) as caught:
            gemm_fp8(**given)
        one_sentence(caught, *fragments)

    def test_k_must_be_whole_blocks(self) -> None:
        codes = {"a": np.zeros((4, 192), np.uint8), "b": np.zeros((192, 192), np.uint8)}
        self.refuses("K of a and b is 192", "multiple of 128", **codes)

    def test_scale_grids_must_fit(self) -> None:
        one = np.ones((4, 1), np.float32)
        self.refuses("a_scale has the shape (4, 1)", "(4, 2)", a_scale=one)
        self.refuses("b_scale has the shape (4, 1)", "(2, 2) or (192, 2)", b_scale=one)
        self.refuses("b_scale has the shape (1, 2)", "(2, 2)", b_scale=np.ones((1, 2), np.float32))
        self.refuses("a_scale holds float64", "float32", a_scale=np.ones((4, 2)))
        self.refuses("b_scale holds uint8", "float32", b_scale=np.ones((2, 2), np.uint8))
        self.refuses("a_scale has the shape (4, 2)", "one scale", kernel="cublas_tensor")

    def test_codes_and_choices_must_be_known(self) -> None:
        self.refuses("a holds float32", "uint8", a=np.zeros((4, 256), np.float32))
        self.refuses("kernel is 'cutlass'", "deepgemm", kernel="cutlass")
        self.refuses("out is 'fp16'", "fp32, bf16", out="fp16")
        self.refuses("accumulation is 'slow'", "fast, blocks", accumulation="slow")
        self.refuses("b_format is 'fp16'", "e4m3 or e5m2", b_format="fp16")

    def test_parts_must_divide_the_blocks(self) -> None:
        self.refuses("split is 3", "divisor of the 2 blocks", kernel="cublas", split=3)
        self.refuses("split is 0", "divisor", kernel="cublas", split=0)
        self.refuses("split is 2", "deepgemm", "must be 1", split=2)
