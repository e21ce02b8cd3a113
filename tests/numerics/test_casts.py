"""Casts against an H100's recordings, ml_dtypes and torch.  SPEC CAST-1 to CAST-3.

What was recorded, and by whom, is in recordings/h100/README.md.
"""

import hashlib
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from refimpl.errors import Invalid, Unsupported
from refimpl.numerics import formats
from refimpl.numerics.casts import CASTS, behaviour, cast, widen
from refimpl.numerics.formats import BF16, E4M3, E5M2, E5M6, FORMATS, UE8M0, Stochastic

RECORDINGS = Path(__file__).parents[1] / "recordings" / "h100"
RECORDED = load_file(RECORDINGS / "casts.safetensors")
META = json.loads((RECORDINGS / "casts.json").read_text())
NAMES = {"ptx_satfinite": "ptx", "torch": "torch-2.11"}
CHANGES = sorted(key for key in RECORDED if key.startswith("cp_"))
EIGHT = ["e4m3", "e5m2", "e4m3fnuz", "e5m2fnuz", "ue8m0"]
DTYPES = {
    "e4m3": "float8_e4m3fn",
    "e5m2": "float8_e5m2",
    "e4m3fnuz": "float8_e4m3fnuz",
    "e5m2fnuz": "float8_e5m2fnuz",
    "ue8m0": "float8_e8m0fnu",
}


def singles(patterns):
    return np.asarray(patterns, np.uint32).view(np.float32)


def random_patterns(n, seed=0):
    return singles(np.random.default_rng(seed).integers(0, 1 << 32, n, dtype=np.uint32))


def sixteen_bits():
    """All values of bf16 and all of fp16, in their own types' order."""
    codes = np.arange(1 << 16, dtype=np.uint16)
    return codes.view(ml_dtypes.bfloat16), codes.view(np.float16)


def sha256(array):
    return hashlib.sha256(array.tobytes()).hexdigest()


def recorded(key):
    """(behaviour, format) of a recording's name."""
    name, fmt = key.split("_", 1)[1].rsplit("_", 1)
    return NAMES[name], FORMATS["ue8m0" if fmt == "e8m0" else fmt]


def test_edges_by_hand():
    x = np.array(
        [448.0, 464.0, 464.1, -1e9, np.inf, -np.inf, np.nan, -np.nan, -0.0, 2.0**-10, 0.75 * 2.0**-9]
    )
    hand = {
        "ptx": [0x7E, 0x7E, 0x7E, 0xFE, 0x7E, 0xFE, 0x7F, 0x7F, 0x80, 0, 1],
        "torch-2.11": [0x7E, 0x7E, 0x7F, 0xFF, 0x7F, 0xFF, 0x7F, 0xFF, 0x80, 0, 1],
        "torch-2.13": [0x7E, 0x7E, 0x7E, 0xFE, 0x7E, 0xFE, 0x7F, 0xFF, 0x80, 0, 1],
        "ml_dtypes-0.6": [0x7E, 0x7E, 0x7F, 0xFF, 0x7F, 0xFF, 0x7F, 0xFF, 0x80, 0, 1],
        "saturate": [0x7E, 0x7E, 0x7E, 0xFE, 0x7E, 0xFE, 0x7F, 0x7F, 0x80, 0, 1],
        "format": [0x7E, 0x7E, 0x7F, 0xFF, 0x7F, 0xFF, 0x7F, 0x7F, 0x80, 0, 1],
    }
    for name, codes in hand.items():
        assert cast(x, E4M3, name).tolist() == codes, name
        assert cast(x.astype(np.float32), E4M3, name).tolist() == codes, name


