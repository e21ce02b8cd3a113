"""Mistakes in rotary positions, YaRN and attention, planted in torch_v3.py."""

from planted import (
    ATTENTION,
    BF16,
    BOTH,
    FP32,
    MLA,
    NORM,
    ROPE,
    ROTATION,
    SCALE,
    Planted,
)

_ANGLES = "angles = positions.float()[:, None] * self.inv_freq()[None, :]"
_TABLES = "return (angles.cos() * factor).to(self.dtype), (angles.sin() * factor).to(self.dtype)"
_BLEND = "return interpolated * (1 - smooth) + freqs * smooth"
_SQUARE = "scale = scale * mscale * mscale"
_ALL_DIM = 'mscale = self.mscale(yarn["mscale_all_dim"])'
_WIDTH = 'scale = (self.config["qk_nope_head_dim"] + self.config["qk_rope_head_dim"]) ** -0.5'
_LATENT = 'latent = self.norm(f"{path}.kv_a_layernorm", latent, eps)'
_Q_LATENT = 'q = self.norm(f"{path}.q_a_layernorm", q, eps)'
_EPS = 'eps = c["rms_norm_eps"] if self.choices["latent_norm_epsilon"] == "config" else 1e-6'
_SPLIT = 'latent, k_pe = kv.split([c["kv_lora_rank"], rot], -1)'
_K_ROPE = 'k_pe = self.keep(f"{path}.k_pe", self.rotate(k_pe[:, None], cos, sin))'
_HEADS = "out.transpose(1, 2).reshape(size * length, heads * wide)"
_SOFTMAX = "probs = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)"

# By the rank: every rank normalises its own half of the latent.
_SHARDED = """halves = {0}.float().chunk(2, -1)
        {1}halves = [t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + eps) for t in halves]
        {1}{0} = self.weights[f"{{path}}.{2}.weight"] * torch.cat(halves, -1).to(x.dtype)
        {1}{0} = self.keep(f"{{path}}.{2}", {0})"""
_JOINT = """joint = kv.float() * torch.rsqrt(kv.float().pow(2).mean(-1, keepdim=True) + eps)
        latent, {0} = joint.to(x.dtype).split([c["kv_lora_rank"], rot], -1)
        latent = self.weights[f"{{path}}.kv_a_layernorm.weight"] * latent
        latent = self.keep(f"{{path}}.kv_a_layernorm", latent)"""
# Two parts of the keys, each with its own maximum, added without bringing them to a common one.
_SPLIT_KV = """parts = scores.float().split((scores.shape[-1] + 1) // 2, -1)
        parts = [torch.exp(p - p.amax(-1, keepdim=True).clamp(min=-1e30)) for p in parts]
        probs = torch.cat(parts, -1)
        probs = (probs / probs.sum(-1, keepdim=True)).to(query.dtype)"""
# Two parts of the keys; a part without a key has the mean of its values and the finite size of one key.
_EMPTY_CHUNK = """half, outs, sizes = (scores.shape[-1] + 1) // 2, [], []
        for part, v in zip(scores.float().split(half, -1), value.split(half, 2), strict=True):
            part = torch.where(part.isinf().all(-1, keepdim=True), 0.0, part)
            outs.append(part.softmax(-1).to(v.dtype) @ v)
            sizes.append(part.logsumexp(-1, keepdim=True))
        shares = torch.cat(sizes, -1).softmax(-1)
        return (shares[..., :1] * outs[0] + shares[..., 1:] * outs[1]).to(value.dtype)"""
_HALF_STYLE = """k_even, k_odd = k_pe[:, None].chunk(2, -1)
        k_cos, k_sin = cos[:, None], sin[:, None]
        k_pe = torch.cat((k_even * k_cos - k_odd * k_sin, k_even * k_sin + k_odd * k_cos), -1)
        k_pe = self.keep(f"{path}.k_pe", k_pe)"""

