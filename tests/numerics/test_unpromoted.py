"""The accumulator that stays in the tensor core: against wgmma over all of K, and against integers."""

import adversary
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gemm import bits, case

from refimpl.numerics import tensorcore_twin as twin
from refimpl.numerics.formats import E4M3, decode, encode
from refimpl.numerics.gemm import gemm_fp8
from refimpl.numerics.tensorcore import wgmma_fp8


def by_twin(a: np.ndarray, sa: np.ndarray, b: np.ndarray, sb: np.ndarray) -> np.ndarray:
    rows = [(x.tolist(), bits(s).tolist()) for x, s in zip(a, sa, strict=True)]
    columns = [(y.tolist(), bits(sb)[j // 128].tolist()) for j, y in enumerate(b)]
    return np.array([[twin.unpromoted(*row, *column) for column in columns] for row in rows], np.uint32)


@pytest.mark.parametrize("scale", [1.0, 2.0**-7, 1.37, -0.3])
@pytest.mark.parametrize("formats", [("e4m3", "e4m3"), ("e5m2", "e4m3")])
def test_with_equal_scales_it_is_a_chain_over_all_of_k(scale: float, formats: tuple[str, str]) -> None:
    a, _, b, _ = case(1, 70, 140, 1024)
    a = a & 0xF3 if formats[0] == "e5m2" else a
    sa, sb = np.full((70, 8), scale, np.float32), np.full((2, 8), 1.11, np.float32)
    whole = wgmma_fp8(a, b, None, *formats) * (sa[0, 0] * sb[0, 0])
    found = gemm_fp8(a, sa, b, sb, "unpromoted", a_format=formats[0], b_format=formats[1])
    assert (bits(found) == bits(whole + np.float32(0))).all()


def test_powers_of_two_are_the_chain_with_the_scales_in_the_operands() -> None:
    rng = np.random.default_rng(2)
    a, b = (encode(rng.choice([0, 1, 1.125, 1.5, -1.75, 2, -3], (rows, 640)), E4M3) for rows in (20, 30))
    powers = 2.0 ** rng.integers(-5, 7, (20, 5))
    folded = encode(decode(a, E4M3) * np.repeat(powers, 128, 1), E4M3)
    assert (decode(folded, E4M3) == decode(a, E4M3) * np.repeat(powers, 128, 1)).all()
    found = gemm_fp8(a, powers.astype(np.float32), b, np.ones((1, 5), np.float32), "unpromoted")
    assert (bits(found) == bits(wgmma_fp8(folded, b))).all()
    assert (found != gemm_fp8(a, powers.astype(np.float32), b, np.ones((1, 5), np.float32), "deepgemm")).any()


@settings(max_examples=3)
@given(seed=st.integers(0, 1 << 32))
def test_it_is_what_integers_say(seed: int) -> None:
    given_case = case(seed, 3, 4, 512, width=4)
    assert (bits(gemm_fp8(*given_case, "unpromoted")) == by_twin(*given_case)).all()


def test_it_is_what_integers_say_of_adversarial_operands_and_scales() -> None:
    rng = np.random.default_rng(5)
    a, b = adversary.codes(rng, E4M3, 20, 384), adversary.codes(rng, E4M3, 10, 384)
    large = [0, 1e-45, 1e-38, 1, 1.3, -3, 3e38, np.inf, np.nan]
    sa = rng.choice(large, (20, 3)).astype(np.float32)
    sb = rng.choice([1e-44, 1e-30, 1.1, 3e38, -1], (1, 3)).astype(np.float32)
    for some in (sa, rng.choice(large[:7], (20, 3)).astype(np.float32)):
        assert (bits(gemm_fp8(a, some, b, sb, "unpromoted")) == by_twin(a, some, b, sb)).all()


def test_what_is_small_beside_the_sum_so_far_is_lost() -> None:
    # 2^14, and then a 1 in each of 127 steps: wgmma keeps 13 bits below the leading one, float32 more
    a, b = (np.zeros((1, 4096), np.uint8) for _ in range(2))
    a[0, ::32] = b[0, ::32] = encode(1.0, E4M3)
    a[0, 0], b[0, 0] = encode([128.0, 128.0], E4M3)
    one = np.ones((1, 32), np.float32)
    assert gemm_fp8(a, one, b, one, "unpromoted")[0, 0] == 2.0**14
    assert gemm_fp8(a, one, b, one, "deepgemm")[0, 0] == 2.0**14 + 31 * 4


def test_a_block_of_scale_zero_changes_neither_the_sum_nor_its_unit() -> None:
    a, sa, b, sb = case(3, 5, 6, 384)
    sa[:, 1] = 0
    left = [np.ascontiguousarray(np.delete(x, np.s_[128:256], 1)) for x in (a, b)]
    rest = gemm_fp8(left[0], sa[:, [0, 2]].copy(), left[1], sb[:, [0, 2]].copy(), "unpromoted")
    assert (bits(gemm_fp8(a, sa, b, sb, "unpromoted")) == bits(rest)).all()
