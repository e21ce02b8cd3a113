"""The fast form of promote_fp32 against its plain twin, bit for bit."""

import numpy as np
import pytest
from adversary import codes as adversarial

from refimpl.numerics import gemm, promoted
from refimpl.numerics.float32 import canonical
from refimpl.numerics.formats import FORMATS, encode

PAIRS = [("e4m3", "e4m3"), ("e5m2", "e4m3"), ("e4m3", "e5m2"), ("e5m2", "e5m2")]
SHAPES = [(1, 1, 128), (70, 3, 256), (65, 130, 256), (3, 600, 384)]


def plain(a: np.ndarray, sa: np.ndarray, b: np.ndarray, sb: np.ndarray, fa: str, fb: str) -> np.ndarray:
    row = gemm._for_formats(gemm.KERNELS["promote_fp32"], fa, fb)
    whole = slice(0, a.shape[1])
    with np.errstate(all="ignore"):
        return canonical(gemm.by_blocks(row, a, sa, b, sb, FORMATS[fa], FORMATS[fb], whole))


def agree(a: np.ndarray, sa: np.ndarray, b: np.ndarray, sb: np.ndarray, fa: str, fb: str) -> bool:
    fast = gemm.gemm_fp8(a, sa, b, sb, "promote_fp32", a_format=fa, b_format=fb)
    return bool((fast.view(np.uint32) == plain(a, sa, b, sb, fa, fb).view(np.uint32)).all())


def suit(a: np.ndarray, sa: np.ndarray, b: np.ndarray, sb: np.ndarray, fa: str, fb: str) -> bool:
    return promoted.suits(a, sa, FORMATS[fa]) and promoted.suits(b, sb, FORMATS[fb])


def scales(rng: np.random.Generator, shape: tuple[int, int], powers: bool = False) -> np.ndarray:
    exponent = rng.uniform(-20, 5, shape)
    return np.exp2(np.round(exponent) if powers else exponent).astype(np.float32)


def finite(rng: np.random.Generator, shape: tuple[int, int], name: str) -> np.ndarray:
    """All finite codes of a format, with all exponents."""
    x = rng.integers(0, 256, shape).astype(np.uint8)
    return np.where((x & 0x7F) > FORMATS[name].top, x & 0x83, x).astype(np.uint8)


