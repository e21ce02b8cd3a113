"""The recipe `hf-bf16` beside transformers in torch.bfloat16 on the CPU; writes bench/hf_bf16.md.

    python bench/hf_bf16.py [CHECKPOINT ...] [--out FILE]

Each operation is given transformers' own input of it, and backward a cotangent, so that no difference is
carried on.  Where the order of operations is determined (casts, sums and products of two bfloat16, sums term
by term) every element has to be equal.  Elsewhere torch adds in float32 in an order of its own, or has an
elementary function of its own, and an element is within its tolerance if it is between the roundings of
v - e and v + e: v is the value in float64, e bounds what float32 can add (`error` of each step below).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as modeling

import refimpl
from refimpl.checkpoint import DictWeights, VirtualWeights, open_folder, write
from refimpl.config import Choices
from refimpl.layers import attention, embedding, experts, gate, linear, loss, mlp, moe, norm, rope
from refimpl.layers.context import Context
from refimpl.layers.ops import DEEPSEEK_V3
from refimpl.model import Model
from refimpl.numerics import sites
from refimpl.numerics.formats import BF16, FP32, Format, round_to
from refimpl.numerics.gradients import Gradients
from refimpl.numerics.precision import arithmetic

ROOT = Path(__file__).parents[1]
RECORDED = ROOT / "tests" / "recordings" / "models"
NAMES = ("A01_v3_base", "A02_v3_noqlora_yarn", "A03_v3_yarn_mscale", "A04_v3_eps_bf16", "A05_v3_realrope")
U = 2.0**-24  # float32's unit roundoff
FUNCTION = 4.0  # units in the last place that an elementary function of float32 may be off
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Step:
    """One tensor: what transformers has, what the recipe has, and between what it may lie."""

    place: str
    theirs: Array
    ours: Array
    low: Array | None = None  # None: every element has to be equal
    high: Array | None = None

    @property
    def equal(self) -> Array:
        same: Array = self.theirs == self.ours
        return same

    @property
    def within(self) -> Array:
        if self.low is None or self.high is None:
            return self.equal
        return (self.low <= self.theirs) & (self.theirs <= self.high)


def between(
    place: str, theirs: Array, ours: Array, v: Array, error: Array, fmt: Format | None = BF16
) -> Step:
    """A step whose value is v up to an error, then rounded."""
    low, high = v - error, v + error
    if fmt is not None:
        low, high = round_to(low, fmt), round_to(high, fmt)
    return Step(place, theirs, ours, low, high)


def growth(terms: int) -> float:
    """What a sum of so many products in float32, in any order, is off by, over the sum of magnitudes."""
    n = terms + 1
    return n * U / (1.0 - n * U)


def numbers(x: torch.Tensor) -> Array:
    return x.detach().to(torch.float64).numpy()


def tensor(x: Array) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64).to(torch.bfloat16)


def leaf(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clone().requires_grad_(x.is_floating_point())


class Capture(TorchFunctionMode):
    """Writes down what every function gives, and keeps its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, torch.Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.requires_grad:
            out.retain_grad()
            self.calls.append((func.__name__, out))
        return out

    def of(self, *names: str) -> list[torch.Tensor]:
        return [out for name, out in self.calls if name in names]


