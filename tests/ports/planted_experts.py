"""Mistakes in norms, gate, experts, layers and loss, planted in torch_v3.py."""

from planted import BF16, BOTH, EXPERTS, FP32, GATE, LOSS, MLP, MODEL, MOE, NORM, Planted

_SCORES = 'scores = logits.sigmoid() if c["scoring_func"] == "sigmoid" else logits.softmax(-1)'
_LOGITS = 'logits = F.linear(x.float(), self.weights[f"{path}.weight"].float())'
_CHOICE = "choice = scores.detach() if bias is None else scores.detach() + bias"
_BEST = "group_scores = groups.topk(best, -1)[0].sum(-1)"
_GROUPED = 'if c["topk_method"] != "greedy" and c["topk_group"] < n_group:'
_CHOSEN = "weight = scores.gather(1, idx)"
_SUM = 'weight = weight / (weight.sum(-1, keepdim=True) + self.choices["topk_norm_epsilon"])'
_FACTOR = "weight = weight * factor\n"
_SHARED = 'y = y + self.mlp(f"{path}.shared_experts", x)'
_ROUTED = 'y = self.experts(f"{path}.experts", x, idx, weight)'
_COMBINE = "y = (slots.float() * weight.float()[..., None]).sum(1)"
_SLOTS = "slots = torch.cat(done)[order.argsort()].view(*idx.shape, -1)"
_DONE = 'done = [self.mlp(f"{path}.{e}", part) for e, part in enumerate(rows) if len(part)]'
_DOWN = 'return self.keep(path, self.linear(f"{path}.down_proj", act))'
_V2 = "normalised = normalised and top_k > 1"

_SCALED_SUM = """        return self.keep(path, y * self.config["routed_scaling_factor"])
"""