@pytest.mark.parametrize("key", CHANGES)
def test_every_float32_pattern_casts_as_recorded(key):
    """The recording is a step function of the pattern, given where it changes; so is the cast.

    By its plain twin the cast depends on the upper 16 bits and on whether the lower are zero.  Each such
    class of patterns is an interval, and no recorded change lies inside of one: 2^17 classes are all.
    """
    name, fmt = recorded(key)
    first, codes = RECORDED[key] >> np.uint64(8), (RECORDED[key] & np.uint64(0xFF)).astype(np.uint8)
    upper = np.arange(1 << 16, dtype=np.uint64) << np.uint64(16)
    starts = np.stack([upper, upper + np.uint64(1)], -1).reshape(-1)
    ends = np.append(starts[1:] - np.uint64(1), np.uint64(0xFFFF_FFFF))
    assert np.isin(first, starts).all()
    expected = codes[np.searchsorted(first, starts, "right") - 1]
    for at in (starts, ends, (starts + ends) // np.uint64(2)):
        x = singles(at.astype(np.uint32))
        assert np.array_equal(cast(x, fmt, name), expected)
        with np.errstate(invalid="ignore"):
            assert np.array_equal(cast(x.astype(np.float64), fmt, name), expected)


@pytest.mark.parametrize("key", sorted(META["bf16_sha256"]))
def test_every_bf16_pattern_casts_as_recorded(key):
    name, fmt = recorded(f"bf16_{key}")
    x = singles(np.arange(1 << 16, dtype=np.uint32) << np.uint32(16))
    assert sha256(cast(x, fmt, name)) == META["bf16_sha256"][key]


@pytest.mark.parametrize("key", sorted(key for key in RECORDED if key.startswith("f32_") and key != "f32_x"))
def test_chosen_and_random_float32_cast_as_recorded(key):
    name, fmt = recorded(key)
    assert np.array_equal(cast(singles(RECORDED["f32_x"]), fmt, name), RECORDED[key])


@pytest.mark.parametrize("key", sorted(set(META["sha256_4M"]) - {"input"}))
def test_four_million_random_patterns_have_the_recorded_digest(key):
    name, fmt = recorded(f"f32_{key}")
    x = np.frombuffer(np.random.RandomState(1006).bytes(4 * 2**22), np.uint32)
    assert sha256(cast(singles(x), fmt, name)) == META["sha256_4M"][key]


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=["e4m3", "e5m2"])
def test_codes_widen_as_recorded_with_their_nan(fmt):
    made = widen(np.arange(256), fmt, "torch-2.11")
    assert np.array_equal(made.view(np.uint32), RECORDED[f"decode_{fmt.name}_f32"])


@pytest.mark.parametrize("row", CASTS.values(), ids=lambda row: f"{row.behaviour}-{row.format}")
def test_the_table_of_upper_bits_agrees_with_the_plain_cast(row):
    fmt, x = FORMATS[row.format], random_patterns(200_000, 1)
    with np.errstate(invalid="ignore"):
        wide = x.astype(np.float64)
    assert np.array_equal(cast(x, fmt, row.behaviour), cast(wide, fmt, row.behaviour))


@pytest.mark.parametrize("name", EIGHT)
def test_ml_dtypes_casts_so_on_16_bit_and_float32_patterns(name):
    fmt, dtype = FORMATS[name], getattr(ml_dtypes, DTYPES[name])
    for x in (*sixteen_bits(), random_patterns(10_000_000, 2)):
        with np.errstate(all="ignore"):
            expected = x.astype(dtype).view(np.uint8)
            given = x.astype(np.float32)
        assert np.array_equal(cast(given, fmt, "ml_dtypes-0.6"), expected)


def test_ml_dtypes_casts_so_to_bf16():
    x = random_patterns(1_000_000, 3)
    with np.errstate(all="ignore"):
        expected = x.astype(ml_dtypes.bfloat16).view(np.uint16)
    assert np.array_equal(cast(x, BF16, "ml_dtypes-0.6"), expected)


@pytest.mark.parametrize("name", EIGHT)
def test_ml_dtypes_widens_so(name):
    codes = np.arange(256, dtype=np.uint8)
    expected = codes.view(getattr(ml_dtypes, DTYPES[name])).astype(np.float32)
    assert np.array_equal(
        widen(codes, FORMATS[name], "ml_dtypes-0.6").view(np.uint32), expected.view(np.uint32)
    )