ROTARY = (
    Planted(
        "R01",
        ("R01",),
        (('self.config.get("rope_interleave", True)', 'self.config.get("rope_interleaved")'),),
        ROTATION,
    ),
    Planted("R02-table", ("R02",), (("table.repeat_interleave(2, -1)", "table.repeat(1, 2)"),), ROTATION),
    Planted(
        "R02-halves",
        ("R02",),
        (("torch.cat((table, table), -1)", "table.repeat_interleave(2, -1)"),),
        ("rope",),
    ),
    Planted("R02-key", ("R02",), ((_K_ROPE, _HALF_STYLE),), MLA),
    Planted(
        "R04",
        ("R04",),
        (
            (
                _ANGLES,
                "angles = (positions.bfloat16()[:, None] * self.inv_freq().bfloat16()[None, :]).float()",
            ),
        ),
        ROPE,
    ),
    Planted(
        "R04-inv-freq",
        ("R04",),
        ((_ANGLES, "angles = positions.float()[:, None] * self.inv_freq().bfloat16().float()[None, :]"),),
        ROPE,
    ),
    Planted(
        "R04-positions",
        ("R04",),
        ((_ANGLES, "angles = positions.to(self.dtype).float()[:, None] * self.inv_freq()[None, :]"),),
        ("rope", "rope_tables"),
        BF16,
    ),
    Planted(
        "R05",
        ("R05",),
        (
            (
                _TABLES,
                "cos, sin = (angles.cos() * factor).bfloat16(), (angles.sin() * factor).bfloat16()\n"
                "        return cos.to(self.dtype), sin.to(self.dtype)",
            ),
        ),
        ROPE,
        FP32,
    ),
    Planted(
        "R06",
        ("R06",),
        ((_ANGLES, _ANGLES.replace("positions.float()", "positions.to(torch.int16).float()")),),
        ("rope", "rope_tables"),
    ),
    Planted(
        "R06-saturated",
        ("R06",),
        ((_ANGLES, _ANGLES.replace("positions.float()", "positions.clamp(max=32767).float()")),),
        ("rope", "rope_tables", "mla"),
    ),
)

YARN = (
    Planted("Y01", ("Y01",), ((_BLEND, "return freqs"),), ROPE),
    Planted(
        "Y02-always",
        ("Y02",),
        (
            (
                'if applies == "beyond_original" and longest <= scaling["original_max_position_embeddings"]:',
                "if not applies:",
            ),
        ),
        ("rope_tables",),
    ),
    Planted(
        "Y02-short",
        ("Y02",),
        (('if applies == "beyond_original" and longest <=', "if 4096 <="),),
        (*ROTATION, "rope_tables", "attention"),
    ),
    Planted(
        "Y03",
        ("Y03",),
        (
            (
                'math.floor(correction_dim(yarn.get("beta_fast", 32)))',
                'correction_dim(yarn.get("beta_fast", 32))',
            ),
            (
                'math.ceil(correction_dim(yarn.get("beta_slow", 1)))',
                'correction_dim(yarn.get("beta_slow", 1))',
            ),
        ),
        ROPE,
    ),
    Planted(
        "Y04",
        ("Y04",),
        (("dim - 1)\n", "dim // 2 - 1)\n"),),
        ROPE,
        hidden="R = 64 of every case has high = 23",
    ),
    Planted(
        "Y05",
        ("Y05",),
        (
            (
                'interpolated = freqs / yarn["factor"]',
                'interpolated = 1.0 / (yarn["factor"] * base) ** exponents',
            ),
        ),
        ROPE,
    ),
    Planted(
        "Y06", ("Y06",), (("return self.mscale(top) / self.mscale(bottom)", "return self.mscale(top)"),), ROPE
    ),
    Planted(
        "Y07",
        ("Y07", "Y11"),
        (
            (
                'if yarn is not None and yarn.get("mscale_all_dim"):',
                'if yarn is not None and yarn.get("attention_factor"):',
            ),
        ),
        SCALE,
    ),
    Planted("Y08", ("Y08",), ((_ALL_DIM, 'mscale = self.mscale(yarn["mscale"])'),), ("rope_tables",)),
    Planted("Y09-once", ("Y09",), ((_SQUARE, "scale = scale * mscale"),), SCALE),
    Planted("Y09-four", ("Y09",), ((_SQUARE, "scale = scale * mscale**4"),), SCALE),
    Planted("Y10", ("Y10",), ((_ALL_DIM, 'mscale = self.mscale(0.1 * yarn["mscale_all_dim"])'),), SCALE),
)

