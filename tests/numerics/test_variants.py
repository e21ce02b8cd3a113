"""The plain variants, with the hardware's own parameters, are the hardware."""

import adversary
import numpy as np
import pytest

from refimpl.numerics import tensorcore, variants
from refimpl.numerics.formats import FORMATS
from refimpl.numerics.variants import Variant

HALF = Variant("hopper", "", 16, 25, 23, -133)
KINDS = {
    "bf16": (HALF, tensorcore.wgmma_bf16),
    "fp16": (HALF, tensorcore.wgmma_fp16),
    "e4m3": (Variant("hopper", "", 32, 13, 13), tensorcore.wgmma_fp8),
}


def _finite(codes, fmt):
    return np.where((codes & (fmt.sign - 1)) > fmt.top, fmt.code_type.type(0), codes).astype(fmt.code_type)


@pytest.mark.parametrize("name", list(KINDS))
def test_the_parameters_of_hopper_give_its_bits(name):
    variant, instruction = KINDS[name]
    fmt, rng = FORMATS[name], np.random.default_rng(5)
    a, b = (_finite(adversary.codes(rng, fmt, rows, 64), fmt) for rows in (40, 20))
    if name == "bf16":  # without overflow, which the variants do not model
        a, b = (np.where((x >> 7 & 0xFF) > 160, x & 0x807F, x).astype(np.uint16) for x in (a, b))
    c = adversary.accumulators(rng, 40, 20)
    c = np.where(np.abs(c) < 2.0**100, c, np.float32(0)).astype(np.float32)
    found = variants.multiply(a, b, c, fmt, fmt, variant)
    assert np.array_equal(found.view(np.uint32), instruction(a, b, c).view(np.uint32))


def test_sequential_and_wide_sums_of_integers_are_the_sum():
    rng, fmt = np.random.default_rng(6), FORMATS["e4m3"]
    a, b = (rng.integers(0x40, 0x58, (6, 64)).astype(np.uint8) for _ in range(2))
    c = rng.integers(-50, 50, (6, 6)).astype(np.float32)
    exact = tensorcore.values(a, fmt) @ tensorcore.values(b, fmt).T + c
    assert np.array_equal(variants.sequential(a, b, c, fmt, fmt), exact)
    assert np.array_equal(variants.wide(a, b, c, fmt, fmt), exact)


def test_changes_are_made_to_the_base_and_named():
    (row,) = variants.variants(HALF, {"x": ("text", {"fraction": 24})})
    assert (row.name, row.text, row.fraction, row.products) == ("x", "text", 24, 16)


@pytest.mark.parametrize(
    ("change", "values", "result"),
    [
        ({"fraction": 24}, {0: 1.0, 1: 2.0**-24, 2: 2.0**-24}, 1 + 2.0**-23),
        ({"fraction": 23}, {0: 1.0, 1: 2.0**-24, 2: 2.0**-24}, 1.0),
        ({"store": "nearest"}, {0: 1.0, 1: 2.0**-24, 2: 2.0**-25}, 1 + 2.0**-23),
        ({}, {0: 1.0, 1: 2.0**-24, 2: 2.0**-25}, 1.0),
        ({"products": 8}, {0: 2.0**10, 1: -(2.0**10), 8: 2.0**-16}, 2.0**-16),
        ({}, {0: 2.0**10, 1: -(2.0**10), 8: 2.0**-16}, 0.0),
    ],
)
def test_each_change_does_what_it_says(change, values, result):
    (row,) = variants.variants(HALF, {"x": ("", change)})
    x = np.zeros((1, 16))
    for at, value in values.items():
        x[0, at] = value
    a = (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    b = np.full((1, 16), 0x3F80, np.uint16)
    fmt = FORMATS["bf16"]
    assert variants.multiply(a, b, np.zeros((1, 1), np.float32), fmt, fmt, row)[0, 0] == result
