"""What is not kept is computed again: how often, at what cost in memory, and with which bits."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from support import bits, config, random_ids, random_weights

import refimpl
from refimpl import prepared
from refimpl.accounting.kept import peak, predicted
from refimpl.accounting.measured import counted, identity, load_of
from refimpl.numerics import sites
from refimpl.numerics.arithmetic import Array, Dropped
from refimpl.numerics.recipe import Recipe
from refimpl.numerics.recipes import RECIPES
from refimpl.numerics.rounded import Rounded, with_rules
from refimpl.units import unit_backward

TRAINING = refimpl.TrainingConfig(warmup_steps=0)
CFG = config(num_nextn_predict_layers=1)
IDS = random_ids(CFG, (2, 5), 3)
V3, BF16 = RECIPES["v3-fp8"], RECIPES["bf16"]
NORM_OUTPUTS = (
    "self_attn.in",
    "q_b_proj.in",
    "kv_b_proj.in",
    "mlp.in",
    "gate.in",
    "shared_experts.in",
    "lm_head.in",
    "eh_proj.in",
)
UP = ("attention.query", "attention.key", "attention.value", "attention.probs")
EXACT = (*NORM_OUTPUTS, *UP, "experts.in")


class Counting(Rounded):
    """Counts the sites that values cross and the products that run."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.crossed: Counter[str] = Counter()
        self.products: Counter[str] = Counter()

    def at(self, site: str, x: Array) -> Array:
        self.crossed[site] += 1
        return super().at(site, x)

    def fprop(self, x: Any, w: Any) -> Array:
        self.products[w.site] += 1
        return super().fprop(x, w)


def run(cfg: Any, ar: Any) -> tuple[Any, Any]:
    model = refimpl.load((cfg, random_weights(cfg, 1)), ar, training=TRAINING)
    return model, model.forward(IDS, labels=IDS, trace=())


@pytest.mark.parametrize("latent", [7, None])
@pytest.mark.parametrize("name", ["v3-fp8", "v3.1-ue8m0"])
def test_backward_does_norms_and_up_projections_once_more_and_nothing_else(
    name: str, latent: int | None
) -> None:
    cfg = config(num_nextn_predict_layers=1, q_lora_rank=latent)
    ar = Counting(RECIPES[name])
    model, result = run(cfg, ar)
    experts = sum(np.count_nonzero(counts.sum(0)) for counts in result.counts.values())
    forward = ar.products.copy()
    ar.crossed.clear(), ar.products.clear()
    model.backward(result)
    blocks = 3  # one dense, one with experts, one of the module
    query = "q_b_proj" if latent else "q_proj"
    assert ar.products == {query: blocks, "kv_b_proj": blocks}
    assert forward[query] == forward["kv_b_proj"] == blocks
    ends = 1 + 3  # the head's; the module's last, enorm and hnorm
    assert ar.crossed["norm.out"] == blocks * (4 if latent else 3) + ends
    assert ar.crossed["experts.swiglu.act"] >= experts
    assert ar.crossed["shared_experts.swiglu.act"] == 2
    assert ar.crossed["swiglu.act"] == 0  # the dense MLP keeps its codes
    assert ar.crossed["experts.out"] == ar.crossed["residual"] == 0


@pytest.mark.parametrize("name", ["bf16", "hf-bf16"])
def test_a_recipe_that_keeps_everything_computes_nothing_again(name: str) -> None:
    ar = Counting(RECIPES[name])
    model, result = run(CFG, ar)
    ar.crossed.clear(), ar.products.clear()
    model.backward(result)
    assert not ar.products
    assert not [site for site in ar.crossed if site == "norm.out" or site.endswith("swiglu.act")]


