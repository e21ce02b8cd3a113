"""Block scales against an H100's recordings, and by their definition.  SPEC SCALE-1 to SCALE-6."""

import hashlib
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from refimpl.errors import Invalid
from refimpl.numerics import blockscale, formats
from refimpl.numerics.blockscale import (
    ACTIVATION,
    BLOCK,
    QUANTISERS,
    TRANSPOSED,
    Quantised,
    dequantise,
    quantise,
    requantise,
)
from refimpl.numerics.casts import cast
from refimpl.numerics.formats import BF16, E4M3, E5M6, FORMATS

RECORDINGS = Path(__file__).parents[1] / "recordings" / "h100"
RECORDED = load_file(RECORDINGS / "actquant.safetensors")
TRITON = load_file(RECORDINGS / "triton.safetensors")
DIGESTS = json.loads((RECORDINGS / "actquant.json").read_text())["sha256"]
PATHS = sorted(key.removesuffix("_y") for key in DIGESTS if key.endswith(("_bf16_y", "_f32_y")))
POWERS = [row.name for row in QUANTISERS.values() if row.power]
OTHERS = [name for name in QUANTISERS if name not in POWERS]


def sha256(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def given(kind):
    if kind == "bf16":
        return (RECORDED["x_bf16"].astype(np.uint32) << np.uint32(16)).view(np.float32)
    return RECORDED["x_f32"].view(np.float32)


def normal(shape, seed=0, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def test_the_recordings_are_of_every_recipe():
    names = {path.rsplit("_", 1)[0] for path in PATHS} | {"w_block", "w_block_ue8m0"}
    assert names == set(QUANTISERS)


@pytest.mark.parametrize("path", PATHS)
def test_every_recorded_tile_has_its_scale_and_codes(path):
    recipe, kind = path.rsplit("_", 1)
    made = quantise(given(kind), recipe)
    scales = RECORDED[f"{path}_s"].view(np.float32)[:, None]
    assert np.array_equal(made.scales, scales, equal_nan=True)
    edges = RECORDED[f"{path}_y_edges"]
    assert np.array_equal(made.codes[: len(edges)], edges)
    assert sha256(made.codes) == DIGESTS[f"{path}_y"]


@pytest.mark.parametrize("recipe", ["w_block", "w_block_ue8m0"])
def test_recorded_weights_have_their_scales_and_codes(recipe):
    made = quantise(RECORDED["w_f32"].view(np.float32), recipe)  # 192 rows: a partial block
    assert np.array_equal(made.scales.view(np.uint32), RECORDED[f"{recipe}_s"])
    assert sha256(made.codes) == DIGESTS[f"{recipe}_y"]


def test_recorded_weights_dequantise_so():
    value = dequantise(quantise(RECORDED["w_f32"].view(np.float32), "w_block"))
    assert sha256(value) == DIGESTS["w_dequant_f32"]
    assert sha256(cast(value, BF16, "torch-2.11")) == DIGESTS["w_dequant_bf16"]


@pytest.mark.parametrize("recipe", ["triton_v3", "triton_v3_ue8m0"])
def test_tiles_of_all_sizes_and_random_patterns_are_as_triton_made_them(recipe):
    made = quantise(TRITON["x_f32"].view(np.float32), recipe)
    scales = TRITON[f"{recipe}_s"].view(np.float32)[:, None]
    assert np.array_equal(made.scales, scales, equal_nan=True)
    assert np.array_equal(made.codes, TRITON[f"{recipe}_y"])


def test_powers_of_two_by_log2_begin_where_the_library_begins_them():
    """Recorded over all normal float32: in each binade the last fraction whose logarithm rounds down."""
    last = TRITON["log2_last_down"].astype(np.int64)
    for e in range(1, 255):
        fraction = np.array([0, last[e - 1], last[e - 1] + 1, 1000, (1 << 23) - 1])
        s = ((e << 23) + fraction).astype(np.uint32).view(np.float32)
        with np.errstate(over="ignore"):
            made = blockscale._log2(s).view(np.uint32) >> np.uint32(23)
        assert made.tolist() == [e, e, e + 1, e + 1, e + 1]


def test_one_tile_by_hand():
    x = np.zeros((1, 128), np.float32)
    x[0, :4] = [896.0, -3.0, 1.0, 0.001]
    made = quantise(x, "ieee")
    assert made.scales.tolist() == [[2.0]]
    assert made.codes[0, :5].tolist() == [0x7E, 0xBC, 0x30, 0, 0]
    assert dequantise(made)[0, :4].tolist() == [896.0, -3.0, 1.0, 0.0]


@pytest.mark.parametrize("recipe", QUANTISERS)
def test_a_zero_tile(recipe):
    x = np.zeros((1, 128), np.float32)
    x[0, 5] = -0.0
    made = quantise(x, recipe, ACTIVATION)
    if recipe == "noclamp":
        assert made.scales[0, 0] == 0
        assert (made.codes == 0x7F).all()
        return
    expected = 2.0**-22 if recipe in POWERS else np.uint32(0x346F_ACAD).view(np.float32)
    assert made.scales[0, 0] == expected
    assert made.codes[0, 5] == 0x80
    assert not np.delete(made.codes[0], 5).any()


def plain(x, name, tile):
    """A tile at a time in float32, for the recipes that divide, without their edges."""
    row, (height, width) = QUANTISERS[name], tile
    codes, scales = np.zeros(x.shape, np.uint8), np.zeros(blockscale.grid(x.shape, tile), np.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width))
            a = max(float(np.abs(x[part]).max()), float(np.float32(row.floor or 0)))
            s = np.float32(a) / np.float32(448)
            if row.scale == "inverse":
                s = np.float32(a) * (np.float32(1) / np.float32(448))
            if row.power:
                s = np.float32(2.0 ** math.ceil(math.log2(s)))
            scales[i, j] = s
            q = x[part] / s if row.quotient == "divide" else x[part] * (np.float32(1) / s)
            codes[part] = formats.encode(np.clip(q.astype(np.float64), -448, 448), E4M3)
    return codes, scales


@pytest.mark.parametrize("tile", [ACTIVATION, TRANSPOSED, BLOCK, (3, 5)], ids=str)
@pytest.mark.parametrize("name", ["ieee", "deepgemm_sat", "torch_dg", "v32_ue8m0", "torch_dg_ue8m0"])
def test_tiles_of_all_shapes_and_partial_ones_agree_with_a_loop(name, tile):
    for shape in ((576, 200), (1, 1), (130, 257)):
        x = normal(shape, 1) * np.exp2(normal((1, shape[1]), 2) * 4).astype(np.float32)
        made = quantise(x, name, tile)
        codes, scales = plain(x, name, tile)
        assert np.array_equal(made.scales, scales)
        assert np.array_equal(made.codes, codes)


def test_a_partial_block_is_the_block_padded_with_zeros():
    x = normal((576, 300), 3)
    padded = np.zeros((640, 384), np.float32)
    padded[:576, :300] = x
    made, full = quantise(x, "w_block"), quantise(padded, "w_block")
    assert made.scales.shape == (5, 3)
    assert np.array_equal(made.scales, full.scales)
    assert np.array_equal(made.codes, full.codes[:576, :300])


def test_the_block_size_of_the_work_does_not_matter(monkeypatch):
    x = normal((300, 384), 4)
    whole = quantise(x, "triton_v3")
    monkeypatch.setattr(blockscale, "_PART", 1)
    parts = quantise(x, "triton_v3")
    assert np.array_equal(whole.codes, parts.codes)
    assert np.array_equal(whole.scales, parts.scales)
    assert np.array_equal(dequantise(whole), dequantise(parts))


@pytest.mark.parametrize("recipe", POWERS)
def test_power_of_two_scales_are_the_least_that_do_not_overflow(recipe):
    x = normal((64, 256), 5, 37.0)
    made = quantise(x, recipe, ACTIVATION)
    part, _ = np.frexp(made.scales)
    assert (part == 0.5).all()
    amax = np.abs(x).reshape(64, 2, 128).max(-1)
    assert (amax <= made.scales * 448).all()
    assert (amax > made.scales * 224).all()


def test_scales_by_bits_and_by_log2_differ_just_above_a_power_of_two_only():
    # RN(a / 448) is 2^k (1 + j 2^-23); log2f rounds 1.4427 j units of 2^-23 down to k if |k| is large enough
    for k, least in ((-1, 1), (3, 1), (6, 2), (-12, 3), (-16, 3), (-17, 6), (12, 3), (20, 6)):
        j = np.arange(0, 40)
        s = ((k + 127 << 23) + j).astype(np.uint32).view(np.float32)
        by_bits, by_log2 = blockscale._bits(s), blockscale._log2(s)
        assert (by_bits == np.where(j == 0, 2.0**k, 2.0 ** (k + 1))).all()
        exact = [
            k if j == 0 or np.float32(k + math.log2(1 + j * 2.0**-23)) <= k else k + 1 for j in range(40)
        ]
        assert (by_log2 == 2.0 ** np.array(exact)).all()
        assert exact.index(k + 1) == least, (k, exact)
    s = np.abs(normal(10_000, 6)) + np.float32(1e-6)
    assert np.array_equal(blockscale._bits(s), blockscale._log2(s))


@pytest.mark.parametrize("recipe", POWERS)
def test_requantising_powers_of_two_is_exact_above_underflow(recipe):
    x = normal((256, 256), 7) * np.exp2(normal((256, 256), 8) * 3).astype(np.float32)
    rows = quantise(x, recipe, ACTIVATION)
    columns = requantise(rows, recipe)
    assert columns.tile == TRANSPOSED
    before, after = dequantise(rows), dequantise(columns)
    step = np.repeat(columns.scales, 128, axis=0) * np.float32(2.0**-9)
    normal_there = np.abs(before) >= step * 8
    assert np.array_equal(before[normal_there], after[normal_there])
    assert (np.abs(before - after) <= step / 2).all()
    assert (before != after).any()  # underflow does happen here


def test_requantising_other_scales_rounds_again():
    x = normal((256, 128), 9)
    rows = quantise(x, "ieee")
    assert (dequantise(rows) != dequantise(requantise(rows, "ieee"))).mean() > 0.5


def test_quantising_the_transposed_matrix_is_the_transposed_quantisation():
    x = normal((256, 384), 10)
    made, other = quantise(x, "ieee", TRANSPOSED).transposed, quantise(x.T, "ieee")
    assert made.tile == ACTIVATION
    assert np.array_equal(made.codes, other.codes)
    assert np.array_equal(made.scales, other.scales)


def test_nan_and_infinity_by_recipe():
    x = normal((3, 128), 11)
    x[0, 3], x[1, 3], x[2] = np.nan, -np.inf, np.nan
    made = {name: quantise(x, name, ACTIVATION) for name in QUANTISERS}
    clean = quantise(np.nan_to_num(x[:1]), "ieee")
    ieee = made["ieee"]
    assert ieee.codes[0, 3] == 0x7F
    assert np.array_equal(np.delete(ieee.codes[0], 3), np.delete(clean.codes[0], 3))
    assert np.isinf(ieee.scales[1, 0])
    assert ieee.codes[1, 3] == 0x7F
    assert not np.delete(ieee.codes[1] & 0x7F, 3).any()
    assert ieee.scales[2, 0] == np.uint32(0x346F_ACAD).view(np.float32)
    assert made["v32"].codes[0, 3] == 0xFE  # the clamp makes it -448
    assert np.isnan(made["noclamp"].scales[2, 0])
    assert np.isnan(made["torch_dg"].scales[0, 0])
    assert (made["torch_dg"].codes[0] == 0x7F).all()
    assert (made["torch_dg_ue8m0"].scales[:, 0] == 2.0**127).all()


@pytest.mark.parametrize("name", ["e5m2", "e5m6", "e5m6fn", "e4m3fnuz", "e5m2fnuz"])
def test_other_formats_use_their_own_range(name):
    fmt = FORMATS[name]
    x = normal((8, 256), 12)
    for recipe in ("ieee", "ue8m0", "triton_v3"):
        made = quantise(x, recipe, fmt=fmt)
        assert made.codes.dtype == fmt.code_type
        top = np.abs(formats.decode(made.codes, fmt)).reshape(8, 2, 128).max(-1)
        if recipe == "ue8m0":
            assert (top > fmt.largest / 2 * (1 - fmt.roundoff)).all()
        else:
            assert (top == fmt.largest).all()
        error = np.abs(dequantise(made) - x)
        # half a unit of each value, and a little for the inexact scale
        bound = np.maximum(
            np.abs(x) * fmt.roundoff * 1.01, np.repeat(made.scales, 128, 1) * fmt.smallest * 0.51
        )
        assert (error <= bound).all()


def test_dequantising_rounds_once():
    rng = np.random.default_rng(13)
    codes = rng.integers(0, 0x7F, (4, 256)).astype(np.uint8)
    scales = rng.uniform(1e-6, 1e-3, (4, 2)).astype(np.float32)
    made = dequantise(Quantised(codes, scales))
    for i, j in ((0, 0), (1, 130), (3, 255), (2, 64)):
        exact = Fraction(float(formats.decode(codes[i, j], E4M3))) * Fraction(float(scales[i, j // 128]))
        assert made[i, j] == np.float32(float(exact))  # 28 bits: exact in float64


def test_input_of_other_types_is_that_of_float32():
    x = normal((4, 128), 14)
    halves = x.astype(np.float16)
    for given_ in (x.astype(np.float64), np.asfortranarray(x), x[::-1][::-1]):
        assert np.array_equal(quantise(given_, "ieee").codes, quantise(x, "ieee").codes)
    assert np.array_equal(quantise(halves, "ieee").codes, quantise(halves.astype(np.float32), "ieee").codes)


def test_empty_matrices():
    for shape in ((0, 256), (3, 0)):
        made = quantise(np.zeros(shape, np.float32), "ieee")
        assert made.codes.shape == shape
        assert made.scales.shape == (shape[0], shape[1] // 128)
        assert dequantise(made).shape == shape


def test_what_does_not_fit_is_refused():
    x = np.zeros((2, 200), np.float32)
    with pytest.raises(Invalid, match=r"recipe is 'fast', but it must be one of ieee, .*w_block_ue8m0\.$"):
        quantise(x, "fast")
    with pytest.raises(
        Invalid, match=r"x is float32 \(200,\), but what is quantised must be floats \(R, C\)\.$"
    ):
        quantise(x[0], "ieee")
    with pytest.raises(Invalid, match=r"x is int64 \(2, 2\), but what is quantised must be floats"):
        quantise(np.zeros((2, 2), np.int64), "ieee")
    with pytest.raises(Invalid, match=r"the tile is \(0, 128\), but it must be two positive sizes\.$"):
        quantise(x, "ieee", (0, 128))
    with pytest.raises(
        Invalid,
        match=r"scales have shape \(2, 1\), but those of \(2, 200\) in tiles of 1x128 must have \(2, 2\)\.$",
    ):
        Quantised(np.zeros((2, 200), np.uint8), np.zeros((2, 1), np.float32))
    with pytest.raises(Invalid, match=r"codes have the value 4096, but those of e5m6 must be 0 to 4095\.$"):
        dequantise(Quantised(np.full((1, 1), 4096, np.uint16), np.ones((1, 1), np.float32), ACTIVATION, E5M6))
    with pytest.raises(Invalid, match=r"scales have the type float64, but they must be float32\.$"):
        Quantised(np.zeros((2, 200), np.uint8), np.zeros((2, 2)))


@pytest.mark.parametrize("recipe", ["ieee", "noclamp", "torch_dg"])
@pytest.mark.parametrize("tile", [(1, 128), (128, 1), (128, 128), (1, 1), (4, 3), (500, 500)])
@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (131, 259), (5, 300), (300, 5)])
def test_every_tile_has_the_scale_that_it_has_alone(recipe, tile, shape):
    x = normal(shape, 5)
    specials = np.array([0x7FC00000, 0xFF800001, 0x7F800000, 0x80000000, 1], np.uint32).view(np.float32)
    for i, value in enumerate(specials):
        x.reshape(-1)[i * 7 % x.size] = value
    row = QUANTISERS[recipe]
    found = blockscale.tile_scales(x, row, tile)
    for i in range(found.shape[0]):
        for j in list(range(min(found.shape[1], 6))) + [-1]:
            at = range(found.shape[1])[j]
            part = x[i * tile[0] : (i + 1) * tile[0], at * tile[1] : (at + 1) * tile[1]]
            alone = blockscale.tile_scales(part.reshape(1, -1), row, (1, part.size))
            assert np.array_equal(found[i, j], alone[0, 0], equal_nan=True)
            if not np.isnan(part).any():
                largest = max([abs(float(v)) for v in part.reshape(-1)])
                assert alone[0, 0] == blockscale.tile_scales(np.array([[largest]], np.float32), row, (1, 1))
