"""What a case computes: a component of the model, run in any arithmetic.  SPEC CASE-7.

A program takes the case's inputs and weights and returns the named tensors in the order of computation:
those that the layers save, then, when gradients are asked for, `grad.NAME` for every input and weight.  The
same program gives the exact values, the error bounds and the noise, by changing the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from refimpl.checkpoint.weights import DictWeights
from refimpl.layers import linear, loss, mlp, moe
from refimpl.layers.batch import allowed
from refimpl.layers.context import tensors
from refimpl.model import Model
from refimpl.numerics import sites
from refimpl.numerics.arithmetic import Arithmetic, Array
from refimpl.numerics.gradients import Gradients
from refimpl.pipeline_programs import PIPELINE_PROGRAMS
from refimpl.setting import IDX, Outputs, Setting, finish
from refimpl.training_programs import TRAINING_PROGRAMS, trained

__all__ = ["IDX", "PROGRAMS", "Outputs", "Setting", "run"]


def run(component: str, setting: Setting) -> Outputs:
    """name -> tensor, in the order of computation."""
    outputs = PROGRAMS[component](setting)
    for change in setting.after:
        outputs = change(outputs)
    return outputs


def _linear(s: Setting) -> Outputs:
    c = s.context
    x, site = s.array("x"), sites.read_by(c.linear)
    y, saved = c.ops.linear.forward(c, s.ar.operand(site, x))
    whole = linear.again(saved, s.ar.keeping.operand(site, x)) if s.ar.recomputes(site) else saved
    return finish(s, y, saved, lambda dy, grads: c.ops.linear.backward(c, dy, whole, grads))


def _embedding(s: Setting) -> Outputs:
    c = s.context
    y, saved = c.ops.embedding.forward(c, s.inputs["ids"])
    return finish(s, y, saved, lambda dy, grads: c.ops.embedding.backward(c, dy, saved, grads))


def _norm(s: Setting) -> Outputs:
    c = s.context
    y, saved = c.ops.norm.forward(c, s.array("x"), s.arguments["eps"])
    return finish(s, y, saved, lambda dy, grads: c.ops.norm.backward(c, dy, saved, grads))


def _rope_tables(s: Setting) -> Outputs:
    c = s.context
    at = c.ops.tables(c, s.inputs["position_ids"])
    frequencies = _constant(s.ar, c.ops.frequencies(s.config, s.choices))
    scale = _constant(s.ar, np.array([c.ops.softmax_scale(s.config, s.choices)]))
    parts = {"inv_freq": frequencies, "cos": at.cos[:, 0], "sin": at.sin[:, 0], "softmax_scale": scale}
    return {f"{s.path}.{name}": value for name, value in parts.items()}


def _constant(ar: Arithmetic, x: Array) -> Any:
    """A constant that implementations compute in float32 with a power, a root or a logarithm: multiplied by
    exact ones that have the errors of three elementary functions."""
    one = ar.exp(ar.array(np.zeros_like(x)))
    return ar.array(x) * one * one * one


def _rope(s: Setting) -> Outputs:
    c = s.context
    at = c.ops.tables(c, s.inputs["position_ids"])
    out: Outputs = {}
    for name in ("q_pe", "k_pe"):
        out[f"{s.path}.{name}"] = c.ops.rope.forward(c, s.array(name), at)
    if s.backward:
        for name in ("q_pe", "k_pe"):
            out[f"grad.{name}"] = c.ops.rope.backward(c, s.array(f"d{name}"), at)
    return out


def _attention(s: Setting) -> Outputs:
    c = s.context
    query, key, value = (s.array(name) for name in ("query", "key", "value"))
    scale = c.ops.softmax_scale(s.config, s.choices)
    y, saved = c.ops.attention.forward(c, query, key, value, scale, allowed(s.inputs["segment_ids"]))
    out: Outputs = {name: array for name, array, _ in tensors(saved, s.path)}
    out[f"{s.path}.heads"] = y
    if s.backward:
        parts = c.ops.attention.backward(c, s.array("dy"), saved, scale)
        out |= {f"grad.{name}": part for name, part in zip(("query", "key", "value"), parts, strict=True)}
    return out


def _mla(s: Setting) -> Outputs:
    c, x = s.context, s.array("x")
    x = x.reshape(-1, x.shape[-1])
    y, saved = c.ops.mla.forward(c, x, s.batch)
    again = s.ar.recomputes("self_attn.in", *sites.UP)
    whole = c.ops.mla.again(c, saved, x, s.batch) if again else saved
    return finish(s, y, saved, lambda dy, grads: c.ops.mla.backward(c, dy, whole, s.batch, grads))


def _mlp(s: Setting) -> Outputs:
    c = s.context
    x, site = s.array("x"), sites.read_by(c.at("gate_proj").linear)
    y, saved = c.ops.mlp.forward(c, s.ar.operand(site, x))
    whole = mlp.given(saved, s.ar.keeping.operand(site, x)) if s.ar.recomputes(site) else saved
    return finish(s, y, saved, lambda dy, grads: c.ops.mlp.backward(c, dy, whole, grads))


def _gate(s: Setting) -> Outputs:
    c = s.context
    x = s.array("x")
    _, weight, saved = c.ops.gate.forward(c, x)
    recomputed = s.ar.recomputes("gate.in")
    whole = replace(saved, x=s.ar.keeping.operand("gate.in", x)) if recomputed else saved
    out = finish(s, weight, saved, lambda dy, grads: c.ops.gate.backward(c, dy, whole, grads))
    out.pop(s.path, None)  # the weights again, under the path of the module
    return out


def _experts(s: Setting) -> Outputs:
    c, idx = s.context, s.inputs["topk_idx"]
    hidden = s.ar.operand("experts.in", s.array("x"))
    y, saved = c.ops.experts.forward(c, hidden, idx, s.array("topk_weight"))
    out = finish(s, y, saved, lambda dy, grads: c.ops.experts.backward(c, dy, saved, grads)[0])
    if s.backward:
        dy = s.array("dy").reshape(y.shape)
        out["grad.topk_weight"] = c.ops.experts.backward(c, dy, saved, Gradients(s.ar))[1]
    return out


def _moe(s: Setting) -> Outputs:
    c = s.context
    x = s.array("x")
    y, saved = c.ops.moe.forward(c, x)
    whole = c.ops.moe.again(c, saved, x) if s.ar.recomputes(*moe.INPUTS) else saved
    return finish(s, y, saved, lambda dy, grads: c.ops.moe.backward(c, dy, whole, grads))


def _block(s: Setting) -> Outputs:
    c, x, dense = s.context, s.array("x"), not s.config.is_moe_layer(s.arguments["layer"])
    y, saved = c.ops.block.forward(c, x.reshape(-1, x.shape[-1]), s.batch, dense)
    return finish(s, y, saved, lambda dy, grads: c.ops.block.backward(c, dy, saved, s.batch, dense, grads))


def _head_loss(s: Setting) -> Outputs:
    c, targets = s.context, s.inputs["targets"]
    logits, saved = c.ops.head.forward(c, s.array("x"))
    count = int((targets != loss.IGNORED).sum())
    value, loss_saved = c.ops.loss.forward(c, logits, targets, count)
    out: Outputs = {name: array for name, array, _ in (*tensors(saved, ""), *tensors(loss_saved, ""))}
    out["loss"] = value.reshape(1)
    if s.backward:
        grads = Gradients(s.ar)
        dlogits = c.ops.loss.backward(c, 1.0, loss_saved)
        dx = c.ops.head.backward(c, dlogits, saved, grads)
        out["grad.logits"] = dlogits
        out |= {f"grad.{name}": gradient for name, gradient in sorted(grads.reduce().items())} | {
            "grad.x": dx
        }
    return out


def _model(s: Setting) -> Outputs:
    names = ("input_ids", "targets", "labels", "mask", "segment_ids", "position_ids")
    given: dict[str, Any] = {name: s.inputs[name] for name in names if name in s.inputs}
    if "training" in s.arguments:
        return trained(s, given)
    model = Model(s.config, DictWeights(s.config, s.weights), s.ar, s.choices, s.ops)
    routing = {
        int(path.split(".")[2]): idx.reshape(*s.inputs["input_ids"].shape, -1)
        for path, idx in s.routing.items()
    }
    result = model.forward(**given, routing=routing)
    out: Outputs = dict(result.tensors)
    out["logits"] = result.logits
    if result.loss is not None:
        out["loss"] = np.array([result.loss])
    if s.backward:
        cotangents = {n.removeprefix("d."): v for n, v in s.inputs.items() if n.startswith("d.")}
        gradients = model.backward(result, cotangents=cotangents or None)
        out |= {f"grad.{name}": gradients[name] for name in gradients}
    return out


PROGRAMS: dict[str, Callable[[Setting], Outputs]] = {
    "linear": _linear,
    "embedding": _embedding,
    "norm": _norm,
    "rope_tables": _rope_tables,
    "rope": _rope,
    "attention": _attention,
    "mla": _mla,
    "mlp": _mlp,
    "gate": _gate,
    "experts": _experts,
    "moe": _moe,
    "block": _block,
    "head_loss": _head_loss,
    "model": _model,
    **TRAINING_PROGRAMS,
    **PIPELINE_PROGRAMS,
}
