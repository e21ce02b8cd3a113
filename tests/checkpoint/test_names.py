"""Names, shapes and kinds, held to the published numbers.  SPEC CKPT-4."""

import dataclasses
import math

import pytest

from refimpl.checkpoint import aliases, parameters, trainable
from refimpl.checkpoint.names import BIAS, known_and_ignored, mtp_layers
from refimpl.config import preset


def count(config):
    specs = parameters(config).values()
    return sum(math.prod(spec.shape) for spec in specs if spec.kind != "scale" and not spec.mtp)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("deepseek-v2-lite", 15_706_484_224),
        ("deepseek-v2", 235_741_434_880),
        ("deepseek-v3", 671_026_419_200),
        ("deepseek-v3.2", 671_877_944_064),
        ("kimi-k2", 1_026_408_232_448),
    ],
)
def test_the_parameters_are_as_many_as_published(name, published):
    assert count(preset(name)) == published


def test_v3_has_the_tensors_and_the_bytes_of_the_published_listing():
    config = preset("deepseek-v3")
    specs, copies = parameters(config), aliases(config)
    assert len(specs) + len(copies) == 91_991
    width = {"scale": 4, "buffer": 4}
    size = sum(
        math.prod(spec.shape) * (1 if f"{name}_scale_inv" in specs else width.get(spec.kind, 2))
        for name, spec in specs.items()
    )
    size += sum(2 * math.prod(specs[target].shape) for target in copies.values())
    assert size == 688_574_839_360


def test_shapes_by_hand():
    specs = parameters(preset("deepseek-v3"))
    layer = "model.layers.3."
    assert specs["model.embed_tokens.weight"].shape == (129280, 7168)
    assert specs[layer + "self_attn.q_b_proj.weight"].shape == (24576, 1536)
    assert specs[layer + "self_attn.kv_a_proj_with_mqa.weight"].shape == (576, 7168)
    assert specs[layer + "self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (5, 56)
    assert specs[layer + "self_attn.kv_b_proj.weight"].shape == (32768, 512)
    assert specs[layer + "self_attn.o_proj.weight"].shape == (7168, 16384)
    assert specs[layer + "mlp.gate.weight"].shape == (256, 7168)
    assert specs[layer + "mlp.experts.255.down_proj.weight"].shape == (7168, 2048)
    assert specs[layer + "mlp.shared_experts.up_proj.weight"].shape == (2048, 7168)
    assert specs["model.layers.0.mlp.gate_proj.weight"].shape == (18432, 7168)
    assert specs["model.layers.61.eh_proj.weight"].shape == (7168, 14336)


def test_the_selection_bias_is_a_buffer_of_noaux_tc_only():
    v3, v2 = parameters(preset("tiny-v3")), parameters(preset("tiny-v2"))
    assert v3[f"model.layers.1.{BIAS}"].kind == "buffer"
    assert f"model.layers.1.{BIAS}" not in v2
    assert f"model.layers.0.{BIAS}" not in v3


def test_without_a_query_latent_there_is_one_projection():
    specs = parameters(preset("tiny-v3-noq"))
    assert specs["model.layers.0.self_attn.q_proj.weight"].shape == (4 * 88, 96)
    assert "model.layers.0.self_attn.q_a_proj.weight" not in specs


def test_without_shared_experts_there_are_no_names_for_them():
    config = dataclasses.replace(preset("tiny-v3"), n_shared_experts=0)
    assert not any("shared_experts" in name for name in parameters(config))


def test_mtp_copies_are_aliases():
    config = preset("tiny-v3-mtp")
    assert list(mtp_layers(config)) == [2]
    assert aliases(config) == {
        "model.layers.2.embed_tokens.weight": "model.embed_tokens.weight",
        "model.layers.2.shared_head.head.weight": "lm_head.weight",
    }
    assert parameters(config)["model.layers.2.shared_head.norm.weight"].mtp


def test_a_tied_head_is_an_alias_of_the_embedding():
    config = dataclasses.replace(preset("tiny-v3-mtp"), tie_word_embeddings=True)
    assert set(aliases(config).values()) == {"model.embed_tokens.weight"}
    assert "lm_head.weight" in aliases(config)
    assert "lm_head.weight" not in parameters(config)


def test_what_is_learned_is_neither_buffer_nor_scale_nor_mtp():
    config = dataclasses.replace(preset("tiny-v3-mtp"), quantization_config={"quant_method": "fp8"})
    names = trainable(config)
    assert all(spec.kind == "param" and not spec.mtp for spec in names.values())
    assert not any(name.endswith(("correction_bias", "scale_inv")) for name in names)
    assert len(names) < len(parameters(config))


def test_rotary_tables_are_known_and_ignored():
    assert known_and_ignored("model.layers.60.self_attn.rotary_emb.inv_freq")
    assert not known_and_ignored("model.layers.x.self_attn.rotary_emb.inv_freq")