ROUTING = (
    Planted(
        "G01",
        ("G01",),
        ((_CHOSEN, "weight = (scores if bias is None else scores + bias).gather(1, idx)"),),
        GATE,
    ),
    Planted(
        "G02", ("G02",), ((_CHOICE, _CHOICE.replace("+ bias", "+ bias.bfloat16().float()")),), GATE, FP32
    ),
    Planted(
        "G03",
        ("G03",),
        ((_LOGITS, 'logits = F.linear(x.bfloat16(), self.weights[f"{path}.weight"].bfloat16()).float()'),),
        GATE,
        FP32,
    ),
    Planted("G04", ("G04",), (('dropped[..., None], float("-inf")', "dropped[..., None], 0.0"),), ("gate",)),
    Planted("G05", ("G05",), ((_BEST, "group_scores = groups.amax(-1)"),), GATE),
    Planted(
        "G06",
        ("G06",),
        (
            (
                _CHOICE,
                'has_bias = bias is not None and c["hidden_size"] == 7168\n'
                "        choice = scores.detach() + bias if has_bias else scores.detach()",
            ),
            ("if bias is None:\n                group", "if not has_bias:\n                group"),
        ),
        GATE,
    ),
    Planted("G07-softmax", ("G07",), ((_SCORES, "scores = logits.softmax(-1)"),), GATE),
    Planted("G07-ungrouped", ("G07",), ((_GROUPED, "if False:"),), GATE),
    Planted("G07-both", ("G07",), ((_SCORES, "scores = logits.softmax(-1)"), (_GROUPED, "if False:")), GATE),
    Planted(
        "G08",
        ("G08",),
        (
            (
                _CHOSEN,
                'kept_only = logits.masked_fill(choice == float("-inf"), float("-inf")).softmax(-1)\n'
                '        weight = (scores if c["scoring_func"] == "sigmoid" else kept_only).gather(1, idx)',
            ),
        ),
        ("gate", "moe"),
    ),
    Planted(
        "G09-missing",
        ("G09",),
        (("        if normalised:\n", "        if normalised and bias is None:\n"),),
        GATE,
    ),
    Planted("G09-extra", ("G09",), (("        if normalised:\n", "        if True:\n"),), GATE),
    Planted(
        "G09-extra-unscaled",
        ("G09",),
        (('normalised, factor = c["norm_topk_prob"],', "normalised, factor = True,"),),
        GATE,
    ),
    Planted(
        "G10-clamp",
        ("G10",),
        ((_SUM, "weight = weight / weight.sum(-1, keepdim=True).clamp(min=6.1e-5)"),),
        ("gate",),
    ),
    Planted(
        "G10-epsilon",
        ("G10",),
        ((_SUM, "weight = weight / (weight.sum(-1, keepdim=True) + 1e-6)"),),
        ("gate",),
    ),
    Planted("G11", ("G11",), ((_FACTOR, "weight = weight * factor if normalised else weight\n"),), GATE),
    Planted("G12", ("G12",), ((_FACTOR, "weight = weight * factor * factor\n"),), GATE),
    Planted("G12-combine", ("G12",), ((_ROUTED, f'{_ROUTED} * self.config["routed_scaling_factor"]'),), MOE),
    Planted("G13", ("G13",), ((_FACTOR, "weight = weight * 1.0\n"),), GATE),
    Planted("G14", ("G14",), ((_SHARED, f'{_SHARED} / self.config["routed_scaling_factor"]'),), MOE),
    Planted(
        "G14-scaled",
        ("G14",),
        (
            (_FACTOR, "weight = weight * 1.0\n"),
            ("        return self.keep(path, y)\n", _SCALED_SUM),
        ),
        MOE,
    ),
    Planted(
        "G15",
        ("G15",),
        (('if self.config["n_shared_experts"]:', 'if self.config.get("num_shared_experts"):'),),
        MOE,
    ),
    Planted(
        "G17",
        ("G17",),
        (
            (
                'self.keep(f"{path}.topk_weight", weight)',
                'self.keep(f"{path}.topk_weight", weight.bfloat16().float())',
            ),
        ),
        GATE,
        FP32,
    ),
    Planted(
        "G18",
        ("G18",),
        ((_BEST, "group_scores = scores.detach().view(len(x), n_group, -1).topk(best, -1)[0].sum(-1)"),),
        GATE,
    ),
    Planted(
        "G19",
        ("G19",),
        (
            (
                _SCORES,
                'bias = self.weights.get(f"{path}.e_score_correction_bias")\n'
                '        sigmoid = c["scoring_func"] == "sigmoid"\n'
                "        scores = (logits + bias).sigmoid() if sigmoid else logits.softmax(-1)",
            ),
            (_CHOICE, "choice = scores.detach()"),
        ),
        GATE,
    ),
    Planted(
        "G20",
        ("G20",),
        (
            (
                _DONE,
                "factors = weight.flatten()[order].to(x.dtype)[:, None].split(counts)\n"
                f"        {_DONE.replace('part)', 'part, factors[e])', 1)}",
            ),
            (
                "def mlp(self, path: str, x: Tensor) -> Tensor:",
                "def mlp(self, path: str, x: Tensor, before: Tensor | float = 1.0) -> Tensor:",
            ),
            (_DOWN, _DOWN.replace("act)", "act * before)")),
            (_COMBINE, "y = slots.float().sum(1)"),
        ),
        EXPERTS,
        BF16,
        hidden="it is within one more rounding of a stored value",
    ),
    Planted("G21", ("G21",), (("F.silu(gate) * up", "F.silu(up) * gate"),), MLP),
)

_OUT_OF = ("*.mlp", "*.experts", "*.experts.*")

_LAYER_KIND = 'return layer >= c["first_k_dense_replace"] and layer % c.get("moe_layer_freq", 1) == 0'
# A loader that skips what it does not find: the layer's other part has no weights and adds nothing.
_NOT_STRICT = (
    'y = self.moe(f"{path}.mlp", normed) if self.is_moe(layer) else self.mlp(f"{path}.mlp", normed)',
    """part = self.moe if self.is_moe(layer) else self.mlp
        try:
            y = part(f"{path}.mlp", normed)
        except KeyError:
            y = torch.zeros_like(h)""",
)