class Recorded:
    """A checkpoint in both, and what transformers' modules were given in a forward pass."""

    def __init__(self, folder: Path, shape: tuple[int, int] = (2, 12), seed: int = 0) -> None:
        self.config, stored = open_folder(folder)
        self.grouped = self.config.moe_intermediate_size % 8 == 0
        self.weights = {
            name: np.asarray(stored[name], np.float32)
            if name.endswith("e_score_correction_bias")
            else round_to(stored[name], BF16).astype(np.float32)
            for name in stored
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.theirs = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.bfloat16,
                attn_implementation="eager",
                # torch's grouped_mm wants rows of 16 bytes; batched_mm casts at the same places forward
                experts_implementation="grouped_mm" if self.grouped else "batched_mm",
            )
        self.rng = np.random.default_rng(seed)
        self.ids = self.rng.integers(0, self.config.vocab_size, shape)
        self.ids[0, 5] = self.ids[0, 2]  # a token twice: the embedding's gradient is a sum
        self.given: dict[str, list[torch.Tensor]] = {}
        self.rotations: list[tuple[Any, ...]] = []
        self.attended: list[tuple[Any, ...]] = []
        self._record()

    def _record(self) -> None:
        def note(name: str) -> Callable[..., None]:
            def hook(module: Any, args: Any, kwargs: Any, out: Any) -> None:
                x = args[0] if args else kwargs.get("hidden_states", kwargs.get("input_ids"))
                y = out[0] if isinstance(out, tuple) else out
                if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
                    self.given[name] = [x.detach(), y.detach(), *[a for a in args[1:] if a is not None]]

            return hook

        handles = [
            module.register_forward_hook(note(name), with_kwargs=True)
            for name, module in self.theirs.named_modules()
        ]
        kept = {
            name: getattr(modeling, name)
            for name in (
                "apply_rotary_pos_emb_interleave",
                "apply_rotary_pos_emb",
                "eager_attention_forward",
            )
        }

        def rotating(call: Any) -> Any:
            def noted(*args: Any) -> Any:
                self.rotations.append((call, *(x.detach() for x in args[:4])))
                return call(*args)

            return noted

        def attending(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **rest: Any) -> Any:
            self.attended.append((module, q.detach(), k.detach(), v.detach(), mask, scaling))
            return kept["eager_attention_forward"](module, q, k, v, mask, scaling, **rest)

        self.attend = kept["eager_attention_forward"]
        try:
            for name, call in kept.items():
                setattr(modeling, name, attending if name == "eager_attention_forward" else rotating(call))
            self.logits = numbers(self.theirs(input_ids=torch.tensor(self.ids)).logits)
        finally:
            for name, call in kept.items():
                setattr(modeling, name, call)
            for handle in handles:
                handle.remove()

    def context(self, path: str, precision: str = "hf-bf16") -> Context:
        model = self.model(precision)
        return Context(model.ar, DEEPSEEK_V3, model._parameters, self.config, model.choices, path)

    def model(self, precision: Any = "hf-bf16") -> Model:
        weights = DictWeights(self.config, self.weights)
        return Model(self.config, weights, arithmetic(precision), Choices.named("hf"))

    def cotangent(self, shape: Any) -> Array:
        return round_to(self.rng.standard_normal(shape), BF16)

    def modules(self, kind: type) -> Iterator[tuple[str, Any]]:
        for name, module in self.theirs.named_modules():
            if isinstance(module, kind) and name in self.given:
                yield name, module


def rows(x: torch.Tensor) -> Array:
    """(..., D)  ->  (T, D)."""
    return numbers(x).reshape(-1, x.shape[-1])


def norms(r: Recorded) -> Iterator[Step]:
    for path, module in r.modules(modeling.DeepseekV3RMSNorm):
        x = leaf(r.given[path][0])
        dy = r.cotangent(tuple(x.shape))
        y = module(x)
        module.weight.grad = None
        y.backward(tensor(dy))
        c = r.context(path)
        flat, gain, dflat = rows(x), r.weights[f"{path}.weight"].astype(float), dy.reshape(-1, dy.shape[-1])
        ours, saved = norm.forward(c, flat, module.variance_epsilon)
        grads = Gradients(c.ar)
        dx = norm.backward(c, dflat, saved, grads)
        width = flat.shape[1]
        whole = flat / np.sqrt((flat**2).mean(-1, keepdims=True) + module.variance_epsilon)
        share = growth(width) + 4 * U
        ends = [round_to(round_to(whole * (1 + s * share), BF16) * gain, BF16) for s in (-1, 1)]
        yield Step("norm.out", rows(y), ours, np.minimum(*ends), np.maximum(*ends))
        # dx = r (dn - n mean(dn n)): every term has the error of the mean and of a few operations.
        inv = whole[:, :1] * 0 + 1 / np.sqrt((flat**2).mean(-1, keepdims=True) + module.variance_epsilon)
        dn = round_to(dflat * gain, BF16)
        v = inv * (dn - whole * (dn * whole).mean(-1, keepdims=True))
        error = (
            inv
            * (np.abs(dn) + 2 * np.abs(whole) * np.abs(dn * whole).mean(-1, keepdims=True))
            * (2 * growth(width) + 12 * U)
        )
        yield between("d.norm.in", rows(x.grad), dx, v, error)
        products = round_to(dflat * round_to(whole, BF16), BF16)
        theirs = numbers(module.weight.grad)
        yield between(
            "grad of a gain",
            theirs,
            grads.reduce()[f"{path}.weight"],
            products.sum(0),
            growth(len(flat)) * np.abs(products).sum(0),
        )


