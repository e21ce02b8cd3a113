"""Weights as a mapping: what it knows, and what it refuses before any computation.  SPEC CKPT-5."""

import dataclasses

import numpy as np
import pytest

from refimpl.checkpoint import DictWeights, Stored, VirtualWeights, check
from refimpl.config import preset
from refimpl.errors import Invalid, Missing, Unsupported

CONFIG = preset("tiny-v3-mtp")
ARRAYS = dict(VirtualWeights(CONFIG))
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
GATE = "model.layers.1.mlp.gate.weight"


def weights(**changes):
    given = ARRAYS | {name.replace("__", "."): array for name, array in changes.items()}
    return DictWeights(CONFIG, {name: array for name, array in given.items() if array is not None})


def changed(name, index, value):
    array = ARRAYS[name].copy()
    array[index] = value
    return DictWeights(CONFIG, ARRAYS | {name: array})


def test_a_mapping_of_every_parameter_once():
    w = weights()
    check(w)
    assert list(w) == list(ARRAYS)
    assert len(w) == len(ARRAYS)
    assert w.kind(BIAS) == "buffer"
    assert w.kind(GATE) == "param"
    assert w.shape(GATE) == (16, 96)
    assert w.dtype(GATE) == "F32"
    assert not w.unknown
    assert not w.ignored


def test_an_alias_gives_its_parameter():
    w = weights()
    name = "model.layers.2.shared_head.head.weight"
    assert name in w
    assert name not in list(w)
    assert w.canonical(name) == "lm_head.weight"
    assert w[name] is w["lm_head.weight"]


def test_stored_codes_decode():
    w = DictWeights(CONFIG, ARRAYS | {GATE: Stored.bf16(ARRAYS[GATE])})
    check(w)
    assert w.dtype(GATE) == "BF16"
    assert w.codes(GATE).dtype == np.uint16
    assert np.array_equal(w[GATE], ARRAYS[GATE])


def test_unknown_and_ignored_names_are_told_apart():
    w = DictWeights(
        CONFIG,
        ARRAYS | {"extra": np.zeros(1), "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(1)},
    )
    check(w)
    assert w.unknown == ("extra",)
    assert w.ignored == ("model.layers.0.self_attn.rotary_emb.inv_freq",)
    assert "extra" not in w
    with pytest.raises(Missing, match="tensor extra is unknown"):
        w["extra"]


def test_a_missing_tensor_is_named_and_the_others_counted():
    given = {name: array for name, array in ARRAYS.items() if not name.startswith("model.layers.0.self_attn")}
    w = DictWeights(CONFIG, given)
    with pytest.raises(
        Missing, match=r"tensor model\.layers\.0\.self_attn\.q_a_proj\.weight and 6 more are missing"
    ):
        check(w)
    with pytest.raises(Missing, match="q_a_proj"):
        w["model.layers.0.self_attn.q_a_proj.weight"]


def test_mtp_modules_may_be_left_out_as_a_whole_only():
    main = {name: array for name, array in ARRAYS.items() if not name.startswith("model.layers.2.")}
    check(DictWeights(CONFIG, main))
    assert not DictWeights(CONFIG, main).has_mtp
    part = main | {"model.layers.2.enorm.weight": ARRAYS["model.layers.2.enorm.weight"]}
    with pytest.raises(Missing, match=r"tensor model\.layers\.2\.hnorm\.weight and"):
        check(DictWeights(CONFIG, part))


def test_a_misshapen_tensor_is_named():
    w = DictWeights(CONFIG, ARRAYS | {GATE: ARRAYS[GATE].T})
    for use in (lambda: check(w), lambda: w[GATE]):
        with pytest.raises(
            Invalid, match=r"mlp\.gate\.weight has shape \(96, 16\), but .* must have \(16, 96\)\."
        ):
            use()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_first_value_that_is_not_finite_is_named(value):
    w = changed(GATE, (3, 5), value)
    words = rf"tensor {GATE} has {value} at \(3, 5\), but all values must be finite\."
    with pytest.raises(Invalid, match=words):
        check(w)
    with pytest.raises(Invalid, match=words):
        w[GATE]
    with pytest.raises(Invalid, match=r"correction_bias has .* at 2,"):
        check(changed(BIAS, 2, value))


@pytest.mark.parametrize("array", [np.zeros((16, 96), np.int64), np.zeros((16, 96), bool)])
def test_a_tensor_of_integers_is_refused(array):
    with pytest.raises(Invalid, match=r"is stored as (I64|BOOL), but it must be one of F64, F32, F16, BF16"):
        check(DictWeights(CONFIG, ARRAYS | {GATE: array}))


def test_a_copy_that_differs_is_refused():
    copy = ARRAYS["lm_head.weight"].copy()
    name = "model.layers.2.shared_head.head.weight"
    check(DictWeights(CONFIG, ARRAYS | {name: copy}))
    copy[1, 2] += 1
    with pytest.raises(Invalid, match=r"shared_head\.head\.weight differs from lm_head\.weight"):
        check(DictWeights(CONFIG, ARRAYS | {name: copy}))
    with pytest.raises(Invalid, match=r"shared_head\.head\.weight has shape"):
        check(DictWeights(CONFIG, ARRAYS | {name: copy[:3]}))


def test_sparse_attention_is_unsupported():
    with pytest.raises(Unsupported, match="deepseek_v32"):
        check(VirtualWeights(preset("deepseek-v3.2")))


def test_a_tied_head_is_the_embedding():
    config = dataclasses.replace(preset("tiny-v3"), tie_word_embeddings=True)
    w = VirtualWeights(config)
    check(w)
    assert np.array_equal(w["lm_head.weight"], w["model.embed_tokens.weight"])
    assert "lm_head.weight" not in list(w)


def test_complex_steps_pass_through():
    w = DictWeights(CONFIG, ARRAYS | {GATE: ARRAYS[GATE].astype(np.complex128)})
    check(w)
    assert w[GATE].dtype == np.complex128
