"""The `bf16` recipe on a whole model: what it rounds, where, and what it keeps in float32."""

from fnmatch import fnmatchcase

import ml_dtypes
import numpy as np
import pytest
from support import V2, bits, config, model, random_ids, random_weights

import refimpl
from refimpl.numerics.arithmetic import Exact
from refimpl.numerics.recipe import Recipe, Rule
from refimpl.numerics.recipes import RECIPES
from refimpl.numerics.rounded import Rounded
from refimpl.numerics.sites import VALUES as SITES
from refimpl.numerics.sites import every

BF16 = RECIPES["bf16"]
FORMATS = {"bf16": ml_dtypes.bfloat16, "fp32": np.float32}
IDS = random_ids(config(), (2, 6), 3)
MODEL = model(precision="bf16")
RESULT = MODEL.forward(IDS, labels=IDS)
LAYER = "model.layers.1."


class Listening(Exact):
    """The exact arithmetic that writes down the sites that values cross."""

    def __init__(self) -> None:
        self.sites: set[str] = set()

    def at(self, site: str, x: np.ndarray) -> np.ndarray:
        self.sites.add(site)
        return x


def all_sites() -> set[str]:
    ar = Listening()
    training = refimpl.TrainingConfig(ema_decay=0.5, warmup_steps=0)
    for cfg in (config(num_nextn_predict_layers=2), config(q_lora_rank=None), config(**V2)):
        state = refimpl.training.start(cfg, random_weights(cfg, 1), training, precision=ar)
        refimpl.training.step(state, [{"input_ids": IDS, "labels": IDS}])
    return ar.sites


def on_grid(x: np.ndarray, form: str) -> np.ndarray:
    """Which elements are values of a format, by another library's conversion."""
    return x.astype(FORMATS[form]).astype(np.float64) == x


def first_match(site: str) -> str:
    return next(rule.site for rule in BF16.rules if fnmatchcase(site, rule.site))


def test_every_site_is_documented_and_every_documented_site_exists() -> None:
    sites = all_sites()
    assert [s for s in sites if not any(fnmatchcase(s, pattern) for pattern in SITES)] == []
    assert [pattern for pattern in SITES if not any(fnmatchcase(s, pattern) for s in sites)] == []


def test_every_rule_of_the_recipe_decides_about_some_site() -> None:
    assert {first_match(site) for site in all_sites() | set(every())} == {rule.site for rule in BF16.rules}


@pytest.mark.parametrize(
    "cfg", [config(), config(**V2), config(q_lora_rank=None)], ids=["v3", "v2", "no q latent"]
)
def test_every_named_tensor_is_on_the_grid_of_its_site(cfg) -> None:
    result = model(cfg, precision="bf16").forward(IDS)
    for name, tensor in result.tensors.items():
        if tensor.dtype.kind != "f":
            continue
        float32 = ".gate." in name or name.endswith(".scores") or name in ("lm_head", "logits")
        assert on_grid(tensor, "fp32" if float32 else "bf16").all(), name


def test_the_gate_is_kept_in_float32() -> None:
    for leaf in ("logits", "scores", "topk_weight"):
        tensor = RESULT.tensors[f"{LAYER}mlp.gate.{leaf}"]
        assert on_grid(tensor, "fp32").all()
        assert on_grid(tensor, "bf16").mean() < 0.3


def test_attention_scores_are_kept_in_float32_and_probabilities_are_not() -> None:
    scores, probs = (RESULT.tensors[f"{LAYER}self_attn.{leaf}"] for leaf in ("scores", "probs"))
    seen = np.isfinite(scores)
    assert on_grid(scores[seen], "bf16").mean() < 0.3
    assert on_grid(probs, "bf16").all()


def test_gradients_of_activations_are_rounded_where_they_are_stored() -> None:
    """As that which reaches the embedding: sums over tokens are not rounded, and here ids differ."""
    ids = np.arange(12).reshape(2, 6)
    gradient = MODEL.backward(MODEL.forward(ids, targets=ids))["model.embed_tokens.weight"]
    assert gradient.any(-1).sum() == 12
    assert on_grid(gradient, "bf16").all()


def test_it_is_near_exact_and_not_equal() -> None:
    exact = model(precision="exact")
    own = RESULT.tensors[f"{LAYER}mlp.gate.topk_idx"]
    logits = exact.forward(IDS, routing={1: own}).logits
    error = np.abs(RESULT.logits - logits).max() / np.abs(logits).max()
    assert 2.0**-9 / 10 < error < 20 * 2.0**-9


def test_packed_equals_separate_bit_for_bit_here_too() -> None:
    segments = np.repeat([[0, 1]], [4, 2], axis=1)
    packed = MODEL.forward(IDS[:1], segment_ids=segments).logits
    alone = [MODEL.forward(IDS[:1, part]).logits for part in (slice(0, 4), slice(4, 6))]
    assert bits(packed) == bits(np.concatenate(alone, 1))


def test_a_recipe_of_no_roundings_is_exact() -> None:
    plain = Recipe("plain", (Rule("*", "carrier", "modelled", "nothing is rounded"),))
    one = model(precision=plain)
    result, exact = one.forward(IDS, labels=IDS), model(precision="exact").forward(IDS, labels=IDS)
    assert one.ar.name == "plain"
    assert bits(result.logits) == bits(exact.logits)


def test_the_first_rule_that_matches_counts() -> None:
    recipe = Recipe("r", (Rule("gate.*", "fp32", "modelled", ""), Rule("*", "bf16", "modelled", "")))
    value = np.array([1 + 2.0**-20 + 2.0**-40])
    assert Rounded(recipe).at("gate.scores", value).item() == 1 + 2.0**-20
    assert Rounded(recipe).at("mlp.in", value).item() == 1.0


def test_a_site_without_a_rule_is_impossible() -> None:
    with pytest.raises(AssertionError, match="no rule for site residual"):
        Rounded(Recipe("r", (Rule("gate.*", "fp32", "modelled", ""),))).at("residual", np.ones(1))