def linears(r: Recorded) -> Iterator[Step]:
    for path, module in r.modules(torch.nn.Linear):
        x = leaf(r.given[path][0])
        y = module(x)
        dy = r.cotangent(tuple(y.shape))
        module.weight.grad = None
        y.backward(tensor(dy))
        c = r.context(path)
        operand = c.ar.operand(sites.read_by(c.linear), rows(x))
        ours, saved = linear.forward(c, operand)
        grads = Gradients(c.ar)
        dflat, w = dy.reshape(-1, dy.shape[-1]), r.weights[f"{path}.weight"].astype(float)
        dx = linear.backward(c, dflat, saved, grads)
        for place, theirs, own, a, b in (
            ("linear: out", rows(y), ours, rows(x), w),
            ("linear: dx", rows(x.grad), dx, dflat, w.T),
            (
                "linear: grad",
                numbers(module.weight.grad),
                grads.reduce()[f"{path}.weight"],
                dflat.T,
                rows(x).T,
            ),
        ):
            yield product(place, theirs, own, a, b)


def product(place: str, theirs: Array, ours: Array, a: Array, b: Array, fmt: Format | None = BF16) -> Step:
    """a b^T, accumulated in float32."""
    bt = np.swapaxes(b, -1, -2)
    return between(place, theirs, ours, a @ bt, growth(a.shape[-1]) * (np.abs(a) @ np.abs(bt)), fmt)


def rotations(r: Recorded) -> Iterator[Step]:
    for layer, (call, q, k, cos, sin) in enumerate(r.rotations):
        c = r.context(f"model.layers.{layer}.self_attn", "hf-bf16@float32")
        half = q.shape[-1] // 2
        size = (*r.ids.shape, cos.shape[-1])
        given = (rows(t.expand(size))[:, None, :half].astype(np.float32) for t in (cos, sin))
        table = rope.Tables(*given)
        ends = [leaf(q), leaf(k)]
        outs = call(*ends, cos, sin)
        interleaved = r.config.rope_interleave
        for x, y in zip(ends, outs, strict=True):
            dy = r.cotangent(tuple(y.shape))
            y.backward(tensor(dy), retain_graph=True)
            assert x.grad is not None
            yield Step("rope.out", heads(y), apart(rope.forward(c, heads(x), table), interleaved))
            back = joined(heads(torch.tensor(dy)), interleaved)
            yield Step("d.rope.in", heads(x.grad), rope.backward(c, back, table))
        positions = np.arange(r.ids.shape[1])
        ours = rope.tables(r.context(""), np.tile(positions, len(r.ids)))
        angle = np.abs(np.outer(np.tile(positions, len(r.ids)), DEEPSEEK_V3.frequencies(r.config, c.choices)))
        factor = DEEPSEEK_V3.cos_sin_factor(r.config, c.choices)
        exact = rope.tables(r.context("", "exact"), np.tile(positions, len(r.ids)))
        error = factor * U * (2 * FUNCTION * angle + FUNCTION)
        for theirs, own, v in ((cos, ours.cos, exact.cos), (sin, ours.sin, exact.sin)):
            theirs = np.broadcast_to(numbers(theirs), (*r.ids.shape, 2 * half))[..., :half]
            yield between("rope.table", theirs.reshape(-1, half), own[:, 0], v[:, 0], error)


def heads(x: torch.Tensor) -> Array:
    """(B, H, S, R)  ->  float32 (T, H, R)."""
    swapped = numbers(x).swapaxes(1, 2)
    return swapped.reshape(-1, *swapped.shape[2:]).astype(np.float32)


def apart(x: Array, interleaved: bool) -> Array:
    """Pairs side by side  ->  halves, as transformers hands them out."""
    return np.concatenate([x[..., 0::2], x[..., 1::2]], -1) if interleaved else x


