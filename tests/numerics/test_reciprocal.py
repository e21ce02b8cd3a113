"""Hopper's reciprocal and the division made of it.  SPEC RCP-1, RCP-2."""

import hashlib
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from refimpl.numerics.reciprocal import _deltas, div_full, rcp

FOLDER = Path(__file__).parents[1] / "recordings" / "h100"
RECORDED = json.loads((FOLDER / "mufu_rcp.json").read_text())


def single(*values):
    return np.array(values, np.float32)


def test_the_package_has_the_recorded_table():
    assert hashlib.sha256(_deltas().tobytes()).hexdigest() == RECORDED["sha256"]


def test_every_fraction_is_off_by_at_most_one_unit_as_often_as_recorded():
    x = (np.arange(1 << 23, dtype=np.uint32) + np.uint32(127 << 23)).view(np.float32)
    off = rcp(x).view(np.int32).astype(np.int64) - (np.float32(1) / x).view(np.int32)
    assert np.bincount(off + 1).tolist() == RECORDED["counts"]
    deltas = np.stack([_deltas() >> np.uint8(2 * i) & 3 for i in range(4)], -1).reshape(-1)
    assert np.array_equal(off + 1, deltas)


def test_powers_of_two_only_move_the_exponent():
    rng = np.random.default_rng(0)
    x = rng.uniform(1, 2, 1000).astype(np.float32)
    for power in (-126, -60, -1, 1, 60, 124):
        moved = np.ldexp(rcp(x).astype(np.float64), -power).astype(np.float32)
        assert np.array_equal(rcp(np.ldexp(x, power)), moved)
        assert np.array_equal(rcp(-np.ldexp(x, power)), -moved)


def test_edges():
    with np.errstate(all="ignore"):
        made = rcp(single(0.0, -0.0, np.inf, -np.inf, 1e-40, -1e-40, 2.0**126, 1.5 * 2.0**126, 2.0**127))
    expected = single(np.inf, -np.inf, 0.0, -0.0, np.inf, -np.inf, 2.0**-126, 0.0, 0.0)
    assert made.tobytes() == expected.tobytes()
    assert rcp(single(np.nan)).view(np.uint32)[0] == 0x7FFF_FFFF


def test_division_is_multiplication_by_the_reciprocal_with_both_scaled_where_needed():
    rng = np.random.default_rng(1)
    x, s = (rng.uniform(1, 2, 1000).astype(np.float32) for _ in range(2))
    assert np.array_equal(div_full(x, s), x * rcp(s))
    assert (div_full(x, s) != x / s).any()
    large, small = np.ldexp(s, 127), np.ldexp(s, -140)
    assert np.array_equal(div_full(np.ldexp(x, 120), large), np.ldexp(x, 118) * rcp(np.ldexp(s, 125)))
    tiny = np.ldexp(x, -130)
    assert np.array_equal(div_full(tiny, small), tiny * np.float32(2**24) * rcp(small * np.float32(2**24)))
    edges = div_full(single(1.0, 0.0, np.inf, -1.0), single(np.inf, 0.0, np.inf, 0.0))
    assert edges[0] == 0
    assert np.isnan(edges[1:3]).all()
    assert edges[3] == -np.inf


def test_recorded_quotients_of_random_patterns_with_every_edge():
    recorded = load_file(FOLDER / "triton.safetensors")
    x, s, expected = (recorded[f"div_{name}"].view(np.float32) for name in "xsq")
    made = div_full(x, s)
    assert np.array_equal(np.isnan(made), np.isnan(expected))
    numbers = ~np.isnan(expected)
    assert np.array_equal(made[numbers].view(np.uint32), expected[numbers].view(np.uint32))
    sizes = np.abs(s)
    assert min((sizes < 2.0**-126).sum(), (sizes > 2.0**126).sum()) > 1000
