"""Multi-head latent attention."""

import numpy as np
import pytest
from support import (
    EXACT,
    FLOAT64,
    TOLERANCE,
    YARN,
    batch,
    bits,
    config,
    context,
    random_weights,
    worst_gradient_error,
)

from refimpl.config.choices import Choices
from refimpl.layers import mla, rope
from refimpl.layers.batch import Batch, allowed, positions
from refimpl.numerics.gradients import Gradients

PREFIX = "model.layers.0.self_attn."
SHAPE = (2, 5)


def draw(cfg, seed: int = 0):
    weights = random_weights(cfg, seed)
    values = {k.removeprefix(PREFIX): w for k, w in weights.items() if k.startswith(PREFIX)}
    tokens = SHAPE[0] * SHAPE[1]
    return values | {"x": np.random.default_rng(seed).standard_normal((tokens, cfg.hidden_size))}


def run(ar, cfg, at, view=None, **more):
    c = context(at, cfg=cfg, ar=ar, **more)
    return mla.forward(c, ar.array(at["x"]), view or batch(ar, *SHAPE, cfg, c.choices))


def plain(cfg, at, length):
    """One sequence, head by head and token by token, in the report's equations 1 to 11."""
    heads, nope, width, value = (
        cfg.num_attention_heads,
        cfg.qk_nope_head_dim,
        cfg.qk_rope_head_dim,
        cfg.v_head_dim,
    )

    def norm(x, gain):
        return x / np.sqrt((x * x).mean() + 1e-6) * gain

    def turn(x, t):
        out = x.copy()
        for m in range(width // 2):
            angle = t * cfg.rope_theta ** (-2 * m / width)
            turned = (x[2 * m] + 1j * x[2 * m + 1]) * np.exp(1j * angle)
            out[2 * m], out[2 * m + 1] = turned.real, turned.imag
        return out

    rows = []
    for t in range(length):
        x = at["x"][t]
        q = at["q_b_proj.weight"] @ norm(at["q_a_proj.weight"] @ x, at["q_a_layernorm.weight"])
        down = at["kv_a_proj_with_mqa.weight"] @ x
        up = at["kv_b_proj.weight"] @ norm(down[: cfg.kv_lora_rank], at["kv_a_layernorm.weight"])
        k_pe = turn(down[cfg.kv_lora_rank :], t)
        for h in range(heads):
            own, both = q[h * (nope + width) :][: nope + width], up[h * (nope + value) :][: nope + value]
            query = np.concatenate([own[:nope], turn(own[nope:], t)])
            rows.append((t, h, query, np.concatenate([both[:nope], k_pe]), both[nope:]))
    out = np.zeros((length, heads, value))
    for t, h, query, _, _ in rows:
        seen = [(key, v) for s, g, _, key, v in rows if g == h and s <= t]
        scores = np.array([query @ key for key, _ in seen]) / np.sqrt(nope + width)
        probs = np.exp(scores) / np.exp(scores).sum()
        out[t, h] = sum(p * v for p, (_, v) in zip(probs, seen, strict=True))
    return out.reshape(length, -1) @ at["o_proj.weight"].T


def test_it_is_the_report_s_equations_head_by_head() -> None:
    cfg = config()
    at = draw(cfg)
    y, _ = run(FLOAT64, cfg, at)
    assert y[:5] == pytest.approx(plain(cfg, at, 5), rel=1e-12, abs=1e-12)


def test_a_first_token_returns_its_own_value() -> None:
    cfg = config()
    at = draw(cfg)
    _, saved = run(FLOAT64, cfg, at)
    own = saved.kv_b_proj.out.reshape(10, 2, 7)[0, :, 4:]  # per head: 4 key rows, then 3 value rows
    assert (saved.heads[0].reshape(2, 3) == own).all()


def test_sequences_and_later_tokens_do_not_matter_bit_for_bit() -> None:
    cfg = config()
    at = draw(cfg)
    y, _ = run(EXACT, cfg, at)
    changed = at | {"x": at["x"].copy()}
    changed["x"][[3, 4, 9]] += 1.0
    z, _ = run(EXACT, cfg, changed)
    same = [0, 1, 2, 5, 6, 7, 8]
    assert bits(z[same]) == bits(y[same])
    assert not (z[[3, 4, 9]] == y[[3, 4, 9]]).all(-1).any()


def test_only_distances_between_positions_matter() -> None:
    cfg = config()
    at = draw(cfg)

    def shifted(by: int):
        tables = rope.tables(context(cfg=cfg), np.tile(np.arange(5), 2) + by)
        return run(FLOAT64, cfg, at, Batch(2, 5, tables, allowed(np.zeros(SHAPE, int))))[0]

    assert shifted(11) == pytest.approx(shifted(0), rel=1e-11, abs=1e-12)


def test_the_latents_norms_have_their_own_epsilon_unless_chosen() -> None:
    small, large = config(rms_norm_eps=1e-6), config(rms_norm_eps=0.1)
    at = draw(small)
    assert bits(run(EXACT, small, at)[0]) == bits(run(EXACT, large, at)[0])
    choices = Choices(latent_norm_epsilon="config")
    assert bits(run(EXACT, small, at, choices=choices)[0]) == bits(run(EXACT, small, at)[0])
    assert bits(run(EXACT, large, at, choices=choices)[0]) != bits(run(EXACT, large, at)[0])


def test_packed_sequences_are_as_alone_bit_for_bit_in_exact() -> None:
    cfg = config()
    at = draw(cfg)
    segments = np.array([[0, 0, 0, 1, 1, 1, 1, 1, 2, 2]])
    tables = rope.tables(context(cfg=cfg, ar=EXACT), positions(segments).reshape(-1))
    packed, _ = run(EXACT, cfg, at, Batch(1, 10, tables, allowed(segments)))
    alone, _ = run(EXACT, cfg, at | {"x": at["x"][3:8]}, batch(EXACT, 1, 5, cfg))
    assert bits(packed[3:8]) == bits(alone)


CONFIGS = [
    {},
    {"q_lora_rank": None},
    {"rope_interleave": False},
    {"rope_scaling": YARN | {"mscale": 1.3}},
    {"v_head_dim": 9, "qk_nope_head_dim": 2, "num_attention_heads": 3},
    {"num_attention_heads": 1, "kv_lora_rank": 1},
]


@pytest.mark.parametrize("fields", CONFIGS)
def test_gradients_are_those_of_the_complex_step(fields) -> None:
    cfg = config(**fields)
    at = draw(cfg)
    cotangent = np.random.default_rng(1).standard_normal(at["x"].shape)
    grads, c = Gradients(FLOAT64), context(at, cfg=cfg)
    dx = mla.backward(c, cotangent, run(FLOAT64, cfg, at)[1], batch(FLOAT64, *SHAPE, cfg), grads)
    found = {name.removeprefix("m."): g for name, g in grads.reduce().items()} | {"x": dx}

    def forward(ar, values):
        return run(ar, cfg, values)[0]

    assert worst_gradient_error(forward, at, found, cotangent) <= TOLERANCE


LEAVES = ["q_pe", "k_pe", "heads", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "probs"]


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_cotangent_of_an_inner_tensor_joins(leaf: str) -> None:
    cfg = config()
    at = draw(cfg)

    def inner(saved):
        places = {
            "q_pe": lambda: saved.q_pe,
            "k_pe": lambda: saved.k_pe,
            "heads": lambda: saved.heads,
            "q_b_proj": lambda: saved.query.q_b_proj.out,
            "kv_a_proj_with_mqa": lambda: saved.kv_a_proj.out,
            "kv_a_layernorm": lambda: saved.kv_a_layernorm.out,
            "kv_b_proj": lambda: saved.kv_b_proj.out,
            "probs": lambda: saved.attended.probs.value(),
        }
        return places[leaf]()

    _, saved = run(FLOAT64, cfg, at)
    more = np.random.default_rng(1).standard_normal(inner(saved).shape)
    c = context(at, cfg=cfg, cotangents={f"m.{leaf}": more})
    grads = Gradients(FLOAT64)
    dx = mla.backward(c, np.zeros_like(at["x"]), saved, batch(FLOAT64, *SHAPE, cfg), grads)
    assert c.cotangents.taken == {f"m.{leaf}"}
    found = {name.removeprefix("m."): g for name, g in grads.reduce().items()} | {"x": dx}

    def forward(ar, values):
        return inner(run(ar, cfg, values)[1])

    assert worst_gradient_error(forward, at, found, more) <= TOLERANCE
