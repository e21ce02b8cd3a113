"""Virtual weights: their distribution, their exactness, and their slices.  SPEC CKPT-8."""

import math
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from refimpl.checkpoint import VirtualWeights
from refimpl.checkpoint.virtual import FIELD_STD, Fields
from refimpl.config import preset
from refimpl.errors import Invalid
from refimpl.numerics import generator

TINY = VirtualWeights(preset("tiny-v3"))
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def in_bf16(array):
    return array.astype(ml_dtypes.bfloat16).astype(np.float32) == array


def test_every_value_but_the_selection_bias_is_exact_in_bf16():
    for name in TINY:
        assert TINY[name].dtype == np.float32
        if TINY.spec(name).role != "bias":
            assert in_bf16(TINY[name]).all()
            assert np.array_equal(TINY.codes(name), TINY[name].astype(ml_dtypes.bfloat16).view(np.uint16))


def test_the_selection_bias_is_never_exact_in_bf16_and_never_zero():
    bias = np.concatenate([VirtualWeights(TINY.config, seed)[BIAS] for seed in range(300)])
    assert not in_bf16(bias).any()
    assert (bias != 0).all()
    assert 0.4 < (bias > 0).mean() < 0.6
    assert 0.09 < bias.std() < 0.12


def test_every_possible_selection_bias_is_exact_in_float32_and_not_in_bf16():
    how = TINY.rule(BIAS)
    values = np.arange(-256, 255) * how.scale + how.offset
    assert np.array_equal(values.astype(np.float32), values)
    assert not in_bf16(values.astype(np.float32)).any()


def test_a_tensor_is_its_rule_applied_to_its_stream():
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    how = TINY.rule(name)
    assert isinstance(how, Fields)
    expected = generator.tensor(0, name, TINY.shape(name), how.scale)
    assert np.array_equal(TINY[name], expected)
    gain = TINY.rule("model.norm.weight")
    steps = generator.integers(0, "model.norm.weight", (96,), gain.low, gain.high)
    assert np.array_equal(TINY["model.norm.weight"], gain.scale * steps)


def test_linears_have_the_spread_that_keeps_activations():
    for name, spec in TINY.specs.items():
        if spec.role == "linear":
            ratio = TINY.rule(name).scale * FIELD_STD * math.sqrt(spec.shape[1])
            assert 2**-0.5 <= ratio <= 2**0.5
            assert math.isclose(TINY[name].std(), TINY.rule(name).scale * FIELD_STD, rel_tol=0.1)


@pytest.mark.parametrize("preset_name", ["tiny-v3", "mid-v3", "deepseek-v3"])
def test_attention_logits_are_neither_tiny_nor_saturated(preset_name):
    """q . k of a head on normal activations, without rotation, which changes no length; YaRN's factor in."""
    c = preset(preset_name)
    weights, path = VirtualWeights(c), "model.layers.0."

    def rows(name, n):
        width = weights.shape(f"{path}{name}")[1]
        return weights.slice(f"{path}{name}", 0, n * width).reshape(n, width)

    def norm(x, name):
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True)) * weights[f"{path}{name}.weight"]

    x = norm(np.random.default_rng(0).standard_normal((24, c.hidden_size)), "input_layernorm")
    latent = norm(x @ weights[f"{path}self_attn.q_a_proj.weight"].T, "self_attn.q_a_layernorm")
    q = latent @ rows("self_attn.q_b_proj.weight", c.qk_head_dim).T
    kv = x @ weights[f"{path}self_attn.kv_a_proj_with_mqa.weight"].T
    k_nope = norm(kv[:, : c.kv_lora_rank], "self_attn.kv_a_layernorm")
    k = np.hstack(
        [k_nope @ rows("self_attn.kv_b_proj.weight", c.qk_nope_head_dim).T, kv[:, c.kv_lora_rank :]]
    )
    logits = q @ k.T / math.sqrt(c.qk_head_dim) * (0.1 * math.log(40) + 1) ** 2
    assert 1.0 < logits.std() < 4.0


def test_gains_lie_around_one():
    gains = np.concatenate([TINY[name] for name in TINY if TINY.spec(name).role == "gain"])
    assert gains.min() >= 0.375
    assert gains.max() < 1.625
    assert 0.95 < gains.mean() < 1.05
    assert gains.std() > 0.3


@pytest.mark.parametrize("name", list(TINY))
def test_a_slice_is_a_part(name):
    whole = TINY[name].reshape(-1)
    middle = whole.size // 2
    assert np.array_equal(TINY.slice(name, middle, whole.size - middle), whole[middle:])


def test_a_slice_of_the_largest_model_takes_no_memory():
    weights = VirtualWeights(preset("kimi-k2"))
    weights.slice("model.norm.weight", 0, 1)
    tracemalloc.start()
    part = weights.slice("lm_head.weight", 163840 * 7168 - 5, 5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert part.shape == (5,)
    assert peak < 1 << 20
    with pytest.raises(Invalid, match="must lie in its"):
        weights.slice("lm_head.weight", 163840 * 7168, 1)


def test_another_seed_is_another_model():
    other = VirtualWeights(TINY.config, seed=1)
    assert not np.array_equal(other["lm_head.weight"], TINY["lm_head.weight"])


def test_the_same_name_has_the_same_values_in_a_deeper_model():
    deeper = VirtualWeights(preset("tiny-v3-mtp"))
    assert np.array_equal(deeper["lm_head.weight"], TINY["lm_head.weight"])


@pytest.mark.parametrize("seed", [-1, 1.5, True, "0"])
def test_a_seed_is_an_integer_from_zero_on(seed):
    with pytest.raises(Invalid, match="seed"):
        VirtualWeights(TINY.config, seed)
