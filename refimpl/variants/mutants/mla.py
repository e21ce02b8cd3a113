"""Mistakes of latent attention: which rows and columns of the projections are what, and what is normalised.
SPEC MLA-1 to MLA-6."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

from refimpl.config.choices import Choices
from refimpl.config.model import ModelConfig
from refimpl.layers import norm
from refimpl.layers.context import Context, Op, Ops
from refimpl.numerics.arithmetic import Array
from refimpl.numerics.gradients import Gradients
from refimpl.variants.mutants.mutant import Mutant
from refimpl.variants.stages import Made, Step, behind, columns, inside, named
from refimpl.variants.variation import operations

KV_A: Final = named("kv_a_proj_with_mqa")
KV_B: Final = named("kv_b_proj")


def _absorbed_width(ops: Ops) -> Any:
    """The width of a query in the absorbed form, latent and rotary part, under the root."""

    def scale(config: ModelConfig, choices: Choices) -> float:
        right: float = ops.softmax_scale(config, choices)
        return right * math.sqrt(config.qk_head_dim / (config.kv_lora_rank + config.qk_rope_head_dim))

    return scale


def _key_first(c: Context, width: int) -> Array:
    """[k_pe; latent] instead of [latent; k_pe]."""
    return np.roll(np.arange(width), -c.config.qk_rope_head_dim)


def _key_from_nope(c: Context, width: int) -> Array:
    """k_pe begins nope columns before the end instead of R."""
    at = np.arange(width)
    return at + np.where(
        at >= c.config.kv_lora_rank, c.config.qk_rope_head_dim - c.config.qk_nope_head_dim, 0
    )


def _keys_then_values(c: Context, width: int) -> Array:
    """All heads' keys, then all heads' values, instead of both per head."""
    heads, nope, value = c.config.num_attention_heads, c.config.qk_nope_head_dim, c.config.v_head_dim
    keys = np.arange(heads * nope).reshape(heads, nope)
    values = heads * nope + np.arange(heads * value).reshape(heads, value)
    return np.concatenate([keys, values], 1).reshape(-1)


def _over_all(every: bool) -> Step:
    """y / rms(y) over all C + R columns, for all of them or for the latent's only."""

    def forward(c: Context, y: Array) -> tuple[Array, Any]:
        eps = c.choices.norm_epsilon(c.config)
        inv_rms = 1.0 / c.ar.sqrt(c.ar.mean(y * y) + eps)[:, None]  # (T, 1)
        own = every | (np.arange(y.shape[1]) < c.config.kv_lora_rank)
        return np.where(own, y * inv_rms, y), (y, inv_rms, own)

    def backward(c: Context, dy: Array, kept: Any) -> Array:
        y, inv_rms, own = kept
        dn = np.where(own, dy, 0.0)
        normed = y * inv_rms
        dx = inv_rms * (dn - normed * c.ar.mean(dn * normed)[:, None])
        return np.asarray(np.where(own, dx, dx + dy))

    return Step(forward, backward)


def _not_normalised(leaf: str, gain: bool = True) -> Made:
    """A norm that multiplies with its gain and nothing else, or does not even do that."""

    def made(ops: Ops) -> Op:
        def forward(c: Context, x: Array, eps: float) -> tuple[Array, norm.Saved]:
            if c.leaf != leaf:
                right: tuple[Array, norm.Saved] = ops.norm.forward(c, x, eps)
                return right
            y = c.ar.at("norm.out", x * c.array("weight")) if gain else x
            return y, norm.Saved(c.ar.keep("norm.in", x), c.ar.array(np.ones((len(x), 1))), c.probe(y))

        def backward(c: Context, dy: Array, saved: norm.Saved, grads: Gradients) -> Array:
            if c.leaf != leaf:
                right: Array = ops.norm.backward(c, dy, saved, grads)
                return right
            dy = c.joined(dy)
            x = saved.x.value() if gain else c.ar.zeros(dy.shape)
            grads.product_sum(c.name("weight"), c.microbatch, dy, x)
            return c.ar.at("d.norm.in", dy * c.array("weight")) if gain else dy

        return Op(forward, backward)

    return made


def _normalised() -> Step:
    """RMSNorm without a gain."""

    def forward(c: Context, y: Array) -> tuple[Array, Any]:
        inv_rms = 1.0 / c.ar.sqrt(c.ar.mean(y * y) + c.choices.norm_epsilon(c.config))[:, None]
        return y * inv_rms, (y * inv_rms, inv_rms)

    def backward(c: Context, dy: Array, kept: Any) -> Array:
        normed, inv_rms = kept
        dx: Array = inv_rms * (dy - normed * c.ar.mean(dy * normed)[:, None])
        return dx

    return Step(forward, backward)


MUTANTS: Final = (
    Mutant("A01", operations(softmax_scale=_absorbed_width)),
    Mutant("A03a", inside("mla", **behind("linear", columns(_key_first), KV_A))),
    Mutant("A03b", inside("mla", **behind("linear", columns(_key_from_nope), KV_A))),
    Mutant(
        "A06a",
        inside("mla", **behind("linear", _over_all(True), KV_A), norm=_not_normalised("kv_a_layernorm")),
    ),
    Mutant(
        "A06b",
        inside("mla", **behind("linear", _over_all(False), KV_A), norm=_not_normalised("kv_a_layernorm")),
    ),
    Mutant("A07", inside("mla", **behind("linear", columns(_keys_then_values), KV_B))),
    Mutant("A17a", inside("mla", **behind("linear", _normalised(), named("q_proj")))),
    Mutant("A17b", inside("mla", norm=_not_normalised("q_a_layernorm"))),
    Mutant("A17c", inside("mla", norm=_not_normalised("q_a_layernorm", gain=False))),
)