@pytest.mark.crosscheck
@pytest.mark.parametrize("name", EIGHT)
def test_torch_casts_so_on_16_bit_and_float32_patterns(name):
    torch = pytest.importorskip("torch")
    fmt, dtype = FORMATS[name], getattr(torch, DTYPES[name])
    codes = torch.from_numpy(np.arange(1 << 16, dtype=np.uint16).view(np.int16))
    given = [codes.view(torch.bfloat16), codes.view(torch.float16)]
    given.append(torch.from_numpy(random_patterns(10_000_000, 4)))
    for x in given:
        expected = x.to(dtype).view(torch.uint8).numpy()
        assert np.array_equal(cast(x.float().numpy(), fmt, "torch-2.13"), expected)


@pytest.mark.crosscheck
@pytest.mark.parametrize("name", EIGHT)
def test_torch_widens_so(name):
    torch = pytest.importorskip("torch")
    codes = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(codes).view(getattr(torch, DTYPES[name])).float().numpy().view(np.uint32)
    made = widen(codes, FORMATS[name], "torch-2.13").view(np.uint32)
    differ = np.flatnonzero(made != expected)
    assert differ.tolist() == ([0x7E, 0xFE] if name == "e5m2" else [])  # there the payload is kept


def test_versions_of_torch_differ_in_the_overflow_of_e4m3_only():
    x = random_patterns(1_000_000, 5)
    old, new = (cast(x, E4M3, f"torch-{version}") for version in ("2.11", "2.13"))
    differ = (np.abs(x) > 464) & ~np.isnan(x)
    assert np.array_equal(old != new, differ)
    assert np.array_equal(*(cast(x, E5M2, f"torch-{version}") for version in ("2.11", "2.13")))
    assert np.array_equal(*(cast(x, UE8M0, f"torch-{version}") for version in ("2.11", "2.13")))


def test_casts_take_other_roundings_and_wider_formats():
    x = np.array([1.0625, 1e6, -1e6, np.nan, 2.0**-20])
    assert cast(x, E4M3, "ptx", "zero").tolist() == [0x38, 0x7E, 0xFE, 0x7F, 0]
    assert cast(x, E4M3, "ptx", "away").tolist() == [0x39, 0x7E, 0xFE, 0x7F, 1]
    assert cast(x, E5M6, "saturate").tolist() == [0x3C4, 0x7BF, 0xFBF, 0x7E0, 1]
    drawn = cast(np.full(1000, 1.0625, np.float32), E4M3, "ptx", Stochastic(3, "x"))
    assert set(drawn.tolist()) == {0x38, 0x39}
    assert np.array_equal(drawn, formats.encode(np.full(1000, 1.0625), E4M3, Stochastic(3, "x")))


def test_shapes_are_kept():
    for shape in ((), (0,), (3, 0), (2, 3, 4)):
        assert cast(np.zeros(shape, np.float32), E4M3).shape == shape
        assert cast(np.zeros(shape), E4M3).shape == shape
    assert cast(np.ones((4, 6), np.float32).T[::2], E4M3).tolist() == [[0x38] * 4] * 3


def test_what_is_not_a_behaviour_or_not_a_float_is_refused():
    with pytest.raises(
        Invalid, match=r"behaviour of the cast is 'cuda', but it must be one of format, ml_dt"
    ):
        behaviour("cuda", E4M3)
    with pytest.raises(Unsupported, match=r"the cast ptx is to bf16, but it must be to one of e4m3, e5m2\.$"):
        cast(1.0, BF16, "ptx")
    with pytest.raises(Invalid, match=r"x has the type int64, but what is cast to e4m3 must be floats\.$"):
        cast(np.arange(3), E4M3)
    with pytest.raises(Invalid, match=r"codes have the value 256, but those of e4m3 must be 0 to 255\.$"):
        widen([256], E4M3)
