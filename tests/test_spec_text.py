"""An implementation from the text of SPEC.md alone gives the same bits as `exact`.

Everything below is written from the clauses, with exact rational sums and mpmath for the functions, and it
shares no code with the package; elementwise operations are those of IEEE.  It is slow, so the model is small.
"""

# ruff: noqa: N803, N806 - one-letter names are the alphabet of SPEC.md

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
import pytest
import support

import refimpl

Array = Any


def nearest(exact: Fraction) -> float:
    return float(exact)  # Python rounds a quotient of integers correctly


def contract(a: Array, b: Array) -> Array:
    """EXACT-1: (M, K), (N, K) -> (M, N)."""
    x = [[Fraction(float(v)) for v in row] for row in a]
    y = [[Fraction(float(v)) for v in row] for row in b]
    return np.array(
        [[nearest(sum((p * q for p, q in zip(r, s, strict=True)), Fraction(0))) for s in y] for r in x]
    )


def total(x: Array) -> Array:
    """EXACT-1, over the last axis."""
    flat = x.reshape(-1, x.shape[-1])
    sums = [nearest(sum((Fraction(float(v)) for v in row), Fraction(0))) for row in flat]
    return np.array(sums).reshape(x.shape[:-1])


def mean(x: Array) -> Array:
    flat = x.reshape(-1, x.shape[-1])
    means = [nearest(sum((Fraction(float(v)) for v in row), Fraction(0)) / len(row)) for row in flat]
    return np.array(means).reshape(x.shape[:-1])


def dot(a: Array, b: Array) -> Array:
    pairs = zip(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]), strict=True)
    dots = [
        nearest(
            sum((Fraction(float(p)) * Fraction(float(q)) for p, q in zip(r, s, strict=True)), Fraction(0))
        )
        for r, s in pairs
    ]
    return np.array(dots).reshape(a.shape[:-1])


def elementary(name: str) -> Callable[[Array], Array]:
    """EXACT-5."""

    def one(x: float) -> float:
        if name == "exp" and x == -math.inf:
            return 0.0
        with mpmath.workprec(400):
            return float(getattr(mpmath, name)(mpmath.mpf(x)))

    return np.vectorize(one, otypes=[np.float64])


exp, log, sin, cos = map(elementary, ("exp", "log", "sin", "cos"))


def sigmoid(x: Array) -> Array:
    """EXACT-4."""
    e = exp(-np.abs(x))
    return np.where(x >= 0, 1.0 / (1.0 + e), e / (1.0 + e))


