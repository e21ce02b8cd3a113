"""Roundings of the float32 carrier against their plain forms, bit for bit."""

import numpy as np
import pytest

from refimpl.numerics import rounded
from refimpl.numerics.formats import BF16, round_to


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (7, 11000)])
def test_nearest_bf16_is_the_plain_rounding(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    bits = np.asarray(rng.integers(0, 1 << 32, shape), np.uint32)
    ties = (bits & np.uint32(0xFFFF_0000)) | np.uint32(0x8000)  # halfway between two
    for some in (bits, ties, bits & np.uint32(0x807F_FFFF)):
        x = some.view(np.float32)
        with np.errstate(invalid="ignore"):  # signalling NaN
            expected = round_to(x, BF16).astype(np.float32)
        found = rounded.nearest_bf16(x)
        assert found.shape == x.shape
        assert ((found.view(np.uint32) == expected.view(np.uint32)) | np.isnan(x)).all()
        assert (found.view(np.uint32) == some)[np.isnan(x)].all()


def test_nearest_bf16_of_the_edges() -> None:
    x = np.array([np.inf, -np.inf, 3.4e38, -0.0, 1e-45, 1 + 2.0**-8, 1 + 3 * 2.0**-8], np.float32)
    expected = [np.inf, -np.inf, np.inf, -0.0, 0.0, 1.0, 1 + 2.0**-6]
    found = rounded.nearest_bf16(x[::-1])[::-1]  # not contiguous
    assert found.tolist() == expected
    assert np.signbit(found[3])
