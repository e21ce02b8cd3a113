"""FP8 weights against a recorded checkpoint, and by their definition.  SPEC CKPT-9, CKPT-10.

What was recorded, and by whom, is in recordings/models/README.md.
"""

import dataclasses
import hashlib
import json
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import refimpl
from refimpl.checkpoint import DictWeights, Stored, VirtualWeights, check, fp8, open_file, open_folder
from refimpl.config import Choices, preset
from refimpl.errors import Invalid, Missing, Unreadable
from refimpl.numerics import formats, layouts
from refimpl.numerics.blockscale import BLOCK, QUANTISERS, Quantised, dequantise, quantise

RECORDING = Path(__file__).parents[1] / "recordings" / "models" / "H01_fp8"
IO = open_file(RECORDING / "io.safetensors")
DIGESTS = json.loads((RECORDING / "sha256.json").read_text())
KV_A = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"  # 576 x 192: partial blocks both ways
ROUNDINGS = ("float32", "bf16")

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
CONFIG = dataclasses.replace(preset("tiny-v3"), quantization_config=FP8)
ARRAYS = dict(VirtualWeights(CONFIG))
Q_A = "model.layers.0.self_attn.q_a_proj.weight"
POWERS = [row.name for row in QUANTISERS.values() if row.power]


def sha256(value, rounding):
    codes = value if rounding == "float32" else value.astype(ml_dtypes.bfloat16)
    return hashlib.sha256(np.ascontiguousarray(codes).tobytes()).hexdigest()


def with_fp8(**changes):
    """Weights in memory, one of them in FP8; changes replace tensors, None removes one."""
    made = quantise(ARRAYS[Q_A], "w_block")
    given = ARRAYS | {
        Q_A: Stored("F8_E4M3", made.codes.shape, made.codes),
        f"{Q_A}_scale_inv": made.scales,
    }
    given |= {f"{Q_A}{name}": array for name, array in changes.items()}
    return DictWeights(CONFIG, {name: array for name, array in given.items() if array is not None})


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_recorded_weight_dequantises_to_its_digest(rounding):
    _, weights = open_folder(RECORDING)
    weights = weights.with_fp8_rounding(rounding)
    digests = DIGESTS[f"dequant_{rounding.replace('float', 'f')}_sha256"]
    stored = {name for name in weights if weights.dtype(name) == "F8_E4M3"}
    assert stored == set(digests)
    for name, digest in digests.items():
        assert sha256(weights[name], rounding) == digest, name