class Watching(Rounded):
    """Knows what was made to be kept by computing again, as long as it lives.

    Weight gradients are done at once: an order-free arithmetic would hold all their operands to the end."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.order_free = False
        self.made: list[weakref.ref[Any]] = []
        self.look: list[Callable[[], None]] = []

    def keep(self, site: str, x: Array) -> Any:
        return self._seen(super().keep(site, x))

    def operand(self, site: str, x: Array) -> Any:
        made = super().operand(site, x)
        return made if site.endswith(".dy") else self._seen(made)

    def _seen(self, made: Any) -> Any:
        if self._keep_all and not isinstance(made, Dropped):
            self.made.append(weakref.ref(made))
            for look in self.look:
                look()
        return made


def measured_peak(model: Any, result: Any) -> int:
    """Backward as Model.backward, but every unit and loss is freed once it is done."""
    run, ar, most = result._run, model.ar, 0
    passed = list(run.passed)
    run.passed.clear()

    def look() -> None:
        nonlocal most
        seen: set[Any] = set()
        held = 0
        for unit, own in zip(run.units, passed, strict=False):
            held += sum(counted(own.saved, unit.path, seen).values())
            held += 0 if own.loss is None else sum(counted(own.loss, "", seen).values())
        for made in filter(None, (ref() for ref in ar.made)):
            held += 0 if identity(made) in seen else made.nbytes
            seen.add(identity(made))
        most = max(most, held)

    ar.look.append(look)
    grads, dx = model.gradients(), None
    for unit in reversed(run.units):
        look()
        dlogits = prepared._dlogits(run.given, unit, passed[-1]) if unit.has_logits else None
        passed[-1] = prepared.Passed(passed[-1].saved)  # the loss is done
        dx = unit_backward(
            run.given.context, unit, dx, dlogits, passed[-1].saved, run.given.tokens[unit.depth], grads
        )
        passed.pop()
        assert not [ref for ref in ar.made if ref() is not None], "what was computed again outlives its unit"
        ar.made.clear()
    reference = refimpl.load((model.config, model.weights), Watching(ar.recipe), training=TRAINING)
    expected = reference.backward(reference.forward(IDS, labels=IDS, trace=()))
    for name, gradient in grads.drain():
        assert bits(gradient) == bits(expected[name]), name
    return most


WIDE = {"hidden_size": 130, "intermediate_size": 140, "vocab_size": 29}


@pytest.mark.parametrize(
    "changes",
    [{}, WIDE, {"q_lora_rank": None, "first_k_dense_replace": 2}, {"moe_intermediate_size": 150}],
    ids=str,
)
@pytest.mark.parametrize(
    "recipe",
    [V3, RECIPES["v3.1-ue8m0"], BF16.changed("down_proj.in", keep="recomputed"), RECIPES["hf-bf16"]],
    ids=lambda r: r.name,
)
def test_the_most_that_is_held_is_what_the_rules_say(recipe: Recipe, changes: dict[str, Any]) -> None:
    cfg = config(num_nextn_predict_layers=2, **changes)
    model, result = run(cfg, Watching(recipe))
    asked = predicted(cfg, recipe, load_of(result))
    assert measured_peak(model, result) == peak(asked)


@cache
def gradients(recipe: Recipe) -> dict[str, Array]:
    model, result = run(CFG, with_rules(recipe))
    return dict(model.backward(result))


def differing(a: dict[str, Array], b: dict[str, Array]) -> set[str]:
    return {name for name in a if bits(a[name]) != bits(b[name])}


@pytest.mark.parametrize("carrier", ["exact", "float32"])
class TestBits:
    def test_all_norm_outputs_and_up_projections_kept_or_not(self, carrier: str) -> None:
        for base in (V3, BF16, RECIPES["hf-bf16"]):
            kept = recomputed = base.set([f"carrier={carrier}"])
            for site in EXACT:
                kept = kept.changed(site, keep="codes")
                recomputed = recomputed.changed(site, keep="recomputed")
            assert not differing(gradients(kept), gradients(recomputed)), base.name

    @pytest.mark.parametrize("site", sites.RECOMPUTABLE)
    def test_one_site_at_a_time(self, carrier: str, site: str) -> None:
        base = V3.set([f"carrier={carrier}"])
        dropped = base.rule(site).keep == "recomputed"
        other = base.changed(site, keep="codes" if dropped else "recomputed")
        found = differing(gradients(base), gradients(other))
        if site in ("experts.down_proj.in", "shared_experts.down_proj.in"):
            # By design: SwiGLU of its inputs in FP8 is not the SwiGLU that down_proj read.
            owner = ".mlp.shared_experts." if site.startswith("shared") else ".mlp.experts."
            assert found
            assert all(owner in name and name.endswith(".down_proj.weight") for name in found)
        else:
            assert not found

    def test_swiglu_of_inputs_that_were_kept_as_they_were(self, carrier: str) -> None:
        base = BF16.set([f"carrier={carrier}"])
        other = base.changed("*down_proj.in", keep="recomputed")
        assert not differing(gradients(base), gradients(other))

    def test_what_is_kept_is_what_backward_reads(self, carrier: str) -> None:
        """A value in another format is read in that format, though the rest is computed again."""
        base = V3.set([f"carrier={carrier}"])
        settings = ("scale=ue8m0", "format=e4m3", "tile=1x128", "keep=codes")
        codes = base.set([f"attention.key.{setting}" for setting in settings])
        assert differing(gradients(base), gradients(codes))


def test_what_was_not_kept_cannot_be_read() -> None:
    with pytest.raises(AssertionError, match="before it was computed again"):
        Dropped().value()
