"""What backward needs, predicted from the rules: bytes kept by site.  SPEC RECIPE-14, RECIPE-15.

    unit    the embedding, one decoder layer, the head with its loss, one MTP module with its loss
    kept    what its forward pass keeps, by site
    again   for each stretch of its backward pass, what that computes again and holds until its end

Units are freed one by one, so the most is held either before a unit's backward pass, with its loss, or in
the heaviest stretch of one, without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from refimpl.accounting.load import Load
from refimpl.accounting.sizes import PLAIN, Sizes, stores
from refimpl.config.choices import Choices
from refimpl.config.model import ModelConfig
from refimpl.errors import Unsupported
from refimpl.numerics import sites
from refimpl.numerics.recipe import Recipe

LOSS = "loss"
Bytes = Mapping[str, int]  # site -> bytes


@dataclass(frozen=True)
class Unit:
    """A unit's share; kind: embedding, dense layer, MoE layer, head, MTP module."""

    kind: str
    layer: int
    kept: Bytes
    again: tuple[Bytes, ...] = ()

    @property
    def total(self) -> int:
        return sum(self.kept.values())


def predicted(config: ModelConfig, recipe: Recipe, load: Load, choices: Choices | None = None) -> list[Unit]:
    """The units in the order of the forward pass.  Raises Unsupported for a model with an indexer."""
    if config.has_indexer:
        raise Unsupported(
            f"model_type is {config.model_type!r}, whose sparse attention is not computed here."
        )
    made = _Made(config, Sizes(recipe), load, choices or Choices())
    layers = [made.layer(i) for i in range(config.num_hidden_layers)]
    modules = [made.module(config.num_hidden_layers + k, k + 1) for k in range(load.modules)]
    return [Unit("embedding", -1, {"embedding.ids": load.tokens * PLAIN}), *layers, made.head(), *modules]


def total(units: Iterable[Unit]) -> int:
    """Bytes kept at the end of the forward pass."""
    return sum(unit.total for unit in units)


def peak(units: list[Unit]) -> int:
    """The most that is held during the backward pass, what is computed again included."""
    most, held = 0, total(units)
    for unit in reversed(units):
        without_loss = held - unit.kept.get(LOSS, 0)
        most = max(most, held, *(without_loss + sum(part.values()) for part in unit.again))
        held -= unit.total
    return most


def added(*parts: Bytes) -> dict[str, int]:
    """The sum, site by site."""
    found: dict[str, int] = {}
    for part in parts:
        for site, count in part.items():
            found[site] = found.get(site, 0) + count
    return found