@pytest.mark.parametrize("precision", ["exact", "float64"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_logits_and_loss_of_the_recorded_model_agree(rounding, precision):
    model = refimpl.load(RECORDING, precision, Choices(fp8_weights=rounding))
    result = model.forward(IO["input_ids"], labels=IO["input_ids"])
    recorded = f"{rounding.replace('float', 'f')}_dequant"
    expected = IO[f"{recorded}.logits"]
    assert np.abs(result.logits - expected).max() <= 1e-9 * np.abs(expected).max()
    assert abs(result.loss - IO[f"{recorded}.loss"][0]) <= 1e-9 * abs(result.loss)


@pytest.mark.parametrize(("recorded", "recipe"), [("plain", "ieee"), ("ue8m0", "ue8m0")])
def test_the_recorded_activation_quantises_so(recorded, recipe):
    """torch's emulation of the official kernels, with x / s by IEEE."""
    made = quantise(IO["gemm.x"], recipe)
    assert np.array_equal(made.codes, IO.codes(f"gemm.{recorded}.x_fp8"))
    assert np.array_equal(made.scales, IO[f"gemm.{recorded}.x_scale"])


@pytest.mark.parametrize("recorded", ["plain", "ue8m0"])
def test_the_recorded_product_is_that_of_the_dequantised_operands(recorded):
    x = Quantised(IO.codes(f"gemm.{recorded}.x_fp8"), IO[f"gemm.{recorded}.x_scale"])
    w = Quantised(IO.codes("gemm.w_fp8"), IO["gemm.w_scale_inv"], BLOCK)
    made = np.zeros((6, 200))
    for k in range(
        3
    ):  # 128 products at a time, then the scales: 200 rows are two blocks, the last a partial one
        part = slice(128 * k, 128 * (k + 1))
        scale = x.scales[:, k, None].astype(np.float64) * np.repeat(w.scales[:, k], 128)[:200]
        made += (
            formats.decode(x.codes[:, part], formats.E4M3)
            @ formats.decode(w.codes[:, part], formats.E4M3).T
            * scale
        )
    expected = IO[f"gemm.{recorded}.out_f64"]
    assert np.abs(made - expected).max() <= 1e-13 * np.abs(expected).max()


def test_a_model_loads_with_float32_by_default():
    default = refimpl.load(RECORDING, "float64").forward(IO["input_ids"]).logits
    assert np.array_equal(
        default,
        refimpl.load(RECORDING, "float64", Choices(fp8_weights="float32")).forward(IO["input_ids"]).logits,
    )
    rounded = refimpl.load(RECORDING, "float64", Choices(fp8_weights="bf16")).forward(IO["input_ids"]).logits
    assert 1e-3 < np.abs(default - rounded).max() < 0.1


def test_codes_and_scales_are_at_hand():
    _, weights = open_folder(RECORDING)
    q = weights.quantised(KV_A)
    assert (q.codes.dtype, q.codes.shape, q.scales.shape, q.tile) == (
        np.uint8,
        (576, 192),
        (5, 2),
        (128, 128),
    )
    assert np.array_equal(weights.codes(KV_A), q.codes)
    assert np.array_equal(weights.codes(f"{KV_A}_scale_inv"), q.scales)
    assert np.array_equal(weights[f"{KV_A}_scale_inv"], q.scales)
    assert np.array_equal(dequantise(q), weights[KV_A])
    assert weights.kind(f"{KV_A}_scale_inv") == "scale"
    assert f"{KV_A}_scale_inv" not in list(weights)


def test_the_scale_multiplies_in_spite_of_its_name():
    codes = np.full((48, 96), 0x38, np.uint8)  # 1.0
    weights = with_fp8(
        **{"": Stored("F8_E4M3", codes.shape, codes), "_scale_inv": np.array([[4]], np.float32)}
    )
    assert (weights[Q_A] == 4).all()


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(
    ("start", "count"), [(0, 1), (190, 400), (128 * 192 - 5, 10), (575 * 192, 192), (7, 0)]
)
def test_a_slice_is_a_part_of_the_dequantised_tensor(start, count, rounding):
    _, weights = open_folder(RECORDING)
    weights = weights.with_fp8_rounding(rounding)
    part = weights.slice(KV_A, start, count)
    assert np.array_equal(part, weights[KV_A].reshape(-1)[start : start + count])


def test_ue8m0_scales_are_read_as_powers_of_two():
    made = quantise(ARRAYS[Q_A], "w_block_ue8m0")
    codes = layouts.to_ue8m0(made.scales)
    weights = with_fp8(
        **{
            "": Stored("F8_E4M3", made.codes.shape, made.codes),
            "_scale_inv": Stored("F8_E8M0", codes.shape, codes),
        }
    )
    check(weights, values=True)
    assert np.array_equal(weights[Q_A], dequantise(made))
    assert np.array_equal(weights[f"{Q_A}_scale_inv"], made.scales)


def test_other_rounding_leaves_the_original_alone():
    weights = with_fp8()
    rounded = weights.with_fp8_rounding("bf16")
    assert weights.with_fp8_rounding("float32") is weights
    assert np.array_equal(rounded[Q_A], weights[Q_A].astype(ml_dtypes.bfloat16).astype(np.float32))
    assert (rounded[Q_A] != weights[Q_A]).any()


@pytest.mark.parametrize(
    ("recipe", "scales"),
    [("w_block", "F32"), ("w_block_ue8m0", "F32"), ("w_block_ue8m0", "F8_E8M0"), ("v32_ue8m0", "F8_E8M0")],
)
def test_a_written_checkpoint_is_read_again(tmp_path, recipe, scales):
    source = VirtualWeights(preset("tiny-v3"))
    fp8.write_folder(tmp_path, source, recipe, scales)
    config, weights = open_folder(tmp_path)
    check(weights, values=True)
    assert config.fp8_block == (128, 128)
    assert set(weights) == set(source)
    quantised = [name for name in weights if weights.dtype(name) == "F8_E4M3"]
    assert quantised == [name for name in source if f"{name}_scale_inv" in weights]
    assert len(quantised) > 10
    for name in source:
        if name in quantised:
            expected = quantise(source[name], recipe, (128, 128))
            assert np.array_equal(weights.codes(name), expected.codes)
            assert np.array_equal(weights[name], dequantise(expected))
            assert weights.dtype(f"{name}_scale_inv") == scales
        else:
            assert weights.dtype(name) == source.dtype(name)
            assert np.array_equal(weights[name], source[name])
    ids = np.arange(12).reshape(2, 6)
    near = refimpl.load(tmp_path, "float64").forward(ids).logits
    far = refimpl.load((source.config, source), "float64").forward(ids).logits
    assert 0 < np.abs(near - far).max() < 2 * np.abs(far).max()  # other weights, not another model


def test_a_recorded_checkpoint_with_power_of_two_scales_gives_the_logits_of_its_dequantised_weights(tmp_path):
    _, source = open_folder(RECORDING)
    fp8.write_folder(tmp_path, source, "w_block_ue8m0", "F8_E8M0")
    config, weights = open_folder(tmp_path)
    plain = {
        name: dequantise(weights.quantised(name)) for name in weights if weights.dtype(name) == "F8_E4M3"
    }
    plain |= {name: weights[name] for name in weights if name not in plain}
    ids = IO["input_ids"]
    read = refimpl.load(tmp_path, "exact").forward(ids).logits
    assert np.array_equal(read, refimpl.load((config, plain), "exact").forward(ids).logits)


def test_writing_twice_gives_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        fp8.write_folder(tmp_path / folder, VirtualWeights(preset("tiny-v3")))
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_opening_reads_no_weight():
    tracemalloc.start()
    _, weights = open_folder(RECORDING)
    check(weights)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 400_000 < (RECORDING / "model.safetensors").stat().st_size


WRONG = {
    "no scale": (
        {"_scale_inv": None},
        Missing,
        rf"tensor {Q_A}_scale_inv is missing, but {Q_A}, stored as F8_E4M3, must have it\.$",
    ),
    "wrong grid": (
        {"_scale_inv": np.ones((2, 1), np.float32)},
        Invalid,
        r"_scale_inv has shape \(2, 1\), but by the configuration it must have \(1, 1\)\.$",
    ),
    "wrong scale type": (
        {"_scale_inv": np.ones((1, 1), np.int32)},
        Invalid,
        r"_scale_inv is stored as I32, but it must be one of F32, F8_E8M0\.$",
    ),
    "scale that is no number": (
        {"_scale_inv": np.full((1, 1), np.nan, np.float32)},
        Invalid,
        r"_scale_inv has nan at \(0, 0\), but all values must be finite\.$",
    ),
    "code that is no number": (
        {"": Stored("F8_E4M3", (48, 96), np.full((48, 96), 0x7F, np.uint8))},
        Invalid,
        r"q_a_proj.weight has nan at \(0, 0\), but all values must be finite\.$",
    ),
    "codes of scales": (
        {"": Stored("F8_E8M0", (48, 96), np.zeros((48, 96), np.uint8))},
        Invalid,
        r"q_a_proj.weight is stored as F8_E8M0, but it must be one of F64, F32, F16, BF16\.$",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_in_one_sentence(case):
    changes, error, message = WRONG[case]
    weights = with_fp8(**changes)
    for use in (lambda: check(weights, values=True), lambda: weights[Q_A]):
        with pytest.raises(error, match=message):
            use()


def test_fp8_without_blocks_in_the_config_or_outside_of_linears_is_refused():
    codes = Stored("F8_E4M3", (48, 96), np.zeros((48, 96), np.uint8))
    weights = DictWeights(preset("tiny-v3"), ARRAYS | {Q_A: codes})
    with pytest.raises(
        Invalid, match=r"then the config must have a quantization_config with quant_method fp8\.$"
    ):
        check(weights)
    with pytest.raises(Invalid, match="then the config must have"):
        weights.quantised(Q_A)
    assert weights.codes(Q_A).shape == (48, 96)
    norm = "model.norm.weight"
    stored = Stored("F8_E4M3", ARRAYS[norm].shape, np.zeros(ARRAYS[norm].shape, np.uint8))
    with pytest.raises(
        Invalid, match=r"norm.weight is stored as F8_E4M3, but it must be one of F64, .* BF16\.$"
    ):
        check(DictWeights(CONFIG, ARRAYS | {norm: stored}))
    with pytest.raises(
        Invalid, match=r"norm.weight is stored as F32, but to have scales it must be F8_E4M3, "
    ):
        DictWeights(CONFIG, ARRAYS).quantised(norm)


def test_what_cannot_be_written_is_refused(tmp_path):
    source = VirtualWeights(preset("tiny-v3"))
    with pytest.raises(Invalid, match=r"the quantisation recipe is 'none', but it must be one of"):
        fp8.write_folder(tmp_path, source, "none")
    with pytest.raises(
        Invalid, match=r"stored as F8_E8M0, but those of w_block must be F32 \(its scales are no "
    ):
        fp8.write_folder(tmp_path, source, "w_block", "F8_E8M0")
    with pytest.raises(
        Invalid, match=r"stored as BF16, but those of w_block_ue8m0 must be F32 or F8_E8M0\.$"
    ):
        fp8.write_folder(tmp_path, source, "w_block_ue8m0", "BF16")
    with pytest.raises(Unreadable):
        fp8.write_folder(tmp_path / "absent", source)
    assert not list(tmp_path.iterdir())
