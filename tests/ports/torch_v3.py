"""DeepSeek-V3 and V2 in PyTorch, from the report and SPEC.md alone: a port that is not built from refimpl.

    python torch_v3.py CASE_DIR OUTPUT.safetensors [--dtype float32|bfloat16]       exit 77: not for this port

It reads the case folder with the safetensors library, leaves the backward to autograd, and stores activations
in the dtype that is asked for, as customary code does: norms, softmax, router and loss in float32, the rest
in that dtype.  `planted.py` has the mistakes that are planted in this source.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # its customary name
from safetensors.torch import load_file, save_file
from torch import Tensor

NOT_FOR_ME = 77
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Model:
    """The weights of a case, and what is recorded while it runs."""

    def __init__(self, case: dict, tensors: dict[str, Tensor], dtype: torch.dtype):
        self.config, self.choices, self.dtype = case["config"], case["choices"], dtype
        self.weights = tensors
        self.forced: dict[str, Tensor] = {}  # gate -> experts of every token, where they are given
        self.trace: dict[str, Tensor] = {}

    def keep(self, name: str, x: Tensor) -> Tensor:
        self.trace[name] = x
        return x

    def linear(self, name: str, x: Tensor) -> Tensor:
        return self.keep(name, F.linear(x, self.weights[f"{name}.weight"]))

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        hidden = x.float()
        variance = hidden.pow(2).mean(-1, keepdim=True)
        hidden = hidden * torch.rsqrt(variance + eps)
        return self.keep(name, self.weights[f"{name}.weight"] * hidden.to(x.dtype))

    @property
    def yarn(self) -> dict | None:
        scaling, applies = self.config.get("rope_scaling"), self.choices["yarn_applies"]
        if not scaling or scaling.get("type", scaling.get("rope_type")) != "yarn" or applies == "never":
            return None
        longest = self.choices["max_seq_len"] or self.config["max_position_embeddings"]
        if applies == "beyond_original" and longest <= scaling["original_max_position_embeddings"]:
            return None
        return scaling

    def inv_freq(self) -> Tensor:
        dim, base, yarn = self.config["qk_rope_head_dim"], self.config["rope_theta"], self.yarn
        exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
        freqs = 1.0 / base**exponents
        if yarn is None:
            return freqs

        def correction_dim(rotations: float) -> float:
            original = yarn["original_max_position_embeddings"]
            return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

        low = max(math.floor(correction_dim(yarn.get("beta_fast", 32))), 0)
        high = min(math.ceil(correction_dim(yarn.get("beta_slow", 1))), dim - 1)
        ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)
        smooth = 1 - ramp.clamp(0, 1)
        interpolated = freqs / yarn["factor"]
        return interpolated * (1 - smooth) + freqs * smooth

    def mscale(self, m: float) -> float:
        factor = self.yarn["factor"]
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    def cos_sin_factor(self) -> float:
        yarn = self.yarn
        if yarn is None:
            return 1.0
        top, bottom = yarn.get("mscale"), yarn.get("mscale_all_dim")
        if top and bottom:
            return self.mscale(top) / self.mscale(bottom)
        if self.choices["yarn_mscale_zero"] == "hf":
            return self.mscale(1.0)
        return self.mscale(1.0 if top is None else top) / self.mscale(bottom or 0.0)

    def softmax_scale(self) -> float:
        scale = (self.config["qk_nope_head_dim"] + self.config["qk_rope_head_dim"]) ** -0.5
        yarn = self.yarn
        if yarn is not None and yarn.get("mscale_all_dim"):
            mscale = self.mscale(yarn["mscale_all_dim"])
            scale = scale * mscale * mscale
        return scale

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (T,)  ->  cos and sin (T, R/2)."""
        angles = positions.float()[:, None] * self.inv_freq()[None, :]
        factor = self.cos_sin_factor()
        return (angles.cos() * factor).to(self.dtype), (angles.sin() * factor).to(self.dtype)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(T, heads, R), with tables (T, R/2)."""
        if self.config.get("rope_interleave", True):
            cos, sin = (table.repeat_interleave(2, -1)[:, None] for table in (cos, sin))
            turned = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
        else:
            cos, sin = (torch.cat((table, table), -1)[:, None] for table in (cos, sin))
            first, second = x.chunk(2, -1)
            turned = torch.cat((-second, first), -1)
        return (x * cos + turned * sin).to(x.dtype)

    def attention(self, path: str, query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
        """(B, H, S, width) each; visible (B, S, S)."""
        scores = torch.matmul(query, key.transpose(2, 3)) * self.softmax_scale()
        scores = scores.masked_fill(~visible[:, None], float("-inf"))
        self.keep(f"{path}.scores", scores)
        probs = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        self.keep(f"{path}.probs", probs)
        return torch.matmul(probs, value)

    def mla(self, path: str, x: Tensor, batch: "Batch") -> Tensor:
        """(T, D)  ->  (T, D)."""
        c, heads, size, length = self.config, self.config["num_attention_heads"], batch.size, batch.length
        nope, rot, wide = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
        eps = c["rms_norm_eps"] if self.choices["latent_norm_epsilon"] == "config" else 1e-6
        cos, sin = self.cos_sin(batch.positions)
        if c["q_lora_rank"]:
            q = self.linear(f"{path}.q_a_proj", x)
            q = self.norm(f"{path}.q_a_layernorm", q, eps)
            q = self.linear(f"{path}.q_b_proj", q)
        else:
            q = self.linear(f"{path}.q_proj", x)
        q_nope, q_pe = q.view(-1, heads, nope + rot).split([nope, rot], -1)
        kv = self.linear(f"{path}.kv_a_proj_with_mqa", x)
        latent, k_pe = kv.split([c["kv_lora_rank"], rot], -1)
        latent = self.norm(f"{path}.kv_a_layernorm", latent, eps)
        kv = self.linear(f"{path}.kv_b_proj", latent).view(-1, heads, nope + wide)
        k_nope, value = kv.split([nope, wide], -1)
        q_pe = self.keep(f"{path}.q_pe", self.rotate(q_pe, cos, sin))
        k_pe = self.keep(f"{path}.k_pe", self.rotate(k_pe[:, None], cos, sin))
        query = torch.cat((q_nope, q_pe), -1)
        key = torch.cat((k_nope, k_pe.expand(-1, heads, -1)), -1)
        query, key, value = (t.view(size, length, heads, -1).transpose(1, 2) for t in (query, key, value))
        out = self.attention(path, query, key, value, batch.visible)
        out = self.keep(f"{path}.heads", out.transpose(1, 2).reshape(size * length, heads * wide))
        return self.keep(path, self.linear(f"{path}.o_proj", out))

    def mlp(self, path: str, x: Tensor) -> Tensor:
        gate = self.linear(f"{path}.gate_proj", x)
        up = self.linear(f"{path}.up_proj", x)
        act = self.keep(f"{path}.act", F.silu(gate) * up)
        return self.keep(path, self.linear(f"{path}.down_proj", act))

    def gate(self, path: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """(T, D)  ->  experts and their weights, (T, K)."""
        c, top_k, n_group = self.config, self.config["num_experts_per_tok"], self.config["n_group"]
        logits = F.linear(x.float(), self.weights[f"{path}.weight"].float())
        self.keep(f"{path}.logits", logits)
        scores = logits.sigmoid() if c["scoring_func"] == "sigmoid" else logits.softmax(-1)
        self.keep(f"{path}.scores", scores)
        bias = self.weights.get(f"{path}.e_score_correction_bias")
        choice = scores.detach() if bias is None else scores.detach() + bias
        if c["topk_method"] != "greedy" and c["topk_group"] < n_group:
            groups = choice.view(len(x), n_group, -1)
            if bias is None:
                group_scores = groups.amax(-1)
            else:
                best = 2 if self.choices["group_score_size"] == "two" else top_k // c["topk_group"]
                group_scores = groups.topk(best, -1)[0].sum(-1)
            kept = group_scores.topk(c["topk_group"], -1)[1]
            dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, kept, False)
            choice = groups.masked_fill(dropped[..., None], float("-inf")).flatten(1)
        idx = choice.topk(top_k, -1)[1] if path not in self.forced else self.forced[path]
        self.keep(f"{path}.topk_idx", idx)
        weight = scores.gather(1, idx)
        normalised, factor = c["norm_topk_prob"], c["routed_scaling_factor"]
        if bias is None:
            rule = self.choices["v2_topk_norm"]
            normalised = normalised and top_k > 1 and rule != "ignore"
            factor = 1.0 if normalised and rule == "normalise_unscaled" else factor
        elif top_k == 1 and self.choices["topk_norm_single"] == "leave":
            normalised = False
        if normalised:
            weight = weight / (weight.sum(-1, keepdim=True) + self.choices["topk_norm_epsilon"])
        weight = weight * factor
        return idx, self.keep(f"{path}.topk_weight", weight)

    def experts(self, path: str, x: Tensor, idx: Tensor, weight: Tensor) -> Tensor:
        """Tokens sorted by expert, each expert on its rows, and the rows back to their slots."""
        order = idx.flatten().argsort(stable=True)
        counts = idx.flatten().bincount(minlength=self.config["n_routed_experts"]).tolist()
        rows = x[order // idx.shape[1]].split(counts)
        done = [self.mlp(f"{path}.{e}", part) for e, part in enumerate(rows) if len(part)]
        slots = torch.cat(done)[order.argsort()].view(*idx.shape, -1)
        y = (slots.float() * weight.float()[..., None]).sum(1)
        return self.keep(path, y.to(x.dtype))

    def moe(self, path: str, x: Tensor) -> Tensor:
        idx, weight = self.gate(f"{path}.gate", x)
        y = self.experts(f"{path}.experts", x, idx, weight)
        if self.config["n_shared_experts"]:
            y = y + self.mlp(f"{path}.shared_experts", x)
        return self.keep(path, y)

    def is_moe(self, layer: int) -> bool:
        c = self.config
        return layer >= c["first_k_dense_replace"] and layer % c.get("moe_layer_freq", 1) == 0

    def block(self, layer: int, x: Tensor, batch: "Batch") -> Tensor:
        path, eps = f"model.layers.{layer}", self.config["rms_norm_eps"]
        h = x + self.mla(f"{path}.self_attn", self.norm(f"{path}.input_layernorm", x, eps), batch)
        normed = self.norm(f"{path}.post_attention_layernorm", h, eps)
        y = self.moe(f"{path}.mlp", normed) if self.is_moe(layer) else self.mlp(f"{path}.mlp", normed)
        return self.keep(path, h + y)

    def embedding(self, ids: Tensor) -> Tensor:
        # In float32, because on CPUs torch adds the gradients of repeated ids in the dtype of the weight.
        rows = F.embedding(ids, self.weights["model.embed_tokens.weight"].float())
        return self.keep("model.embed_tokens", rows.to(self.dtype))

    def head(self, x: Tensor) -> Tensor:
        if self.config.get("tie_word_embeddings"):
            self.weights["lm_head.weight"] = self.weights["model.embed_tokens.weight"]
        normed = self.norm("model.norm", x, self.config["rms_norm_eps"])
        return self.keep("logits", self.linear("lm_head", normed))

    def loss(self, logits: Tensor, targets: Tensor, positions: int) -> Tensor:
        """logits (T, V), targets (T,); positions: how many exist."""
        nll = F.cross_entropy(logits.float(), targets, reduction="none", ignore_index=-100)
        nll = self.keep("loss.nll", nll[targets != -100])
        count = positions if self.choices["loss_divisor"] == "positions" else len(nll)
        return self.keep("loss", (nll.sum() / count).view(1))

    def forward(self, given: dict[str, Tensor]) -> None:
        ids = given["input_ids"]
        batch = Batch.of(ids.shape, given)
        x = self.embedding(ids.flatten())
        for layer in range(self.config["num_hidden_layers"]):
            x = self.block(layer, x, batch)
        logits = self.head(x)
        targets = targets_of(given, batch)
        if targets is not None:
            self.loss(logits, targets.flatten(), int((batch.segments >= 0).sum()))


class Batch:
    """Which positions the tokens have, and what they see."""

    def __init__(self, segments: Tensor, positions: Tensor | None):
        self.segments, (self.size, self.length) = segments, segments.shape
        same = segments[:, :, None] == segments[:, None, :]
        if positions is None:
            positions = same.tril(-1).sum(-1)
        self.positions = positions.flatten()
        self.visible = same.tril()

    @classmethod
    def of(cls, shape: tuple[int, ...], given: dict[str, Tensor]) -> "Batch":
        segments = given.get("segment_ids", torch.zeros(shape[:2], dtype=torch.int64))
        if "mask" in given:
            segments = segments.masked_fill(given["mask"] == 0, -1)
        return cls(segments, given.get("position_ids"))


def targets_of(given: dict[str, Tensor], batch: Batch) -> Tensor | None:
    """What each position shall predict, -100 for nothing."""
    targets = given.get("targets")
    if "labels" in given:
        targets = torch.full_like(given["labels"], -100)
        together = batch.segments[:, 1:] == batch.segments[:, :-1]
        targets[:, :-1] = given["labels"][:, 1:].masked_fill(~together, -100)
    return None if targets is None else targets.masked_fill(batch.segments < 0, -100)


def run_component(model: Model, case: dict, given: dict[str, Tensor]) -> str:
    """A component on its inputs; returns the name of the tensor that its cotangent belongs to."""
    component, path = case["component"], case.get("path", "")
    x = given.get("x")
    tokens = None if x is None else x.reshape(-1, x.shape[-1])
    match component:
        case "linear":
            model.linear(path, x)
        case "norm":
            model.norm(path, x, case["arguments"]["eps"])
        case "embedding":
            model.embedding(given["ids"])
        case "rope_tables":
            cos, sin = model.cos_sin(given["position_ids"])
            scale = torch.tensor([model.softmax_scale()], dtype=torch.float32)
            parts = {"inv_freq": model.inv_freq(), "cos": cos, "sin": sin, "softmax_scale": scale}
            model.trace |= {f"{path}.{name}": value for name, value in parts.items()}
        case "rope":
            cos, sin = model.cos_sin(given["position_ids"])
            for name in ("q_pe", "k_pe"):
                model.keep(f"{path}.{name}", model.rotate(given[name], cos, sin))
        case "attention":
            batch = Batch.of(given["segment_ids"].shape, given)
            heads = model.attention(path, given["query"], given["key"], given["value"], batch.visible)
            model.keep(f"{path}.heads", heads)
        case "mla":
            model.mla(path, tokens, Batch.of(x.shape, given))
        case "mlp":
            model.mlp(path, x)
        case "gate":
            model.gate(path, x)
        case "experts":
            model.experts(path, x, given["topk_idx"], given["topk_weight"])
        case "moe":
            model.moe(path, x)
        case "block":
            model.block(case["arguments"]["layer"], tokens, Batch.of(x.shape, given))
        case "head_loss":
            logits = model.head(x)
            model.loss(logits, given["targets"], len(x))
        case "model":
            model.forward(given)
    results = {"gate": f"{path}.topk_weight", "attention": f"{path}.heads", "head_loss": "loss"}
    return results.get(component, path)


def backward(model: Model, case: dict, given: dict[str, Tensor], result: str) -> None:
    """Every gradient that the case asks for, by autograd."""
    for name, value in given.items():  # cotangents: dy of the result, d.NAME or dNAME of a tensor
        target = {"dy": result, "dq_pe": f"{result}.q_pe", "dk_pe": f"{result}.k_pe"}.get(name)
        target = name[2:] if name.startswith("d.") else target
        if target is not None:
            y = model.trace[target]
            y.backward(value.reshape(y.shape).to(y.dtype), retain_graph=True)
    if "loss" in model.trace:
        model.trace["loss"].backward()
    leaves = {"logits": model.trace.get("logits"), **model.weights, **given}
    for name in [t["name"] for t in case["tensors"] if t["name"].startswith("grad.")]:
        leaf = leaves[name.removeprefix("grad.")]
        model.trace[name] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def read(folder: Path, case: dict, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights, inputs): floating ones in the dtype, the selection bias in float32."""
    stored = load_file(folder / "inputs.safetensors") if (folder / "inputs.safetensors").exists() else {}
    for asset in {t["asset"] for t in case["tensors"] if t.get("asset")}:
        stored |= load_file(folder.parent.parent / "assets" / f"{asset}.safetensors")
    weights: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    for t in (t for t in case["tensors"] if t["role"] in ("weight", "input")):
        if t["name"] not in stored:
            raise SystemExit(f"{folder} has no {t['name']}; a whole case is required.")
        value = stored[t["name"]].reshape(t["shape"])
        bias = t["name"].endswith("e_score_correction_bias")
        if value.is_floating_point():
            value = value.float() if bias else value.to(dtype)
            cotangent = t["name"] == "dy" or t["name"].startswith(("d.", "dq_", "dk_"))
            value.requires_grad_(case["backward"] and not bias and not cotangent)
        (weights if t["role"] == "weight" else inputs)[t["name"]] = value
    return weights, inputs


