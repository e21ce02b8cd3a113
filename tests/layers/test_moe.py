"""The mixture of experts: gate, routed experts, shared experts."""

import numpy as np
import pytest
from support import EXACT, FLOAT64, TOLERANCE, V2, bits, config, context, random_weights, worst_gradient_error

from refimpl.layers import experts, gate, mlp, moe
from refimpl.numerics.arithmetic import Operand
from refimpl.numerics.gradients import Gradients

PREFIX = "model.layers.1.mlp."


def draw(cfg, seed: int = 0, tokens: int = 7):
    weights = random_weights(cfg, seed)
    values = {k.removeprefix(PREFIX): w for k, w in weights.items() if k.startswith(PREFIX)}
    return values | {"x": np.random.default_rng(seed).standard_normal((tokens, cfg.hidden_size))}


def run(ar, cfg, at, **more):
    return moe.forward(context(at, cfg=cfg, ar=ar, **more), ar.array(at["x"]))


def test_it_is_routed_plus_shared() -> None:
    cfg = config()
    at = draw(cfg)
    y, saved = run(EXACT, cfg, at)
    c, x = context(at, cfg=cfg, ar=EXACT), Operand(at["x"])
    idx, weight, _ = gate.forward(c.at("gate"), at["x"])
    routed, _ = experts.forward(c.at("experts"), x, idx, weight)
    shared, _ = mlp.forward(c.at("shared_experts"), x)
    assert bits(y) == bits(routed + shared)
    assert bits(saved.routed.out) == bits(routed)


def test_without_shared_experts_it_is_the_routed_alone() -> None:
    cfg = config(n_shared_experts=0)
    y, saved = run(EXACT, cfg, draw(cfg))
    assert saved.shared is None
    assert bits(y) == bits(saved.routed.out)


def test_two_shared_experts_are_one_mlp_of_twice_the_width() -> None:
    """Split in two MLPs, their sum is the same, since nothing couples the inner width."""
    cfg = config(n_shared_experts=2)
    at = draw(cfg)
    y, saved = run(FLOAT64, cfg, at)
    width, parts = cfg.moe_intermediate_size, []
    for part in (slice(0, width), slice(width, None)):
        own = {
            "gate_proj.weight": at["shared_experts.gate_proj.weight"][part],
            "up_proj.weight": at["shared_experts.up_proj.weight"][part],
            "down_proj.weight": at["shared_experts.down_proj.weight"][:, part],
        }
        parts.append(mlp.forward(context(own), Operand(at["x"]))[0])
    assert y - saved.routed.out == pytest.approx(parts[0] + parts[1], rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(
    "fields", [{}, {"n_shared_experts": 0}, {"n_shared_experts": 2, "norm_topk_prob": False}, V2]
)
def test_gradients_are_those_of_the_complex_step(fields) -> None:
    cfg = config(**fields)
    at = draw(cfg)
    bias = {k: at.pop(k) for k in list(at) if k.endswith("bias")}
    cotangent = np.random.default_rng(1).standard_normal(at["x"].shape)
    grads = Gradients(FLOAT64)
    c = context(at | bias, cfg=cfg)
    dx = moe.backward(c, cotangent, run(FLOAT64, cfg, at | bias)[1], grads)
    found = {name.removeprefix("m."): g for name, g in grads.reduce().items()} | {"x": dx}
    found = {name: np.zeros_like(w) for name, w in at.items()} | found

    def forward(ar, values):
        return run(ar, cfg, values | bias)[0]

    assert worst_gradient_error(forward, at, found, cotangent) <= TOLERANCE