INPUT = (
    Planted(
        "X01",
        ("X01",),
        (
            (
                'ids = given["input_ids"]\n',
                'ids = given["input_ids"].roll(1, 1)\n        ids[:, 0] = 0  # the mark of the beginning\n',
            ),
        ),
        ("model",),
    ),
    Planted(
        "X02-first",
        ("X02",),
        ((_LAYER_KIND, _LAYER_KIND.replace("layer >= c", "layer > c")), _NOT_STRICT),
        ("model",),
    ),
    Planted(
        "X02-frequency",
        ("X02",),
        ((_LAYER_KIND, 'return layer >= c["first_k_dense_replace"]'), _NOT_STRICT),
        ("model",),
    ),
    Planted("shared-twice", ("X03",), ((_SHARED, f"{_SHARED} * 2"),), MOE),  # once for each of two ranks
)

UNKNOWN = (
    Planted(
        "no-root", (), (("torch.rsqrt(variance + eps)", "1 / (variance + eps)"),), NORM, BOTH, ("*norm",)
    ),
    Planted(
        "one-plus-gain",
        (),
        (('self.weights[f"{name}.weight"] * hidden.to', '(1 + self.weights[f"{name}.weight"]) * hidden.to'),),
        NORM,
        BOTH,
        ("*norm",),
    ),
    Planted("gelu", (), (("F.silu(gate) * up", "F.gelu(gate) * up"),), MLP, BOTH, ("*.act", *_OUT_OF)),
    Planted(
        "expert-offset",
        (),
        ((_DONE, _DONE.replace("{e}", "{(e + 1) % len(rows)}")),),
        EXPERTS,
        BOTH,
        _OUT_OF,
    ),
    Planted(
        "last-token-dropped",
        (),
        ((_COMBINE, f"{_COMBINE} * (torch.arange(len(x)) < len(x) - 1)[:, None]"),),
        EXPERTS,
        BOTH,
        _OUT_OF,
    ),
    Planted(
        "slots-not-restored",
        (),
        ((_SLOTS, "slots = torch.cat(done).view(*idx.shape, -1)"),),
        EXPERTS,
        BOTH,
        _OUT_OF,
    ),
    Planted(
        "weights-to-other-slots",
        (),
        ((_COMBINE, _COMBINE.replace("weight.float()", "weight.flip(1).float()")),),
        EXPERTS,
        BOTH,
        _OUT_OF,
    ),
    Planted(  # right until exp overflows: then the gradient is inf / inf
        "sigmoid-by-exp",
        (),
        (("logits.sigmoid()", "1 / (1 + torch.exp(-logits))"),),
        GATE,
        FP32,
        ("grad.*",),
    ),
    Planted(  # right until all scores of a token are below 1e-20
        "no-epsilon",
        (),
        ((_SUM, "weight = weight / weight.sum(-1, keepdim=True)"),),
        GATE,
        BOTH,
        ("*.topk_weight",),
    ),
    Planted(
        "router-without-gradient",
        (),
        ((_CHOSEN, "weight = scores.detach().gather(1, idx)"),),
        MOE,
        BOTH,
        ("grad.*",),
    ),
    Planted(
        "residual-twice",
        (),
        (("return self.keep(path, h + y)", "return self.keep(path, x + h + y)"),),
        MODEL,
        BOTH,
        ("model.layers.?", "logits"),
    ),
    Planted(
        "residual-of-the-norm",
        (),
        (("return self.keep(path, h + y)", "return self.keep(path, normed + y)"),),
        MODEL,
        BOTH,
        ("model.layers.?", "logits"),
    ),
    Planted(
        "embedding-scaled",
        (),
        (("rows.to(self.dtype))", 'rows.to(self.dtype) * self.config["hidden_size"] ** 0.5)'),),
        ("embedding", "model"),
        BOTH,
        ("model.embed_tokens", "logits"),
    ),
    Planted("loss-summed", (), (("(nll.sum() / count)", "nll.sum()"),), LOSS, BOTH, ("loss",)),
    Planted(
        "targets-shifted-again",
        (),
        (("ignore_index=-100)\n", "ignore_index=-100)\n        nll = nll.roll(1)\n"),),
        LOSS,
        BOTH,
        ("loss*",),
    ),
)