def run(case: Any, dtype: str = "float32") -> dict[str, Tensor] | None:
    """The outputs of a case (its folder, or what has one) by name; None when it is not for this port."""
    folder = Path(getattr(case, "folder", case))
    case = json.loads((folder / "case.json").read_text())
    if case["kind"] not in ("forward", "vjp"):
        return None
    weights, given = read(folder, case, DTYPES[dtype])
    model = Model(case, weights, DTYPES[dtype])
    model.forced = {n.removesuffix(".topk_idx"): v.flatten(0, -2) for n, v in given.items() if ".gate." in n}
    with torch.set_grad_enabled(case["backward"]):
        result = run_component(model, case, given)
    if case["backward"]:
        if "logits" in model.trace:
            model.trace["logits"].retain_grad()
        backward(model, case, given, result)
    asked = {t["name"]: t["shape"] for t in case["tensors"] if t["role"] in ("required", "probe")}
    return {
        name: model.trace[name].detach().reshape(shape).contiguous().clone()
        for name, shape in asked.items()
        if name in model.trace
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="One case by PyTorch; exit 77: not for this port.")
    parser.add_argument("case", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    given = parser.parse_args()
    torch.set_num_threads(1)
    outputs = run(given.case, given.dtype)
    if outputs is None:
        return NOT_FOR_ME
    save_file(outputs, given.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
