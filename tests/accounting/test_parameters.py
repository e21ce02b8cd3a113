"""Bytes of parameters in training."""

import numpy as np
import pytest
from support import config, random_ids, random_weights

import refimpl
from refimpl.accounting.parameters import PARTS, groups, total
from refimpl.checkpoint.names import parameters, trainable
from refimpl.config.model import ModelConfig
from refimpl.config.presets import PRESETS, preset
from refimpl.numerics.recipes import RECIPES
from refimpl.numerics.scaled import ScaledWeight, coded_bytes, quantised
from refimpl.training import start, step

BF16, V3 = RECIPES["bf16"], RECIPES["v3-fp8"]


def test_by_hand() -> None:
    """A dense MLP of 200 by 300 in blocks of 128: codes, 2 x 3 scales a matrix, master, gradient, moments."""
    cfg = config(hidden_size=300, intermediate_size=200, first_k_dense_replace=1, num_hidden_layers=1)
    fp8 = {group.name: group for group in groups(cfg, V3)}["dense MLPs"]
    size = 3 * 200 * 300
    assert (fp8.count, fp8.weight, fp8.scales) == (size, size, 3 * 6 * 4)
    assert (fp8.master, fp8.gradient, fp8.moments) == (4 * size, 4 * size, 4 * size)
    bf16 = {group.name: group for group in groups(cfg, BF16)}["dense MLPs"]
    assert (bf16.weight, bf16.scales, bf16.total) == (2 * size, 0, 14 * size)


@pytest.mark.parametrize("name", [name for name in PRESETS if "v3-" in name or "v2" in name])
def test_every_parameter_is_counted_once(name: str) -> None:
    cfg = preset(name)
    for recipe in (BF16, V3):
        assert total(groups(cfg, recipe, modules=False)).count == elements(cfg, mtp=False)
        assert total(groups(cfg, recipe)).count == elements(cfg, mtp=True)


def elements(cfg: ModelConfig, mtp: bool) -> int:
    specs = parameters(cfg).values()
    return sum(int(np.prod(s.shape)) for s in specs if s.kind != "scale" and (mtp or not s.mtp))


def test_the_published_model_has_671_billion() -> None:
    cfg = preset("deepseek-v3")
    learned = sum(int(np.prod(spec.shape)) for spec in trainable(cfg).values())
    found = groups(cfg, V3, modules=False)
    assert total(found).count == learned + 58 * 256 == 671_026_419_200
    by_name = {group.name: group for group in found}
    assert by_name["routed experts"].count == 58 * 256 * 3 * 7168 * 2048
    assert by_name["routed experts"].scales == 58 * 256 * 3 * 56 * 16 * 4
    assert by_name["embedding"].weight == by_name["head"].weight == 2 * 129280 * 7168  # these stay in BF16


def test_codes_and_scales_are_those_that_the_arithmetic_makes() -> None:
    cfg = config(hidden_size=300, moe_intermediate_size=140)
    weights = random_weights(cfg, 0)
    made = 0
    for name, array in weights.items():
        if ".mlp.experts." in name:
            rule = V3.rule("experts.up_proj.weight")
            made += coded_bytes(quantised(ScaledWeight(array).value, rule))
    experts = {group.name: group for group in groups(cfg, V3)}["routed experts"]
    assert experts.weight + experts.scales == made


def test_masters_gradients_and_moments_are_on_the_grids_that_are_counted() -> None:
    cfg = config()
    training = refimpl.TrainingConfig(warmup_steps=0)
    state = start(cfg, random_weights(cfg, 0), training, precision="v3-fp8")
    ids = random_ids(cfg, (1, 5), 0)
    state, _ = step(state, [{"input_ids": ids, "labels": ids}])
    name = "model.layers.0.mlp.up_proj.weight"
    for array, fits in ((state.weights[name], np.float32), (state.first[name], "bf16")):
        narrow = array.astype(np.float32)
        assert (narrow == array).all()
        if fits == "bf16":
            assert not (narrow.view(np.uint32) & 0xFFFF).any()


def test_the_parts_add_up_and_the_selection_bias_has_no_gradient() -> None:
    found = groups(config(), V3)
    for group in found:
        assert group.total == sum(getattr(group, part) for part in PARTS)
    bias = next(group for group in found if group.name == "selection biases")
    assert (bias.count, bias.weight, bias.total) == (8, 32, 32)
