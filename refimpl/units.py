"""The units of the network: what is computed, saved and freed as one.  SPEC MODEL-5.

A unit is the embedding, one decoder layer, the final norm with the head, or one MTP module.  Hidden states
(T, D) go from unit to unit; the head and the MTP modules also give logits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from refimpl.config.model import ModelConfig
from refimpl.layers.batch import Tokens
from refimpl.layers.context import Context
from refimpl.numerics.arithmetic import Array
from refimpl.numerics.gradients import Gradients


@dataclass(frozen=True)
class Unit:
    """kind: "embedding", "layer", "head" or "mtp"; depth: 0, or k for MTP module k."""

    kind: str
    layer: int = -1
    depth: int = 0

    @property
    def path(self) -> str:
        if self.layer >= 0:
            return f"model.layers.{self.layer}"
        return "model.embed_tokens" if self.kind == "embedding" else ""

    @property
    def has_logits(self) -> bool:
        return self.kind in ("head", "mtp")


def units(config: ModelConfig, modules: int = 0) -> list[Unit]:
    """The units in the order of the forward pass, with the first `modules` MTP modules."""
    trunk = config.num_hidden_layers
    layers = [Unit("layer", i) for i in range(trunk)]
    ahead = [Unit("mtp", trunk + k, k + 1) for k in range(modules)]
    return [Unit("embedding"), *layers, Unit("head"), *ahead]


def unit_forward(c: Context, unit: Unit, x: Array | None, tokens: Tokens) -> tuple[Array, Array | None, Any]:
    """x (T, D), None for the embedding  ->  y (T, D), logits (T, V) of head and modules, saved."""
    at = _at(c, unit, tokens)
    if unit.kind == "embedding":
        y, saved = c.ops.embedding.forward(at, tokens.ids)
        return y, None, saved
    if unit.kind == "layer":
        y, saved = c.ops.block.forward(at, x, tokens.batch, _dense(c, unit))
        return y, None, saved
    if unit.kind == "mtp":
        following, logits, saved = c.ops.mtp.forward(at, x, tokens, _dense(c, unit))
        return following, logits, saved
    assert x is not None  # only the embedding has none
    logits, saved = c.ops.head.forward(at, x)
    y = saved.hidden if _reads_normed(c) else x
    return y, logits, replace(saved, hidden=None)  # backward does not read it


def unit_backward(
    c: Context,
    unit: Unit,
    dy: Array | None,
    dlogits: Array | None,
    saved: Any,
    tokens: Tokens,
    grads: Gradients,
) -> Array | None:
    """dy (T, D) of the unit's output, None when nothing reads it  ->  dx (T, D), None from the embedding."""
    at = _at(c, unit, tokens)
    if unit.kind == "embedding":
        c.ops.embedding.backward(at, dy, saved, grads)
        return None
    if unit.kind == "layer":
        dx: Array = c.ops.block.backward(at, dy, saved, tokens.batch, _dense(c, unit), grads)
    elif unit.kind == "mtp":
        dx = c.ops.mtp.backward(at, dlogits, dy, saved, tokens, _dense(c, unit), grads)
    elif dy is None:
        dx = c.ops.head.backward(at, dlogits, saved, grads)
    elif _reads_normed(c):
        dx = c.ops.head.backward(at, dlogits, saved, grads, dy)
    else:
        dx = c.ar.at("d.hidden", c.ops.head.backward(at, dlogits, saved, grads) + dy)
    return dx


def _at(c: Context, unit: Unit, tokens: Tokens) -> Context:
    at = c.at(unit.path) if unit.path else c
    return replace(at, balancing=tokens.balancing)


def _dense(c: Context, unit: Unit) -> bool:
    return not c.config.is_moe_layer(unit.layer)


def _reads_normed(c: Context) -> bool:
    """Whether MTP reads the trunk's state after the final norm."""
    return c.choices.mtp_hidden == "after_norm"