def joined(x: Array, interleaved: bool) -> Array:
    half = x.shape[-1] // 2
    return np.stack([x[..., :half], x[..., half:]], -1).reshape(x.shape) if interleaved else x


def attentions(r: Recorded) -> Iterator[Step]:
    for layer, (module, *qkv, mask, scaling) in enumerate(r.attended):
        ends = [leaf(x) for x in qkv]
        with Capture() as seen:
            out, _ = r.attend(module, *ends, mask, scaling)
            dout = r.cotangent(tuple(out.shape))
            out.backward(tensor(dout))
        (products, _), (scores,) = seen.of("matmul"), seen.of("mul", "__mul__")
        softmax, probs = seen.of("softmax")[0], seen.of("to")[-1]
        q, k, v = (numbers(x) for x in ends)
        size = q.shape[2]
        allowed = np.tril(np.ones((1, 1, size, size), bool))
        fast, c = (r.context(f"model.layers.{layer}.self_attn", p) for p in ("hf-bf16@float32", "hf-bf16"))
        own, saved = attention.forward(c, q, k, v, scaling, allowed)
        yield product(
            "attention.products", numbers(products), c.ar.fused("attention.products", c.ar.matmul(q, k)), q, k
        )
        scaled = fast.ar.at("attention.scores", numbers(products).astype(np.float32) * scaling)
        yield Step("attention.scores, given products", numbers(scores), scaled)
        z = np.where(allowed, numbers(scores), -np.inf)
        p = np.exp(z - z.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        # exp of a difference of which float32 rounds the argument, a sum, a division
        span = np.where(allowed, np.abs(z - z.max(-1, keepdims=True)), 0)
        error = p * (growth(size) + U * (span + 2 * FUNCTION))
        ours = c.ar.fused("attention.softmax", c.ar.softmax(z))
        yield between("attention.softmax, given scores", numbers(softmax), ours, p, error, FP32)
        yield Step(
            "attention.probs, given softmax", numbers(probs), c.ar.at("attention.probs", numbers(softmax))
        )
        theirs = numbers(out).swapaxes(1, 2)
        given = numbers(probs)
        ours = c.ar.at("attention.out", c.ar.matmul(given, v.swapaxes(-1, -2)))
        yield product("attention.out, given probs", theirs, ours, given, v.swapaxes(-1, -2))
        yield Step("attention: whole, out", theirs, own, *loose(theirs, own))
        # backward, from the layer itself with transformers' softmax and probabilities
        do = dout.swapaxes(1, 2)
        kept = attention.Saved(
            saved.query, saved.key, saved.value, None, c.keep("attention.probs", given), numbers(softmax)
        )
        dq, dk, dv = attention.backward(c, do, kept, scaling)
        yield product(
            "d.attention.value", numbers(ends[2].grad), dv, given.swapaxes(-1, -2), do.swapaxes(-1, -2)
        )
        dprobs = numbers(probs.grad)
        yield product("d.attention.probs", dprobs, c.ar.at("d.attention.probs", c.ar.matmul(do, v)), do, v)
        s = numbers(softmax)
        inner = (dprobs * s).sum(-1, keepdims=True)
        error = s * (np.abs(dprobs) + np.abs(dprobs * s).sum(-1, keepdims=True)) * (growth(size) + 4 * U)
        ours = c.ar.fused("d.attention.softmax", c.ar.dsoftmax(s, dprobs))
        yield between("d.attention.softmax", numbers(scores.grad), ours, s * (dprobs - inner), error)
        ds = numbers(products.grad)
        scaled = fast.ar.at("d.attention.scores", numbers(scores.grad).astype(np.float32) * scaling)
        yield Step("d.attention.scores, given d.softmax", ds, scaled)
        for name, grad, own, a, b in (
            ("query", ends[0].grad, dq, ds, k.swapaxes(-1, -2)),
            ("key", ends[1].grad, dk, ds.swapaxes(-1, -2), q.swapaxes(-1, -2)),
        ):
            exact = c.ar.at(f"d.attention.{name}", c.ar.matmul(a, b))
            yield product(f"d.attention.{name}, given d.scores", numbers(grad), exact, a, b)
            yield Step(f"attention: whole, d{name}", numbers(grad), own, *loose(numbers(grad), own))


def loose(theirs: Array, ours: Array) -> tuple[Array, Array]:
    """For what was rounded several times on the way: reported, and held to 2^-5 of the largest."""
    room = 2.0**-5 * np.abs(ours).max()
    return ours - room, ours + room


def mlps(r: Recorded) -> Iterator[Step]:
    for path, module in r.modules(modeling.DeepseekV3MLP):
        x = leaf(r.given[path][0])
        dy = r.cotangent(tuple(x.shape))
        with Capture() as seen:
            y = module(x)
            y.backward(tensor(dy))
        fast, c = r.context(path, "hf-bf16@float32"), r.context(path)
        (g, u, _), silu, act = seen.of("linear"), seen.of("silu")[0], seen.of("mul", "__mul__")[-1]
        gate_value, up_value, silu_value = rows(g), rows(u), rows(silu)
        s = 1 / (1 + np.exp(-gate_value))
        own = c.ar.fused(c.site("swiglu.silu"), gate_value * c.ar.sigmoid(gate_value))
        error = np.abs(gate_value * s) * U * (np.abs(gate_value) + 2 * FUNCTION)
        yield between("silu", silu_value, rows(silu) * 0 + own, gate_value * s, error)
        product_of = fast.ar.at("swiglu.act", (silu_value * up_value).astype(np.float32))
        yield Step("swiglu.act, given silu", rows(act), product_of)
        da = numbers(act.grad).reshape(act.shape[0] * act.shape[1], -1)
        yield Step(
            "d.up, given silu", rows(u.grad), fast.ar.at("up_proj.dy", (da * silu_value).astype(np.float32))
        )
        ds = rows(silu.grad)
        yield Step(
            "d.silu", ds, fast.ar.fused(f"d.{c.site('swiglu.silu')}", (da * up_value).astype(np.float32))
        )
        v = ds * s * (1 + gate_value * (1 - s))
        error = np.abs(ds) * s * (1 + 2 * np.abs(gate_value)) * U * (np.abs(gate_value) + 4 * FUNCTION)
        yield between("d.gate, given d.silu", rows(g.grad), round_to(v, BF16), v, error)
        site = sites.read_by(c.at("gate_proj").linear)
        ours, saved = mlp.forward(c, c.ar.operand(site, rows(x)))
        dx = mlp.backward(c, dy.reshape(-1, dy.shape[-1]), saved, Gradients(c.ar))
        yield Step("mlp: whole, out", rows(y), ours, *loose(rows(y), ours))
        yield Step("mlp: whole, dx", rows(x.grad), dx, *loose(rows(x.grad), dx))


def gates(r: Recorded) -> Iterator[Step]:
    for path, module in r.modules(modeling.DeepseekV3TopkRouter):
        x = leaf(r.given[path][0])
        logits, weight, idx = module(x)
        dw = r.rng.standard_normal(tuple(weight.shape)).astype(np.float32)
        module.weight.grad = None
        weight.backward(torch.tensor(dw))
        c = r.context(path)
        given = {path: (idx.numpy(), None)}
        free = gate.forward(c, rows(x))[0]
        c = Context(c.ar, gate.forced(c.ops, given), c.parameters, c.config, c.choices, path)
        _, own, saved = c.ops.gate.forward(c, rows(x))
        w = r.weights[f"{path}.weight"].astype(float)
        assert saved.logits is not None
        yield product("gate.logits", numbers(logits), saved.logits, rows(x), w, FP32)
        yield Step("gate: chosen experts", np.sort(idx.numpy(), 1), np.sort(free, 1))
        noise = growth(w.shape[1]) * (np.abs(rows(x)) @ np.abs(w).T).max() + (8 + FUNCTION) * U
        yield between("gate.weights", numbers(weight), own, own, 4 * noise * np.abs(own), None)
        grads = Gradients(c.ar)
        dx = c.ops.gate.backward(c, dw.astype(float), saved, grads)
        yield Step("gate: whole, dx", rows(x.grad), dx, *loose(rows(x.grad), dx))
        dweight = grads.reduce()[f"{path}.weight"]
        yield Step("gate: whole, grad", numbers(module.weight.grad), dweight, *loose(dweight, dweight))


def mixtures(r: Recorded) -> Iterator[Step]:
    """Routed experts and the whole mixture.  The backward pass of experts is that of grouped_mm."""
    for path, module in r.modules(modeling.DeepseekV3MoE):
        x = leaf(r.given[path][0])
        dy = r.cotangent(tuple(x.shape))
        flat, dflat = rows(x), dy.reshape(-1, dy.shape[-1])
        with torch.no_grad():
            _, weight, idx = module.gate(x)
        ends = [leaf(x.detach().reshape(-1, x.shape[-1])), leaf(weight)]
        with Capture() as seen:
            y = module.experts(ends[0], idx, ends[1])
            y.backward(tensor(dflat))
        c = r.context(f"{path}.experts")
        operand = c.ar.operand("experts.in", flat)
        ours, saved = experts.forward(c, operand, idx.numpy(), numbers(weight))
        weighted = next(t for t in reversed(seen.of("mul", "__mul__")) if t.dtype == torch.float32)
        slots = seen.of("view")[-1]
        terms = numbers(slots.reshape(*idx.shape, -1))
        v, error = terms.sum(1), growth(idx.shape[1]) * np.abs(terms).sum(1)
        assert weighted.dtype == torch.float32
        yield between("experts.out, given weighted outputs", rows(y), round_to(v, BF16), v, error)
        yield Step("experts: whole, out", rows(y), ours, *loose(rows(y), ours))
        if r.grouped:
            dx, dweight = experts.backward(c, dflat, saved, Gradients(c.ar))
            yield Step("experts: whole, dx", rows(ends[0].grad), dx, *loose(dx, dx))
            yield Step("experts: whole, dweight", numbers(ends[1].grad), dweight, *loose(dweight, dweight))
            slot = seen.of("__getitem__")[0]  # the rows of x, by expert
            order = torch.sort(idx.reshape(-1))[1].numpy()  # as transformers does; it is not stable
            inner = np.empty((*idx.shape, flat.shape[1]))
            inner.reshape(-1, flat.shape[1])[order] = rows(slot.grad)
            places = np.argsort(idx.numpy(), 1, kind="stable")
            yield Step(
                "d.experts.in, given slots",
                rows(ends[0].grad),
                experts.added(c.ar, "d.experts.sum", inner, places),
            )
            whole_x = leaf(x)
            whole_y = module(whole_x)
            whole_y.backward(tensor(dy))
            forced = gate.forced(DEEPSEEK_V3, {f"{path}.gate": (idx.numpy(), None)})
            at = Context(c.ar, forced, c.parameters, c.config, c.choices, path)
            own, kept = moe.forward(at, flat)
            dx = moe.backward(at, dflat, kept, Gradients(c.ar))
            yield Step("moe: whole, out", rows(whole_y), own, *loose(own, own))
            yield Step("moe: whole, dx", rows(whole_x.grad), dx, *loose(dx, dx))
        routed, shared = module.experts(ends[0], idx, weight), module.shared_experts(x)
        whole = rows(module(x))
        yield Step("moe.out, given both", whole, c.ar.at("moe.out", rows(routed) + rows(shared)))


def ends(r: Recorded) -> Iterator[Step]:
    """The embedding with its gradient, residuals, and the loss."""
    module = r.theirs.model.embed_tokens
    y = module(torch.tensor(r.ids))
    dy = r.cotangent(tuple(y.shape))
    module.weight.grad = None
    y.backward(tensor(dy))
    c = r.context("model.embed_tokens")
    ours, saved = embedding.forward(c, r.ids.reshape(-1))
    grads = Gradients(c.ar)
    embedding.backward(c, dy.reshape(-1, dy.shape[-1]), saved, grads)
    yield Step("embed.out", rows(y), ours)
    yield Step("embedding: grad", numbers(module.weight.grad), grads.reduce()["model.embed_tokens.weight"])
    for layer in range(r.config.num_hidden_layers):
        path = f"model.layers.{layer}"
        x, out = r.given[path][:2]
        attended, inner = r.given[f"{path}.self_attn"][1], r.given[f"{path}.mlp"][1]
        h = r.given[f"{path}.post_attention_layernorm"][0]
        yield Step("residual", rows(h), c.ar.at("residual", rows(x) + rows(attended)))
        yield Step("residual", rows(out), c.ar.at("residual", rows(h) + rows(inner)))
    z = leaf(r.given["lm_head"][1])
    targets = torch.tensor(np.roll(r.ids, -1)).reshape(-1)
    torch.nn.functional.cross_entropy(z.float().reshape(-1, z.shape[-1]), targets).backward()
    saved_loss = loss.forward(c, rows(z), targets.numpy(), targets.numel())[1]
    exact = loss.backward(r.context("", "exact"), 1.0, saved_loss)
    error = (np.abs(exact) + 1 / targets.numel()) * (growth(z.shape[-1]) + 4 * FUNCTION * U)
    yield between("d.logits", rows(z.grad), loss.backward(c, 1.0, saved_loss), exact, error)


STEPS = (ends, norms, linears, rotations, attentions, mlps, gates, mixtures)


def whole(r: Recorded) -> Iterator[tuple[str, int, int, float]]:
    """Logits of the whole model, nothing re-entered: (routing, elements, equal, largest difference)."""
    chosen = {}
    for name, module in r.modules(modeling.DeepseekV3TopkRouter):
        with torch.no_grad():
            chosen[int(name.split(".")[2])] = module(r.given[name][0])[2].numpy().reshape(*r.ids.shape, -1)
    for name, routing in (("free", None), ("forced", chosen)):
        logits = r.model().forward(r.ids, routing=routing, trace=()).logits
        gap = float(np.abs(logits - r.logits).max() / np.abs(r.logits).max())
        yield name, logits.size, int((logits == r.logits).sum()), gap


def measured(r: Recorded) -> dict[str, list[int]]:
    """place -> elements, equal, within, and 1 where every element has to be equal."""
    table: dict[str, list[int]] = {}
    for steps in STEPS:
        for step in steps(r):
            row = table.setdefault(step.place, [0, 0, 0, int(step.low is None)])
            for i, count in enumerate((step.theirs.size, step.equal.sum(), step.within.sum())):
                row[i] += int(count)
    return table


def virtual(folder: Path, name: str = "tiny-v3") -> Path:
    """A preset's virtual weights, written as a checkpoint: its experts' width suits grouped_mm."""
    own = refimpl.preset(name)
    weights = VirtualWeights(own)
    write(folder / "model.safetensors", {key: np.asarray(weights[key], np.float32) for key in weights})
    (folder / "config.json").write_text(json.dumps(own.to_dict()))
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    given = parser.parse_args()
    total: dict[str, list[int]] = {}
    ran = []
    made = virtual(Path(tempfile.mkdtemp(prefix="tiny-v3-")))
    for folder in given.checkpoints or [*(RECORDED / name for name in NAMES), made]:
        r = Recorded(folder)
        for place, row in measured(r).items():
            own = total.setdefault(place, [0, 0, 0, row[3]])
            own[:3] = [a + b for a, b in zip(own, row[:3], strict=False)]
        ran += [(folder.name, *found) for found in whole(r)]
    given.out.write_text(page(total, ran))
    return int(any(row[1 if row[3] else 2] < row[0] for row in total.values()))


def page(total: dict[str, list[int]], ran: list[tuple[str, str, int, int, float]]) -> str:
    """The tables, as Markdown."""
    lines = ["# hf-bf16 beside transformers in bfloat16", "", "`python bench/hf_bf16.py` wrote this.", ""]
    lines += ["| place | order of operations | elements | bit-equal | within |", "|---|---|---:|---:|---:|"]
    for place, (n, equal, within, fixed) in total.items():
        order = "determined" if fixed else "whole, 2^-5" if "whole" in place else "torch's own"
        lines.append(f"| {place} | {order} | {n} | {equal / n:.3%} | {within / n:.3%} |")
    lines += ["", "Whole models, nothing re-entered (logits):", ""]
    lines += ["| checkpoint | routing | elements | bit-equal | largest difference / largest logit |"]
    lines += ["|---|---|---:|---:|---:|"]
    lines += [f"| {name} | {how} | {n} | {equal / n:.1%} | {gap:.1e} |" for name, how, n, equal, gap in ran]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