@pytest.mark.parametrize("formats", PAIRS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("powers", [False, True])
def test_it_agrees_on_all_finite_codes(
    formats: tuple[str, str], shape: tuple[int, int, int], powers: bool
) -> None:
    (m, n, k), rng = shape, np.random.default_rng(1)
    if formats != PAIRS[0]:  # the twin is slow for these
        m, n = min(m, 8), min(n, 40)
    a, b = finite(rng, (m, k), formats[0]), finite(rng, (n, k), formats[1])
    sa, sb = scales(rng, (m, k // 128), powers), scales(rng, (n, k // 128), powers)
    assert suit(a, sa, b, sb, *formats)
    assert agree(a, sa, b, sb, *formats)


@pytest.mark.parametrize("formats", PAIRS)
def test_it_agrees_on_values_with_few_bits_whose_sums_often_are_ties(formats: tuple[str, str]) -> None:
    rng = np.random.default_rng(2)
    fa, fb = (FORMATS[name] for name in formats)
    big = np.array([2.0**8, 2.0**7, -(2.0**8), 1.0, 2.0**-6, -(2.0**-6), 0.0, 0.0])
    a, b = encode(rng.choice(big, (20, 512)), fa), encode(rng.choice(big, (30, 512)), fb)
    sa = np.exp2(rng.integers(-18, 3, (20, 4))).astype(np.float32)
    sb = np.exp2(rng.integers(-18, 3, (30, 4))).astype(np.float32)
    assert suit(a, sa, b, sb, *formats)
    assert agree(a, sa, b, sb, *formats)


@pytest.mark.parametrize(("sign", "expected"), [(1, 1 + 2.0**-23), (-1, 1 + 2.0**-23)])
def test_what_float64_loses_decides_between_two_float32(sign: int, expected: float) -> None:
    # acc = 1 + 2^-23, and 2^-24 (1 + 2^-15) (1 - 2^-15) = 2^-24 - 2^-54 is added or subtracted: in float64
    # the sum is the middle of two float32 values, of which the even one is wrong
    a, b = (np.zeros((40, 256), np.uint8) for _ in range(2))
    a[:, [0, 128, 129]] = encode([1.0, sign * 256.0, -sign * 1.0], FORMATS["e4m3"])
    b[:, [0, 128, 129]] = encode([1.0, 128.0, 1.0], FORMATS["e4m3"])
    sa = np.tile(np.array([1 + 2.0**-23, 2.0**-20 * (1 + 2.0**-15)], np.float32), (40, 1))
    sb = np.tile(np.array([1, 2.0**-19], np.float32), (40, 1))
    found = gemm.gemm_fp8(a, sa, b, sb, "promote_fp32")
    assert (found == np.float32(expected)).all()
    assert agree(a, sa, b, sb, "e4m3", "e4m3")


@pytest.mark.parametrize("formats", PAIRS)
def test_zeros_padding_and_zero_scales_agree(formats: tuple[str, str]) -> None:
    rng = np.random.default_rng(4)
    a, b = finite(rng, (9, 512), formats[0]), finite(rng, (17, 512), formats[1])
    a[:, 460:], b[:, 460:], a[2], b[3] = 0, 0, 0x80, 0
    a[:, 256:384] = b[:, 256:384] = 0
    sa, sb = scales(rng, (9, 4)), -scales(rng, (17, 4))
    sa[4], sb[5, 1] = 0, -0.0
    assert suit(a, sa, b, sb, *formats)
    assert agree(a, sa, b, sb, *formats)


def test_sums_of_e5m2_that_float64_cannot_hold_at_once_are_rounded_once() -> None:
    e5m2 = FORMATS["e5m2"]
    a, b = (np.zeros((1, 128), np.uint8) for _ in range(2))
    one = np.ones((1, 1), np.float32)
    # 2^30 + 64 is the middle of two float32 values, and 2^-32 decides
    for sign, expected in ((1.0, 2.0**30 + 128), (-1.0, 2.0**30), (0.0, 2.0**30)):
        a[0, :3] = encode([2.0**15, 8.0, sign * e5m2.smallest], e5m2)
        b[0, :3] = encode([2.0**15, 8.0, e5m2.smallest], e5m2)
        found = gemm.gemm_fp8(a, one, b, one, "promote_fp32", a_format="e5m2", b_format="e5m2")
        assert found[0, 0] == np.float32(expected)
        assert agree(a, one, b, one, "e5m2", "e5m2")


@pytest.mark.parametrize("formats", PAIRS)
def test_nan_and_infinities_agree(formats: tuple[str, str]) -> None:
    rng = np.random.default_rng(5)
    a = adversarial(rng, FORMATS[formats[0]], 10, 256)
    b = adversarial(rng, FORMATS[formats[1]], 12, 256)
    assert agree(a, scales(rng, (10, 2)), b, scales(rng, (12, 2)), *formats)


@pytest.mark.parametrize("scale", [1e-45, 1e-38, 1e-20, 3e38, np.inf, np.nan])
def test_scales_beyond_what_suits_agree(scale: float) -> None:
    rng = np.random.default_rng(6)
    a, b = finite(rng, (6, 256), "e4m3"), finite(rng, (7, 256), "e4m3")
    sa, sb = scales(rng, (6, 2)), scales(rng, (7, 2))
    sa[1, 0] = scale
    assert suit(a, sa, b, sb, "e4m3", "e4m3") == (scale == 3e38)
    assert agree(a, sa, b, sb, "e4m3", "e4m3")


def test_the_smallest_scales_that_suit_agree() -> None:
    rng = np.random.default_rng(7)
    for formats in PAIRS:
        a, b = finite(rng, (6, 256), formats[0]) & 0x87, finite(rng, (7, 256), formats[1]) & 0x87
        sa = (promoted.SMALLEST * rng.uniform(1, 2, (6, 2))).astype(np.float32)
        sb = (promoted.SMALLEST * rng.uniform(1, 2, (7, 2))).astype(np.float32)
        assert suit(a, sa, b, sb, *formats)
        assert agree(a, sa, b, sb, *formats)


def test_tiles_of_both_sizes_have_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(9)
    a, b = finite(rng, (150, 256), "e4m3"), finite(rng, (530, 256), "e4m3")
    given = (a, scales(rng, (150, 2)), b, scales(rng, (530, 2)), "e4m3", "e4m3")
    for width in (1, 2):
        monkeypatch.setattr(promoted.threads, "width", lambda width=width: width)
        assert agree(*given)


def test_large_products_run_in_parts_with_the_same_bits() -> None:
    rng = np.random.default_rng(8)
    a, b = finite(rng, (700, 256), "e4m3"), finite(rng, (520, 256), "e4m3")
    sa, sb = scales(rng, (700, 2)), scales(rng, (520, 2))
    assert promoted.SPLIT < 700 * 520 * 256
    assert agree(a, sa, b, sb, "e4m3", "e4m3")
