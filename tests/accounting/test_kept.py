"""Bytes kept for backward: what layers keep is what the rules say, to the byte."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support import V2, config, random_ids, random_weights

import refimpl
from refimpl.accounting.kept import LOSS, added, peak, predicted, total
from refimpl.accounting.load import Load
from refimpl.accounting.measured import counted, load_of, measured
from refimpl.config.model import ModelConfig
from refimpl.config.presets import preset
from refimpl.errors import Unsupported
from refimpl.layers import norm
from refimpl.numerics.precision import recipe as named
from refimpl.numerics.recipe import Recipe
from refimpl.numerics.recipes import RECIPES
from refimpl.numerics.rounded import Stored

TRAINING = refimpl.TrainingConfig(warmup_steps=0)
V3 = RECIPES["v3-fp8"]


def drawn(seed: int) -> ModelConfig:
    """A small model of uneven widths, some beyond a tile."""
    rng = np.random.default_rng(seed)

    def width(high: int = 40) -> int:
        return int(rng.integers(129, 200) if rng.random() < 0.3 else rng.integers(3, high))

    layers = int(rng.integers(1, 4))
    return config(
        hidden_size=width(),
        num_hidden_layers=layers,
        first_k_dense_replace=int(rng.integers(0, layers + 1)),
        intermediate_size=width(),
        moe_intermediate_size=width(20),
        n_shared_experts=int(rng.integers(0, 3)),
        num_attention_heads=int(rng.integers(1, 4)),
        q_lora_rank=None if rng.random() < 0.4 else width(),
        kv_lora_rank=width(),
        qk_nope_head_dim=int(rng.integers(1, 9)),
        v_head_dim=int(rng.integers(1, 70)),
        num_nextn_predict_layers=int(rng.integers(0, 3)),
        **({"rms_norm_eps": 1e-5} if seed % 2 else {}),
    )


def forward(cfg: ModelConfig, recipe: Recipe | str, seed: int = 0, **more: Any) -> Any:
    model = refimpl.load((cfg, random_weights(cfg, seed)), recipe, **more)
    size = int(np.random.default_rng(seed).integers(1, 3))
    ids = random_ids(cfg, (size, 5), seed)
    return model.forward(ids, labels=ids, trace=())


def agree(result: Any, cfg: ModelConfig, recipe: Recipe, choices: Any = None) -> None:
    found, asked = measured(result), predicted(cfg, recipe, load_of(result), choices)
    for a, b in zip(found, asked, strict=True):
        assert nonzero(a.kept) == nonzero(b.kept), b.kind


def nonzero(kept: Any) -> dict[str, int]:
    return {site: count for site, count in kept.items() if count}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", [*RECIPES, "bf16@float32", "v3-fp8@float32"])
def test_what_is_kept_is_what_the_rules_say_to_the_byte(name: str, seed: int) -> None:
    cfg = drawn(seed)
    training = TRAINING if cfg.num_nextn_predict_layers else None
    result = forward(cfg, name, seed, training=training)
    if cfg.first_k_dense_replace < cfg.num_hidden_layers:
        assert 0 in next(iter(load_of(result).experts.values())), "some expert has no tokens"
    agree(result, cfg, named(name))


@pytest.mark.parametrize(
    "settings",
    [
        ["*.in.wgrad.of=source"],
        ["*.in.tile=128x128", "experts.in.keep=recomputed"],
        ["*experts.swiglu.*.tile=128x128", "o_proj.in.format=e4m3"],
        ["q_b_proj.in.keep=codes", "attention.key.keep=plain"],
        ["attention.*.keep=plain", "kv_b_proj.in.keep=codes", "q_b_proj.in.keep=codes"],
        ["norm.in.format=e4m3", "norm.in.scale=ue8m0", "norm.in.tile=1x128"],
        ["attention.probs.of=source"],
        ["gate.in.format=fp32", "gate.in.keep=plain", "mlp.in.keep=codes", "lm_head.in.keep=plain"],
    ],
    ids=str,
)
def test_it_stays_so_under_an_ablation(settings: list[str]) -> None:
    recipe = V3.set(settings)
    cfg = config(num_nextn_predict_layers=2, hidden_size=131, moe_intermediate_size=130)
    agree(forward(cfg, recipe, training=TRAINING), cfg, recipe)


@pytest.mark.parametrize("hidden", ["before_norm", "after_norm"])
@pytest.mark.parametrize("passes", ["before_norm", "after_norm"])
def test_a_state_that_two_norms_keep_counts_once(hidden: str, passes: str) -> None:
    cfg, recipe = config(num_nextn_predict_layers=2), V3
    choices = refimpl.Choices(mtp_hidden=hidden, mtp_passes=passes)
    result = forward(cfg, recipe, training=TRAINING, choices=choices)
    agree(result, cfg, recipe, choices)
    one, two = (unit.kept["norm.in"] for unit in measured(result)[-2:])
    a_norm = 2 * load_of(result).tokens * cfg.hidden_size
    assert (one - two) == a_norm * ((hidden == "after_norm") - (passes == "after_norm"))


@pytest.mark.parametrize("changes", [V2, {"n_shared_experts": 0}, {"num_experts_per_tok": 1}], ids=str)
def test_other_families_and_routings(changes: dict[str, Any]) -> None:
    cfg = config(**changes)
    agree(forward(cfg, "v3-fp8"), cfg, V3)


def test_padding_packing_and_the_other_balance_losses() -> None:
    cfg = config(num_nextn_predict_layers=1)
    training = replace(TRAINING, expert_balance_weight=0.1, device_balance_weight=0.1, balance_devices=2)
    model = refimpl.load((cfg, random_weights(cfg, 1)), "v3-fp8", training=training)
    ids = random_ids(cfg, (2, 6), 1)
    segments = np.array([[0, 0, 0, 1, 1, -1], [0, 0, -1, -1, -1, -1]])
    result = model.forward(ids, labels=ids, segment_ids=segments, trace=())
    load = load_of(result)
    assert (load.exist, load.sequences, load.targets[0]) == ([7, 4], [2, 2], 4)
    agree(result, cfg, V3)


def test_without_targets_there_is_no_loss_to_keep() -> None:
    cfg = config()
    model = refimpl.load((cfg, random_weights(cfg, 1)), "v3-fp8")
    result = model.forward(random_ids(cfg, (1, 4), 1), trace=())
    assert LOSS not in nonzero(measured(result)[-1].kept)
    agree(result, cfg, V3)


def test_by_hand() -> None:
    """Two tokens through a dense layer: D 12, H 2, latents 7 and 5, heads of 4 + 6 and 3, MLP of 10."""
    cfg = config(num_hidden_layers=1, first_k_dense_replace=1)
    load = Load.full(cfg, 1, 2, training=False)
    norms = {"norm.in": 2 * 2 * (12 + 12 + 7 + 5), "norm.inv_rms": 4 * 2 * 4}
    bf16 = norms | {
        "self_attn.in": 2 * 2 * 12,
        "q_b_proj.in": 2 * 2 * 7,
        "kv_b_proj.in": 2 * 2 * 5,
        "attention.query": 2 * 2 * 2 * 10,
        "attention.key": 2 * 2 * 2 * 10,
        "attention.value": 2 * 2 * 2 * 3,
        "attention.probs": 2 * 2 * 2 * 2,
        "o_proj.in": 2 * 2 * 6,
        "mlp.in": 2 * 2 * 12,
        "swiglu.gate": 2 * 2 * 10,
        "swiglu.up": 2 * 2 * 10,
        "down_proj.in": 2 * 2 * 10,
    }
    assert nonzero(predicted(cfg, RECIPES["bf16"], load)[1].kept) == bf16
    fp8 = norms | {
        "rope.in": 2 * 2 * 6,
        "o_proj.in": 2 * 6 * 12 // 8 + 2 * 4,  # E5M6, a scale for each token
        "swiglu.gate": 2 * 2 * 10,
        "swiglu.up": 2 * 2 * 10,
        "down_proj.in": 2 * 10 + 2 * 4,
    }
    unit = predicted(cfg, V3, load)[1]
    assert nonzero(unit.kept) == fp8
    mlp, attention = unit.again
    assert mlp == {"mlp.in": 2 * 12 + 2 * 4}
    assert attention == {
        "self_attn.in": 2 * 12 + 2 * 4,
        "q_b_proj.in": 2 * 7 + 2 * 4,
        "kv_b_proj.in": 2 * 5 + 2 * 4,
        **{name: bf16[name] for name in bf16 if name.startswith("attention.")},
    }


def test_the_peak_by_hand() -> None:
    """The loss is freed before the unit that it belongs to goes backward; units before it are still there."""
    made = predicted(config(), V3, Load.full(config(), 1, 4, training=False))
    embedding, dense, moe, head = made
    held = total(made)
    assert peak(made) == max(
        held,
        held - head.kept[LOSS] + max(sum(part.values()) for part in head.again),
        held - head.total + max(sum(part.values()) for part in moe.again),
        held - head.total - moe.total + max(sum(part.values()) for part in dense.again),
    )
    assert total([embedding]) == 4 * 4


def test_a_value_that_two_fields_share_counts_once() -> None:
    array = np.ones((3, 4))
    saved = norm.Saved(Stored(array, 16), array, None)
    assert counted(saved, "", set()) == {"norm.in": 24, "norm.inv_rms": 0}
    assert counted(norm.Saved(Stored(array, 16), array + 1, None), "", set())["norm.inv_rms"] == 48


def test_sums_by_site() -> None:
    assert added({"a": 1}, {"a": 2, "b": 3}) == {"a": 3, "b": 3}


def test_the_published_model_needs_no_arrays() -> None:
    cfg = preset("deepseek-v3")
    load = Load.full(cfg, 1, 4096)
    moe = predicted(cfg, V3, load)[5]
    assert moe.kind == "MoE layer"
    assert moe.kept["experts.in"] == 4096 * 8 * (7168 + 56 * 4)
    assert moe.kept["o_proj.in"] == 4096 * (128 * 128 * 12 // 8 + 128 * 4)
    assert moe.kept["experts.swiglu.up"] == 256 * (128 * 2048 + 128 * 16 * 4)
    assert moe.kept["self_attn.in"] == moe.kept["attention.key"] == moe.kept["experts.down_proj.in"] == 0


def test_sparse_attention_is_not_counted() -> None:
    cfg = preset("deepseek-v3.2")
    with pytest.raises(Unsupported, match="deepseek_v32"):
        predicted(cfg, V3, Load.full(cfg, 1, 8))
