"""One decoder layer, and the final norm with the head."""

import numpy as np
import pytest
from support import (
    EXACT,
    FLOAT64,
    TOLERANCE,
    V2,
    batch,
    bits,
    config,
    context,
    random_weights,
    worst_gradient_error,
)

from refimpl.layers import block, head
from refimpl.layers.context import tensors
from refimpl.numerics.gradients import Gradients

SHAPE = (2, 4)
LAYERS = [(0, {}), (1, {}), (1, V2), (1, {"q_lora_rank": None, "n_shared_experts": 0})]


def draw(cfg, layer: int, seed: int = 0):
    prefix = f"model.layers.{layer}."
    weights = random_weights(cfg, seed)
    values = {k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)}
    return values | {"x": np.random.default_rng(seed).standard_normal((8, cfg.hidden_size))}


def run(ar, cfg, at, layer, **more):
    c = context(at, cfg=cfg, ar=ar, **more)
    return block.forward(c, ar.array(at["x"]), batch(ar, *SHAPE, cfg), layer == 0)


@pytest.mark.parametrize("layer", [0, 1])
def test_it_adds_attention_and_then_the_mlp_to_the_residual(layer: int) -> None:
    cfg = config()
    at = draw(cfg, layer)
    y, saved = run(FLOAT64, cfg, at, layer)
    named = {name: array for name, array, _ in tensors(saved, "m")}
    h = at["x"] + named["m.self_attn"]
    gain, eps = at["post_attention_layernorm.weight"], cfg.rms_norm_eps
    normed = h / np.sqrt((h * h).mean(-1, keepdims=True) + eps) * gain
    assert named["m.post_attention_layernorm"] == pytest.approx(normed, rel=1e-13)
    assert y == pytest.approx(h + named["m.mlp"], rel=1e-15)


@pytest.mark.parametrize("layer", [0, 1])
def test_with_empty_outputs_it_is_the_identity(layer: int) -> None:
    cfg = config()
    at = draw(cfg, layer)
    for name in at:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            at[name] = at[name] * 0.0
    y, saved = run(EXACT, cfg, at, layer)
    assert bits(y) == bits(at["x"])
    dy = np.random.default_rng(2).standard_normal(y.shape)
    c = context(at, cfg=cfg, ar=EXACT)
    dx = block.backward(c, dy, saved, batch(EXACT, *SHAPE, cfg), layer == 0, Gradients(EXACT))
    assert bits(dx) == bits(dy)


@pytest.mark.parametrize(("layer", "fields"), LAYERS)
def test_gradients_are_those_of_the_complex_step(layer: int, fields) -> None:
    cfg = config(**fields)
    at = draw(cfg, layer)
    bias = {k: at.pop(k) for k in list(at) if k.endswith("bias")}
    cotangent = np.random.default_rng(1).standard_normal(at["x"].shape)
    grads, view = Gradients(FLOAT64), batch(FLOAT64, *SHAPE, cfg)
    saved = run(FLOAT64, cfg, at | bias, layer)[1]
    dx = block.backward(context(at | bias, cfg=cfg), cotangent, saved, view, layer == 0, grads)
    found = {name.removeprefix("m."): g for name, g in grads.reduce().items()} | {"x": dx}
    found = {name: np.zeros_like(w) for name, w in at.items()} | found

    def forward(ar, values):
        return run(ar, cfg, values | bias, layer)[0]

    assert worst_gradient_error(forward, at, found, cotangent) <= TOLERANCE


def test_the_head_is_a_linear_of_the_norm_and_its_gradients_are_those_of_the_complex_step() -> None:
    cfg, rng = config(), np.random.default_rng(0)
    at = {
        "x": rng.standard_normal((4, 12)),
        "model.norm.weight": rng.standard_normal(12),
        "lm_head.weight": rng.standard_normal((29, 12)),
    }

    def forward(ar, values):
        return head.forward(context(values, "", cfg, ar=ar), ar.array(values["x"]))[0]

    logits, saved = head.forward(context(at, "", cfg), at["x"])
    x = at["x"] / np.sqrt((at["x"] ** 2).mean(-1, keepdims=True) + 1e-6) * at["model.norm.weight"]
    assert logits == pytest.approx(x @ at["lm_head.weight"].T, rel=1e-12, abs=1e-13)
    cotangent, grads = rng.standard_normal((4, 29)), Gradients(FLOAT64)
    dx = head.backward(context(at, "", cfg), cotangent, saved, grads)
    assert worst_gradient_error(forward, at, grads.reduce() | {"x": dx}, cotangent) <= TOLERANCE