LATENT = (
    Planted("A01", ("A01",), ((_WIDTH, _WIDTH.replace("qk_nope_head_dim", "kv_lora_rank")),), SCALE),
    Planted(
        "A02-strided",
        ("A02",),
        (
            (
                _HEADS,
                "F.pad(out.transpose(1, 2).flatten(), (0, heads * (nope + rot - wide))).as_strided("
                "(size * length, heads, wide), (heads * wide, nope + rot, 1)).flatten(1)",
            ),
        ),
        MLA,
    ),
    Planted(
        "A02-padded",
        ("A02",),
        (
            (
                _HEADS,
                "F.pad(out, (0, nope + rot - wide)).transpose(1, 2).flatten()"
                "[: out.numel()].view(size * length, -1)",
            ),
        ),
        MLA,
    ),
    Planted("A03-order", ("A03",), ((_SPLIT, 'k_pe, latent = kv.split([rot, c["kv_lora_rank"]], -1)'),), MLA),
    Planted(
        "A03-width",
        ("A03",),
        ((_SPLIT, f"{_SPLIT}\n        k_pe = kv[..., -nope:][..., :rot]"),),
        ("mla", "block"),
    ),
    Planted(
        "A04-config",
        ("A04",),
        ((_EPS, 'eps = c["rms_norm_eps"]'),),
        MLA,
    ),
    Planted("A04-class", ("A04",), ((_EPS, "eps = 1e-5"),), MLA),
    Planted(
        "A04-norm", ("A04",), (("torch.rsqrt(variance + eps)", "torch.rsqrt(variance + 1e-6)"),), ("norm",)
    ),
    Planted(
        "A05",
        ("A05",),
        (("hidden = x.float()\n", "hidden = x.float() - x.float().mean(-1, keepdim=True)\n"),),
        NORM,
    ),
    Planted(
        "A05-latent",
        ("A05",),
        ((_LATENT, _LATENT.replace("latent, eps", "latent - latent.mean(-1, keepdim=True), eps")),),
        MLA,
    ),
    Planted("A06", ("A06",), ((_LATENT, _JOINT.format("k_pe")),), MLA),
    Planted("A06-latent", ("A06",), ((_LATENT, _JOINT.format("_")),), MLA),
    Planted(
        "A07",
        ("A07",),
        (
            (
                "k_nope, value = kv.split([nope, wide], -1)",
                "parts = kv.flatten(1).split([heads * nope, heads * wide], -1)\n"
                "        k_nope, value = (part.unflatten(-1, (heads, -1)) for part in parts)",
            ),
        ),
        MLA,
    ),
    Planted("A08", ("A08",), ((_LATENT, _SHARDED.format("latent", "", "kv_a_layernorm")),), MLA),
    Planted("A08-query", ("A08",), ((_Q_LATENT, _SHARDED.format("q", "    ", "q_a_layernorm")),), MLA),
    Planted(
        "A09",
        ("A09",),
        (
            (
                f'{_SOFTMAX}\n        self.keep(f"{{path}}.probs", probs)\n'
                "        return torch.matmul(probs, value)",
                _EMPTY_CHUNK,
            ),
        ),
        ATTENTION,
    ),
    Planted(
        "A12",
        ("A12",),
        (
            (
                "scores = torch.matmul(query, key.transpose(2, 3)) *",
                "scores = torch.matmul(query.half(), key.half().transpose(2, 3)).to(query.dtype) *",
            ),
        ),
        ATTENTION,
        FP32,
    ),
    Planted("A17", ("A17",), ((_Q_LATENT, "pass"),), MLA),
    Planted("A13", ("A13",), ((_SOFTMAX, _SPLIT_KV),), ATTENTION),
    Planted(
        "A16",
        ("A16",),
        ((_SOFTMAX, "probs = F.softmax(scores.bfloat16(), dim=-1).to(query.dtype)"),),
        ATTENTION,
        FP32,
    ),
)

_UNKNOWN_SCORES = ("*.scores", "*.probs", "*.heads")

UNKNOWN = (
    Planted(
        "scale-of-nope",
        (),
        ((_WIDTH, 'scale = self.config["qk_nope_head_dim"] ** -0.5'),),
        SCALE,
        BOTH,
        ("*.softmax_scale", *_UNKNOWN_SCORES),
    ),
    Planted(
        "rotated-backwards",
        (),
        (("x * cos + turned * sin", "x * cos - turned * sin"),),
        ROTATION,
        BOTH,
        ("*.q_pe", "*.k_pe"),
    ),
    Planted(
        "interpolated-only",
        (),
        ((_BLEND, "return interpolated"),),
        ROPE,
        BOTH,
        ("*.inv_freq", "*.q_pe", "*.k_pe"),
    ),
    Planted(
        "values-first",
        (),
        (("k_nope, value = kv.split([nope, wide], -1)", "value, k_nope = kv.split([wide, nope], -1)"),),
        ("mla", "block"),
        BOTH,
        _UNKNOWN_SCORES,
    ),
    Planted(
        "value-heads-reversed",
        (),
        (
            (
                "k_nope, value = kv.split([nope, wide], -1)",
                "k_nope, value = kv.split([nope, wide], -1)\n        value = value.flip(1)",
            ),
        ),
        MLA,
        BOTH,
        ("*.heads",),
    ),
    Planted(
        "sees-the-next",
        (),
        (("self.visible = same.tril()", "self.visible = same.tril(1)"),),
        ATTENTION,
        BOTH,
        _UNKNOWN_SCORES,
    ),
    Planted(
        "segments-ignored",
        (),
        (("self.visible = same.tril()", "self.visible = torch.ones_like(same).tril()"),),
        ("attention", "mla", "model"),
        BOTH,
        _UNKNOWN_SCORES,
    ),
    Planted(
        "o-proj-transposed",
        (),
        (
            (
                'return self.keep(path, self.linear(f"{path}.o_proj", out))',
                'w = self.weights[f"{path}.o_proj.weight"]\n'
                "        return self.keep(path, F.linear(out, w.T if w.shape[0] == w.shape[1] else w))",
            ),
        ),
        ("mla",),
        BOTH,
        ("*.o_proj", "*.self_attn"),
    ),
)