class Text:
    """Sections 6 to 17 for one configuration, forward and backward."""

    def __init__(self, config: dict[str, Any], weights: dict[str, Array]) -> None:
        self.c, self.w = config, weights
        self.grads: dict[str, Array] = {}
        self.seen: dict[str, Array] = {}

    # NORM-1, NORM-2

    def norm(self, x: Array, name: str, eps: float) -> Array:
        inv_rms = 1.0 / np.sqrt(mean(x * x) + eps)[:, None]
        return x * inv_rms * self.w[name]

    def norm_backward(self, dy: Array, x: Array, name: str, eps: float) -> Array:
        inv_rms = 1.0 / np.sqrt(mean(x * x) + eps)[:, None]
        normed = x * inv_rms
        self.grads[name] = dot(dy.T, normed.T)
        dn = dy * self.w[name]
        return inv_rms * (dn - normed * mean(dn * normed)[:, None])

    # LINEAR-1

    def linear(self, x: Array, name: str) -> Array:
        return contract(x, self.w[name])

    def linear_backward(self, dy: Array, x: Array, name: str) -> Array:
        self.grads[name] = contract(dy.T, x.T)
        return contract(dy, self.w[name].T)

    # ROPE-2 to ROPE-7

    def tables(self, positions: Array) -> tuple[Array, Array]:
        c, yarn = self.c, self.c.get("rope_scaling")
        R, theta = c["qk_rope_head_dim"], c["rope_theta"]

        def ln(x: float) -> float:
            return float(log(np.array(x)))

        inv = np.array([float(exp(np.array(-(2 * m / R) * ln(theta)))) for m in range(R // 2)])
        self.scale, factor = 1.0 / math.sqrt(c["qk_nope_head_dim"] + R), 1.0
        if yarn:
            s, original = yarn["factor"], yarn["original_max_position_embeddings"]

            def dimension(turns: float) -> float:
                return R * ln(original / (turns * 2.0 * math.pi)) / (2.0 * ln(theta))

            def mscale(m: float) -> float:
                return 1.0 if s <= 1 else 0.1 * m * ln(s) + 1.0

            low = max(float(math.floor(dimension(yarn["beta_fast"]))), 0.0)
            high = min(float(math.ceil(dimension(yarn["beta_slow"]))), R - 1.0)
            high = low + 0.001 if high == low else high
            ramp = np.array([min(max((m - low) / (high - low), 0.0), 1.0) for m in range(R // 2)])
            inv = inv / s * ramp + inv * (1.0 - ramp)
            self.scale = self.scale * mscale(yarn["mscale_all_dim"]) * mscale(yarn["mscale_all_dim"])
            factor = mscale(yarn["mscale"]) / mscale(yarn["mscale_all_dim"])
        angle = positions.astype(np.float64)[:, None] * inv
        return cos(angle) * factor, sin(angle) * factor

    def rotate(self, x: Array, cosine: Array, sine: Array) -> Array:
        """(T, H, R), pairs (2m, 2m + 1), or (m, m + R/2)."""
        half = x.shape[-1] // 2
        near = self.c.get("rope_interleave", True)
        first, second = (slice(0, None, 2), slice(1, None, 2)) if near else (slice(half), slice(half, None))
        y, x0, x1 = np.empty_like(x), x[..., first], x[..., second]
        y[..., first] = x0 * cosine[:, None] - x1 * sine[:, None]
        y[..., second] = x0 * sine[:, None] + x1 * cosine[:, None]
        return y

    # MASK-2, MASK-3

    @staticmethod
    def positions(segments: Array) -> Array:
        return np.array(
            [[sum(row[j] == row[i] for j in range(i)) for i in range(len(row))] for row in segments]
        )

    @staticmethod
    def sees(row: Array, i: int, j: int) -> bool:
        return j == i or (j < i and row[i] == row[j])

    # MLA-1 to MLA-9

    def attention(self, x: Array, at: str, segments: Array) -> tuple[Array, dict[str, Any]]:
        c = self.c
        H, P, R = c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"]
        C, Wv, (B, S), T = c["kv_lora_rank"], c["v_head_dim"], segments.shape, len(x)
        k: dict[str, Any] = {"x": x}
        if c["q_lora_rank"]:
            k["q_down"] = self.linear(x, f"{at}.q_a_proj.weight")
            k["c_q"] = self.norm(k["q_down"], f"{at}.q_a_layernorm.weight", 1e-6)
            q = self.linear(k["c_q"], f"{at}.q_b_proj.weight")
        else:
            q = self.linear(x, f"{at}.q_proj.weight")
        q = q.reshape(T, H, P + R)
        down = self.linear(x, f"{at}.kv_a_proj_with_mqa.weight")
        k["c_raw"] = down[:, :C]
        k["c_kv"] = self.norm(k["c_raw"], f"{at}.kv_a_layernorm.weight", 1e-6)
        up = self.linear(k["c_kv"], f"{at}.kv_b_proj.weight").reshape(T, H, P + Wv)
        q_pe, k_pe = self.rotate(q[..., P:], *self.rope), self.rotate(down[:, None, C:], *self.rope)
        query = np.concatenate([q[..., :P], q_pe], -1)
        key = np.concatenate([up[..., :P], np.repeat(k_pe, H, 1)], -1)
        value = up[..., P:]
        probs, heads, scores = np.zeros((B, H, S, S)), np.zeros((T, H, Wv)), np.zeros((B, H, S, S))
        for b in range(B):
            rows = slice(b * S, b * S + S)
            allowed = np.array([[self.sees(segments[b], i, j) for j in range(S)] for i in range(S)])
            for h in range(H):
                s = np.where(allowed, contract(query[rows, h], key[rows, h]) * self.scale, -np.inf)
                exps = exp(s - s.max(-1, keepdims=True))
                scores[b, h], probs[b, h] = s, exps / total(exps)[:, None]
                heads[rows, h] = contract(probs[b, h], value[rows, h].T)
        k |= {"query": query, "key": key, "value": value, "probs": probs, "heads": heads.reshape(T, H * Wv)}
        self.seen |= {f"{at}.scores": scores, f"{at}.probs": probs, f"{at}.q_pe": q_pe, f"{at}.k_pe": k_pe}
        return self.linear(k["heads"], f"{at}.o_proj.weight"), k

    def attention_backward(self, du: Array, at: str, k: dict[str, Any]) -> Array:
        c = self.c
        H, P = c["num_attention_heads"], c["qk_nope_head_dim"]
        B, T, S = len(k["probs"]), len(du), k["probs"].shape[-1]
        do = self.linear_backward(du, k["heads"], f"{at}.o_proj.weight").reshape(T, H, -1)
        dquery, dkey, dvalue = np.empty_like(k["query"]), np.empty_like(k["key"]), np.empty_like(k["value"])
        for b in range(B):
            rows = slice(b * S, b * S + S)
            for h in range(H):
                p = k["probs"][b, h]
                dprobs = contract(do[rows, h], k["value"][rows, h])
                dscores = p * (dprobs - dot(dprobs, p)[:, None]) * self.scale
                dquery[rows, h] = contract(dscores, k["key"][rows, h].T)
                dkey[rows, h] = contract(dscores.T, k["query"][rows, h].T)
                dvalue[rows, h] = contract(p.T, do[rows, h].T)
        cosine, sine = self.rope
        dk_raw = self.rotate(total(dkey[..., P:].swapaxes(1, 2))[:, None], cosine, -sine)[:, 0]
        dup = np.concatenate([dkey[..., :P], dvalue], -1).reshape(T, -1)
        dc_kv = self.linear_backward(dup, k["c_kv"], f"{at}.kv_b_proj.weight")
        dc_raw = self.norm_backward(dc_kv, k["c_raw"], f"{at}.kv_a_layernorm.weight", 1e-6)
        ddown = np.concatenate([dc_raw, dk_raw], -1)
        dx_kv = self.linear_backward(ddown, k["x"], f"{at}.kv_a_proj_with_mqa.weight")
        dq = np.concatenate([dquery[..., :P], self.rotate(dquery[..., P:], cosine, -sine)], -1).reshape(T, -1)
        if not c["q_lora_rank"]:
            return self.linear_backward(dq, k["x"], f"{at}.q_proj.weight") + dx_kv
        dc_q = self.linear_backward(dq, k["c_q"], f"{at}.q_b_proj.weight")
        ddown = self.norm_backward(dc_q, k["q_down"], f"{at}.q_a_layernorm.weight", 1e-6)
        return self.linear_backward(ddown, k["x"], f"{at}.q_a_proj.weight") + dx_kv

    # MLP-1, MLP-2

    def mlp(self, x: Array, at: str) -> tuple[Array, dict[str, Any]]:
        gate, up = self.linear(x, f"{at}.gate_proj.weight"), self.linear(x, f"{at}.up_proj.weight")
        act = gate * sigmoid(gate) * up
        return self.linear(act, f"{at}.down_proj.weight"), {"x": x, "gate": gate, "up": up, "act": act}

    def mlp_backward(self, dy: Array, at: str, k: dict[str, Any]) -> Array:
        dact = self.linear_backward(dy, k["act"], f"{at}.down_proj.weight")
        s = sigmoid(k["gate"])
        silu = k["gate"] * s
        dup, dgate = dact * silu, dact * k["up"] * (s + silu * (1.0 - s))
        dx = self.linear_backward(dgate, k["x"], f"{at}.gate_proj.weight")
        return dx + self.linear_backward(dup, k["x"], f"{at}.up_proj.weight")

    # ROUTE-1 to ROUTE-7, ROUTE-9

    def gate(self, x: Array, at: str) -> tuple[Array, Array, dict[str, Any]]:
        c = self.c
        N, K, G = c["n_routed_experts"], c["num_experts_per_tok"], c["n_group"]
        logits = contract(x, self.w[f"{at}.weight"])
        if c["scoring_func"] == "sigmoid":
            scores = sigmoid(logits)
        else:
            exps = exp(logits - logits.max(-1, keepdims=True))
            scores = exps / total(exps)[:, None]
        biased = c["topk_method"] == "noaux_tc"
        choice = scores + self.w[f"{at}.e_score_correction_bias"] if biased else scores
        idx = np.empty((len(x), K), np.int64)
        for t, row in enumerate(choice.tolist()):
            groups = [sorted(row[g * N // G : (g + 1) * N // G], reverse=True) for g in range(G)]
            value = [group[0] + group[1] if biased else group[0] for group in groups]
            kept = sorted(range(G), key=lambda g: (-value[g], g))[: c["topk_group"]]
            masked = [v if e // (N // G) in kept else -math.inf for e, v in enumerate(row)]
            idx[t] = sorted(range(N), key=lambda e: (-masked[e], e))[:K]
        chosen = np.take_along_axis(scores, idx, -1)
        scale = c["routed_scaling_factor"]
        weight = chosen / (total(chosen) + 1e-20)[:, None] * scale if c["norm_topk_prob"] else chosen * scale
        self.seen |= {f"{at}.logits": logits, f"{at}.scores": scores}
        self.seen |= {f"{at}.topk_idx": idx, f"{at}.topk_weight": weight}
        return idx, weight, {"x": x, "scores": scores, "idx": idx, "chosen": chosen}

    def gate_backward(self, G: Array, at: str, k: dict[str, Any]) -> Array:
        c, scores = self.c, k["scores"]
        if c["norm_topk_prob"]:
            S = (total(k["chosen"]) + 1e-20)[:, None]
            G = (G - dot(G, k["chosen"] / S)[:, None]) / S
        dscores = np.zeros_like(scores)
        np.put_along_axis(dscores, k["idx"], G * c["routed_scaling_factor"], -1)
        if c["scoring_func"] == "sigmoid":
            dlogits = dscores * scores * (1.0 - scores)
        else:
            dlogits = scores * (dscores - dot(dscores, scores)[:, None])
        return self.linear_backward(dlogits, k["x"], f"{at}.weight")

    # MOE-1 to MOE-5

    def moe(self, x: Array, at: str) -> tuple[Array, dict[str, Any]]:
        idx, weight, gate = self.gate(x, f"{at}.gate")
        T, K = idx.shape
        slots, experts = np.zeros((T, K, x.shape[1])), {}
        for e in sorted(set(idx.reshape(-1).tolist())):
            t, place = np.nonzero(idx == e)
            slots[t, place], experts[e] = self.mlp(x[t], f"{at}.experts.{e}")
        y = np.concatenate([contract(weight[t][None], slots[t].T) for t in range(T)])
        shared, inner = self.mlp(x, f"{at}.shared_experts")
        k = {"gate": gate, "weight": weight, "slots": slots, "experts": experts, "shared": inner}
        return y + shared, k

    def moe_backward(self, dy: Array, at: str, k: dict[str, Any]) -> Array:
        idx, slots = k["gate"]["idx"], k["slots"]
        dweight = np.stack([dot(dy, slots[:, i]) for i in range(idx.shape[1])], -1)
        dslots = np.zeros_like(slots)
        for e, inner in k["experts"].items():
            t, place = np.nonzero(idx == e)
            dslots[t, place] = self.mlp_backward(
                k["weight"][t, place][:, None] * dy[t], f"{at}.experts.{e}", inner
            )
        dx = total(dslots.swapaxes(1, 2)) + self.mlp_backward(dy, f"{at}.shared_experts", k["shared"])
        return dx + self.gate_backward(dweight, f"{at}.gate", k["gate"])

    # EMBED-1, BLOCK-1, HEAD-1, LOSS-1 to LOSS-3

    def run(self, ids: Array, segments: Array, targets: Array) -> float:
        c, eps = self.c, self.c["rms_norm_eps"]
        self.rope = self.tables(self.positions(segments).reshape(-1))
        flat, wanted, saved = ids.reshape(-1), targets.reshape(-1), []
        x = self.w["model.embed_tokens.weight"][flat]
        for layer in range(c["num_hidden_layers"]):
            at, dense = f"model.layers.{layer}", layer < c["first_k_dense_replace"]
            u, attn = self.attention(
                self.norm(x, f"{at}.input_layernorm.weight", eps), f"{at}.self_attn", segments
            )
            h = x + u
            normed = self.norm(h, f"{at}.post_attention_layernorm.weight", eps)
            y, inner = (self.mlp if dense else self.moe)(normed, f"{at}.mlp")
            saved.append((at, dense, x, attn, h, inner))
            x = h + y
            self.seen[at] = x
        normed = self.norm(x, "model.norm.weight", eps)
        logits = self.linear(normed, "lm_head.weight")
        rows = np.flatnonzero(wanted != -100)
        z = logits[rows] - logits[rows].max(-1, keepdims=True)
        exps = exp(z)
        sums = total(exps)
        nll = log(sums) - z[np.arange(len(rows)), wanted[rows]]
        self.seen |= {"logits": logits, "loss.nll": nll, "model.norm": normed}
        loss = float(total(nll[None])[0] / len(rows))
        d = exps / sums[:, None]
        d[np.arange(len(rows)), wanted[rows]] -= 1.0
        dlogits = np.zeros_like(logits)
        dlogits[rows] = d * (1.0 / len(rows))
        dx = self.norm_backward(
            self.linear_backward(dlogits, normed, "lm_head.weight"), x, "model.norm.weight", eps
        )
        for at, dense, x, attn, h, inner in reversed(saved):
            dout = (self.mlp_backward if dense else self.moe_backward)(dx, f"{at}.mlp", inner)
            dh = dx + self.norm_backward(dout, h, f"{at}.post_attention_layernorm.weight", eps)
            dattn = self.attention_backward(dh, f"{at}.self_attn", attn)
            dx = dh + self.norm_backward(dattn, x, f"{at}.input_layernorm.weight", eps)
        table = np.zeros_like(self.w["model.embed_tokens.weight"])
        for v in set(flat.tolist()):
            table[v] = total(dx[flat == v].T)
        self.grads["model.embed_tokens.weight"] = table
        return loss


V3_YARN = {"rope_scaling": support.YARN}
V2_SOFTMAX = support.V2 | {"q_lora_rank": None, "rope_scaling": None}
SINGLE = {"rope_interleave": False, "num_experts_per_tok": 1, "n_shared_experts": 2, "topk_group": 4}


@pytest.mark.parametrize("changes", [V3_YARN, V2_SOFTMAX, SINGLE], ids=["v3-yarn", "v2-softmax", "single"])
def test_text_and_package_give_the_same_bits(changes: dict[str, Any]) -> None:
    given = support.BASE | changes
    config = support.config(**changes)
    weights = support.random_weights(config, 3)
    ids = support.random_ids(config, (2, 5), 4)
    segments = np.array([[0, 0, 1, 1, 1], [7, 7, 7, -1, -1]])
    labels = np.roll(ids, -1, 1)
    targets = np.where(segments == -1, -100, labels)
    text = Text(given, weights)
    loss = text.run(ids, segments, targets)

    model = refimpl.load((config, weights), "exact")
    result = model.forward(ids, targets=targets, segment_ids=segments)
    gradients = model.backward(result)
    for name, ours in text.seen.items():
        theirs = result.tensors[name]
        assert np.array_equal(theirs.reshape(ours.shape), ours), name
    assert result.loss == loss
    for name, theirs in gradients.items():
        ours = text.grads.get(name, np.zeros(theirs.shape))
        assert np.array_equal(theirs, ours), name
    assert set(text.grads) <= set(gradients)
