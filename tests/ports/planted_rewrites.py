"""Rewrites of torch_v3.py that compute the same by other means: none may get a diagnosis."""

from planted import ALL, Planted
from planted_experts import _COMBINE, _DONE

_LOGITS = 'logits = F.linear(x.float(), self.weights[f"{path}.weight"].float())'
_ROTATED = "return (x * cos + turned * sin).to(x.dtype)"
_SCORED = "scores = torch.matmul(query, key.transpose(2, 3)) * self.softmax_scale()"
_SOFTMAX = "probs = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)"

# Keys in blocks of five, with the running maximum and sum of online softmax.
_ONLINE = """top = torch.full_like(scores[..., :1], -1e30).float()
        total = torch.zeros_like(top)
        for part in scores.float().split(5, -1):
            higher = torch.maximum(top, part.amax(-1, keepdim=True))
            total = total * torch.exp(top - higher) + torch.exp(part - higher).sum(-1, keepdim=True)
            top = higher
        probs = (torch.exp(scores.float() - top) / total).to(query.dtype)"""
_FUSED = """both = torch.cat([self.weights[f"{path}.{n}_proj.weight"] for n in ("gate", "up")])
        gate, up = F.linear(x, both).chunk(2, -1)
        self.trace |= {f"{path}.gate_proj": gate, f"{path}.up_proj": up}"""
_COMPLEX = """if self.config.get("rope_interleave", True):
            pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
            turn = torch.complex(cos[..., ::2].float(), sin[..., ::2].float())
            return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)
        return (x * cos + turned * sin).to(x.dtype)"""
_SDPA = """out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=visible[:, None], scale=self.softmax_scale()
        )
        return out"""
_ONE_BY_ONE = """y = torch.zeros(x.shape)
        for k in range(idx.shape[1]):
            y = y + slots[:, k].float() * weight[:, k, None].float()"""


def _rewrite(name: str, *edits: tuple[str, str]) -> Planted:
    return Planted(name, (), edits, ALL, right=True)


REWRITES = (
    _rewrite(
        "fused-gate-up",
        (
            'gate = self.linear(f"{path}.gate_proj", x)\n        up = self.linear(f"{path}.up_proj", x)',
            _FUSED,
        ),
    ),
    _rewrite("online-softmax", (_SOFTMAX, _ONLINE)),
    _rewrite(
        "sdpa",
        (_SCORED, _SDPA),
    ),
    _rewrite("complex-rotation", (_ROTATED, _COMPLEX)),
    _rewrite(
        "halves-on-both-sides",
        (
            _ROTATED,
            """y = (x * cos + turned * sin).to(x.dtype)
        if self.config.get("rope_interleave", True):
            y = torch.cat((y[..., 0::2], y[..., 1::2]), -1)
        return y""",
        ),
        (  # the cotangents of the case are in the layout of its inputs
            "y.backward(value.reshape(y.shape).to(y.dtype), retain_graph=True)",
            """value = value.reshape(y.shape).to(y.dtype)
            if target.endswith("_pe") and model.config.get("rope_interleave", True):
                value = torch.cat((value[..., 0::2], value[..., 1::2]), -1)
            y.backward(value, retain_graph=True)""",
        ),
    ),
    _rewrite(
        "root-and-division",
        ("hidden * torch.rsqrt(variance + eps)", "hidden / torch.sqrt(variance + eps)"),
    ),
    _rewrite(
        "experts-backwards",
        (_DONE, _DONE.replace("enumerate(rows)", "list(enumerate(rows))[::-1]")),
        ("torch.cat(done)", "torch.cat(done[::-1])"),
    ),
    _rewrite("slots-one-by-one", (_COMBINE, _ONE_BY_ONE)),
    _rewrite(
        "scaled-queries",
        (
            _SCORED,
            "scaled = query.float() * self.softmax_scale()\n"
            "        scores = torch.matmul(scaled, key.float().transpose(2, 3)).to(query.dtype)",
        ),
    ),
    _rewrite("sigmoid-by-softplus", ("logits.sigmoid()", "torch.exp(-F.softplus(-logits))")),
    _rewrite(
        "loss-by-logsumexp",
        (
            'F.cross_entropy(logits.float(), targets, reduction="none", ignore_index=-100)',
            "logits.float().logsumexp(-1) - logits.float().gather(1, targets.clamp(min=0)[:, None])[:, 0]",
        ),
    ),
    _rewrite(
        "split-router",
        (
            _LOGITS,
            'w = self.weights[f"{path}.weight"].float()\n'
            "        parts = zip(x.float().chunk(4, -1), w.chunk(4, -1), strict=True)\n"
            "        logits = sum(a @ b.T for a, b in parts)",
        ),
    ),
    _rewrite(
        "ties-to-the-higher",
        (
            "idx = choice.topk(top_k, -1)[1] if",
            "last = choice.shape[1] - 1\n"
            "        backwards = choice.flip(1).argsort(dim=-1, descending=True, stable=True)\n"
            "        idx = last - backwards[:, :top_k] if",
        ),
    ),
)
