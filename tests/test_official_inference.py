"""The recipe `official-inference` on a published FP8 layout.  SPEC RECIPE-13."""

import numpy as np
import pytest
from support import random_ids

import refimpl
from refimpl.checkpoint import VirtualWeights, fp8, open_folder
from refimpl.config import preset
from refimpl.numerics.blockscale import quantise
from refimpl.numerics.gemm import gemm_fp8
from refimpl.numerics.recipes import RECIPES
from refimpl.numerics.scaled import rows

RECIPE = RECIPES["official-inference"]


def written(folder):
    fp8.write_folder(folder, VirtualWeights(preset("tiny-v3")))
    return folder


@pytest.mark.parametrize("kernel", ["triton_wgmma", "triton_mma"])
def test_a_published_layout_runs_on_its_own_codes_with_the_chosen_kernel(tmp_path, kernel):
    folder = written(tmp_path)
    config, weights = open_folder(folder)
    result = refimpl.load(folder, RECIPE.changed("*.fprop", accumulator=kernel)).forward(
        random_ids(config, (1, 5), 1)
    )
    assert np.isfinite(result.logits).all()
    name = "model.layers.0.self_attn.q_a_proj"
    x = result.tensors["model.layers.0.input_layernorm"][0]
    own, w = rows(quantise(x.astype(np.float32), "triton_v3")), rows(weights.quantised(f"{name}.weight"))
    y = gemm_fp8(own.codes, own.scales, w.codes, w.scales, kernel, out="bf16")
    assert np.array_equal((y.astype(np.uint32) << 16).view(np.float32), result.tensors[name][0])


def test_the_code_passes_the_format_of_scales_to_plain_linears_alone():
    rule = RECIPES["official-inference-v3.1"].rule
    assert {s: rule(s).scale for s in ("self_attn.in", "experts.in", "o_proj.in", "shared_experts.in")} == {
        "self_attn.in": "triton_v3_ue8m0",
        "experts.in": "triton_v3_ue8m0",
        "o_proj.in": "triton_v3",
        "shared_experts.in": "triton_v3",
    }
