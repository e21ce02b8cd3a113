"""Claims: what a precision allows."""

import numpy as np
import pytest

from refimpl.cases.claims import CLAIMS, claim
from refimpl.errors import Invalid


@pytest.mark.parametrize(("name", "dtype"), [("fp32", np.float32), ("fp16", np.float16)])
def test_ulps_are_the_spacing_of_the_format(name, dtype):
    values = np.array([1.0, 1.5, 2.0, 1000.0, 3e-5, 6e-8]).astype(dtype)
    assert np.array_equal(CLAIMS[name].ulp(values), np.spacing(values).astype(np.float64))


def test_bf16_has_eight_bits():
    assert CLAIMS["bf16"].ulp(1.0) == 2.0**-7
    assert CLAIMS["bf16"].storage == 2.0**-8


def test_a_custom_claim_has_one_roundoff_for_everything():
    assert claim("u=2^-11").roundoffs == (2.0**-11,) * 3
    assert claim("u=0.0005").roundoffs == (0.0005,) * 3


@pytest.mark.parametrize("text", ["fp64", "u=", "u=2^11", "u=2^-99", "u=1e9", "u=..", "", "u=2^-11\n"])
def test_other_texts_are_refused(text):
    with pytest.raises(Invalid, match="the claim is"):
        claim(text)


def test_fp8_is_a_claim_that_no_case_of_numbers_offers():
    assert claim("fp8").name == "fp8"
    assert "fp8" not in CLAIMS