@dataclass(frozen=True)
class _Made:
    c: ModelConfig
    s: Sizes
    load: Load
    choices: Choices

    def layer(self, layer: int) -> Unit:
        kept, again = self._block(layer, 0)
        return Unit("MoE layer" if self.c.is_moe_layer(layer) else "dense layer", layer, kept, again)

    def head(self) -> Unit:
        wide = self.c.hidden_size
        kept = added(self._norm(wide), self._operand("lm_head.in", wide), self._loss(0))
        return Unit("head", -1, kept, (self._again("lm_head.in", wide),))

    def module(self, layer: int, depth: int) -> Unit:
        wide, tokens = self.c.hidden_size, self.load.tokens
        block, again = self._block(layer, depth)
        kept = added(
            {"embedding.ids": tokens * PLAIN},
            self._norm(wide),  # of the embedding
            self._norm(wide, shared=self._hidden_is_kept(depth)),
            self._operand("eh_proj.in", 2 * wide),
            block,
            self._norm(wide),
            self._operand("lm_head.in", wide),
            self._loss(depth),
        )
        ends = (self._again("lm_head.in", wide), self._again("eh_proj.in", 2 * wide))
        return Unit("MTP module", layer, kept, (*ends, *again))

    def _hidden_is_kept(self, depth: int) -> bool:
        """Whether what a module reads of the unit before is the very array that the norm there keeps."""
        passed = self.choices.mtp_hidden if depth == 1 else self.choices.mtp_passes
        return passed == "before_norm" and not self.s.rule("norm.in").scaled

    def _block(self, layer: int, depth: int) -> tuple[Bytes, tuple[Bytes, ...]]:
        wide = self.c.hidden_size
        attention, attention_again = self._attention()
        mlp, mlp_again = self._moe(layer, depth) if self.c.is_moe_layer(layer) else self._dense()
        return added(self._norm(wide), attention, self._norm(wide), mlp), (*mlp_again, attention_again)

    def _attention(self) -> tuple[Bytes, Bytes]:
        c, s, tokens = self.c, self.s, self.load.tokens
        heads = c.num_attention_heads
        rows = tokens * heads  # B * H * S
        up = {
            "kv_b_proj.in": c.kv_lora_rank,
            **({} if c.q_lora_rank is None else {"q_b_proj.in": c.q_lora_rank}),
        }
        attended = {
            "attention.query": c.qk_head_dim,
            "attention.key": c.qk_head_dim,
            "attention.value": c.v_head_dim,
            "attention.probs": self.load.length,
        }
        kept = added(
            self._operand("self_attn.in", c.hidden_size),
            {} if c.q_lora_rank is None else self._norm(c.q_lora_rank),
            self._norm(c.kv_lora_rank),
            {site: s.operand(site, tokens, width) for site, width in up.items()},
            {site: s.keep(site, rows, width) for site, width in attended.items()},
            self._operand("o_proj.in", heads * c.v_head_dim),
        )
        if s.rule("attention.probs").of == "source":
            kept["attention.softmax"] = rows * self.load.length * PLAIN
        again = self._again("self_attn.in", c.hidden_size)
        if s.recomputes(*sites.UP):  # all of it is computed, and what was not kept is taken
            kept["rope.in"] = s.keep("rope.in", tokens, c.qk_rope_head_dim)
            again = added(
                again,
                {site: s.operand(site, tokens, width, again=True) for site, width in up.items()},
                {site: s.keep(site, rows, width, again=True) for site, width in attended.items()},
            )
        return kept, again

    def _dense(self) -> tuple[Bytes, tuple[Bytes, ...]]:
        wide, inner = self.c.hidden_size, self.c.intermediate_size
        kept = added(self._operand("mlp.in", wide), self._swiglu("", self.load.tokens, inner))
        return kept, (added(self._again("mlp.in", wide), self._again("down_proj.in", inner)),)

    def _moe(self, layer: int, depth: int) -> tuple[Bytes, tuple[Bytes, ...]]:
        c, s, tokens = self.c, self.s, self.load.tokens
        chosen, wide, inner = c.num_experts_per_tok, c.hidden_size, c.moe_intermediate_size
        loads, shared = self.load.of_experts(c, layer), c.shared_intermediate_size
        kept = added(
            self._operand("gate.in", wide),
            {
                "gate.scores": tokens * c.n_routed_experts * PLAIN,
                "gate.topk_idx": tokens * chosen * PLAIN,
                "gate.topk_weight": tokens * chosen * PLAIN,
                "experts.groups": 2 * tokens * chosen * PLAIN,
                "experts.slots": s.keep("experts.slots", tokens * chosen, wide),
            },
            *({"experts.in": s.operand("experts.in", n, wide)} for n in loads),
            *(self._swiglu("experts.", n, inner) for n in loads),
            self._balance(depth),
        )
        if stores(s.recipe, "d.experts.sum"):
            kept["experts.order"] = tokens * chosen * PLAIN
        again = self._again("gate.in", wide)
        if shared:
            kept = added(
                kept,
                self._operand("shared_experts.in", wide),
                self._swiglu("shared_experts.", tokens, shared),
            )
        gathered = added(*(self._again("experts.in", wide, n) for n in loads))
        first = added(again, self._again("experts.in", wide), gathered)  # gathered from the whole
        again = added(again, gathered, self._again("shared_experts.in", wide) if shared else {})
        parts = [first, added(again, self._again("experts.down_proj.in", inner, max(loads, default=0)))]
        if shared:
            parts.append(added(again, self._again("shared_experts.down_proj.in", shared)))
        return kept, tuple(parts)

    def _swiglu(self, owner: str, rows: int, inner: int) -> Bytes:
        s = self.s
        return {
            f"{owner}swiglu.gate": s.keep(f"{owner}swiglu.gate", rows, inner),
            f"{owner}swiglu.up": s.keep(f"{owner}swiglu.up", rows, inner),
            f"{owner}down_proj.in": s.operand(f"{owner}down_proj.in", rows, inner),
        }

    def _norm(self, width: int, shared: bool = False) -> Bytes:
        tokens = self.load.tokens
        own = 0 if shared else self.s.keep("norm.in", tokens, width)
        return {"norm.in": own, "norm.inv_rms": tokens * PLAIN}

    def _operand(self, site: str, width: int) -> Bytes:
        return {site: self.s.operand(site, self.load.tokens, width)}

    def _again(self, site: str, width: int, rows: int | None = None) -> Bytes:
        """What it takes when it is computed again, nothing if it was kept."""
        if not self.s.recomputes(site):
            return {}
        return {site: self.s.operand(site, self.load.tokens if rows is None else rows, width, again=True)}

    def _loss(self, depth: int) -> Bytes:
        """exps (M, V), and per target its row, its id, the sum of exps and the loss."""
        return {LOSS: self.load.targets[depth] * (self.c.vocab_size + 4) * PLAIN}

    def _balance(self, depth: int) -> Bytes:
        """Rows (M,), sums of scores (M,), shares (M, N) of the sequence-wise loss; factors (B, N) and losses
        (B,) of every kind; tokens (B,)."""
        losses, load, experts = self.load.losses, self.load, self.c.n_routed_experts
        if not losses:
            return {}
        count, number = load.exist[depth], load.sequences[depth]
        shares = count * experts * ("sequence" in losses)
        return {"balance": PLAIN * (2 * count + shares + number * (len(losses) * (experts + 1) + 1))}
