"""Mistakes of the latents' norms: epsilon, mean, and what the statistic runs over.  SPEC NORM-1, NORM-2,
MLA-1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from refimpl.layers import norm
from refimpl.layers.context import Context, Op, Ops
from refimpl.numerics.arithmetic import Array
from refimpl.numerics.gradients import Gradients
from refimpl.variants.mutants.mutant import Mutant
from refimpl.variants.stages import Made, inside, named
from refimpl.variants.variation import chosen, operations

QUERIES: Final = named("q_a_layernorm")
KEYS: Final = named("kv_a_layernorm")
LATENT: Final = named("q_a_layernorm", "kv_a_layernorm")


def _epsilon(eps: float) -> Made:
    """The latents' norms have this epsilon, whatever they are given."""

    def made(ops: Ops) -> Op:
        def forward(c: Context, x: Array, own: float) -> tuple[Array, norm.Saved]:
            y: tuple[Array, norm.Saved] = ops.norm.forward(c, x, eps if LATENT(c) else own)
            return y

        return Op(forward, ops.norm.backward)

    return made


def _centred(where: Callable[[Context], bool]) -> Made:
    """LayerNorm without its bias: the mean is subtracted first."""

    def centre(c: Context, x: Array) -> Array:
        return x - c.ar.mean(x)[:, None] if where(c) else x

    def made(ops: Ops) -> Op:
        def forward(c: Context, x: Array, eps: float) -> tuple[Array, norm.Saved]:
            y: tuple[Array, norm.Saved] = ops.norm.forward(c, centre(c, x), eps)
            return y

        def backward(c: Context, dy: Array, saved: norm.Saved, grads: Gradients) -> Array:
            return centre(c, ops.norm.backward(c, dy, saved, grads))

        return Op(forward, backward)

    return made


def _sharded(where: Callable[[Context], bool]) -> Made:
    """Every half of the width has a root mean square of its own, as if it lay on one of two ranks."""

    def halves(c: Context, x: Array) -> bool:
        return where(c) and x.shape[1] % 2 == 0

    def made(ops: Ops) -> Op:
        def forward(c: Context, x: Array, eps: float) -> tuple[Array, norm.Saved]:
            if not halves(c, x):
                right: tuple[Array, norm.Saved] = ops.norm.forward(c, x, eps)
                return right
            ar = c.ar
            rows = x.reshape(len(x), 2, -1)  # (T, 2, D / 2)
            inv_rms = 1.0 / ar.sqrt(ar.mean(rows * rows) + eps)[..., None]  # (T, 2, 1)
            normed = ar.at("norm.normed", (rows * inv_rms).reshape(x.shape))
            y = ar.at("norm.out", normed * c.array("weight"))
            return y, norm.Saved(ar.keep("norm.in", x), inv_rms, c.probe(y))

        def backward(c: Context, dy: Array, saved: norm.Saved, grads: Gradients) -> Array:
            if not halves(c, dy):
                right: Array = ops.norm.backward(c, dy, saved, grads)
                return right
            ar, dy = c.ar, c.joined(dy)
            rows = saved.x.value().reshape(len(dy), 2, -1)
            normed = rows * saved.inv_rms  # (T, 2, D / 2)
            grads.product_sum(c.name("weight"), c.microbatch, dy, normed.reshape(dy.shape))
            dn = (dy * c.array("weight")).reshape(rows.shape)
            dx = saved.inv_rms * (dn - normed * ar.mean(dn * normed)[..., None])
            return ar.at("d.norm.in", dx.reshape(dy.shape))

        return Op(forward, backward)

    return made


MUTANTS: Final = (
    Mutant("A04a", operations(norm=_epsilon(1e-5))),
    Mutant("A04b", operations(norm=_epsilon(1e-6))),
    Mutant("A04c", chosen(latent_norm_epsilon="config")),
    Mutant("A05a", operations(norm=_centred(LATENT))),
    Mutant("A05b", operations(norm=_centred(KEYS))),
    Mutant("A05c", operations(norm=_centred(lambda c: True))),
    Mutant("A08a", inside("mla", norm=_sharded(LATENT))),
    Mutant("A08b", inside("mla", norm=_sharded(KEYS))),
    Mutant("A08c", inside("mla", norm=_sharded(QUERIES))),
)
