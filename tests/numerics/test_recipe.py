"""Recipes: what can be changed, what is refused, how they are written and read."""

from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from itertools import permutations
from typing import Any

import pytest
from support import one_sentence

from refimpl.errors import Invalid
from refimpl.numerics import sites
from refimpl.numerics.recipe import Recipe, Rule
from refimpl.numerics.recipes import RECIPES

V3 = RECIPES["v3-fp8"]
WHOLE = Rule("*", "bf16", "modelled", "")


@pytest.mark.parametrize("site", [s for s in sites.every() if s not in sites.RECOMPUTABLE])
def test_what_no_layer_computes_again_cannot_be_dropped(site: str) -> None:
    rule = replace(WHOLE, site=site, keep="recomputed")
    with pytest.raises(Invalid) as caught:
        Recipe("r", (rule, WHOLE))
    one_sentence(caught, site, "recomputed")


def test_a_pattern_is_refused_for_the_first_site_that_it_decides_and_may_not_drop() -> None:
    with pytest.raises(Invalid) as caught:
        Recipe("r", (Rule("attention.*", "bf16", "modelled", "", keep="recomputed"), WHOLE))
    one_sentence(caught, "attention.")
    earlier = [Rule(s, "bf16", "modelled", "") for s in sites.every() if s not in sites.RECOMPUTABLE]
    Recipe("r", (*earlier, replace(WHOLE, keep="recomputed")))  # a pattern that decides no other site may


@pytest.mark.parametrize("site", sites.RECOMPUTABLE)
def test_what_layers_compute_again_may_be_dropped(site: str) -> None:
    assert site in sites.every()
    for recipe in RECIPES.values():
        assert recipe.changed(site, keep="recomputed").rule(site).keep == "recomputed"


@pytest.mark.parametrize(
    ("site", "tile"),
    [
        ("o_proj.in", "128x1"),
        ("o_proj.in.fprop", "128x1"),
        ("experts.up_proj.dy", "128x1"),
        ("o_proj.in.wgrad", "1x128"),
        ("up_proj.dy.wgrad", "1x128"),
        ("kv_b_proj.weight", "1x128"),
        ("kv_b_proj.weight", "128x1"),
    ],
)
def test_tiles_that_no_product_can_read_are_refused(site: str, tile: str) -> None:
    with pytest.raises(Invalid) as caught:
        V3.changed(site, format="e4m3", tile=tile, scale="ieee")
    one_sentence(caught, f"{site}.tile is '{tile}'")


@pytest.mark.parametrize("name", list(RECIPES))
def test_what_is_written_is_read_back(name: str) -> None:
    changed = RECIPES[name].changed("o_proj.dy", format="bf16", tile="", scale="").set(["carrier=float32"])
    for recipe in (RECIPES[name], changed):
        assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (lambda d: d.pop("carrier"), "other fields"),
        (lambda d: d.update(colour="red"), "other fields"),
        (lambda d: d.update(rules="many"), "other fields"),
        (lambda d: d.update(name=7), "must be text"),
        (lambda d: d["rules"].append("*"), "must be text"),
        (lambda d: d["rules"][0].update(format=8), "must be text"),
        (lambda d: d["rules"][0].pop("keep"), "it must have site"),
        (lambda d: d["rules"][0].update(colour="red"), "it must have site"),
        (lambda d: d["rules"][0].update(format="e9m9"), "e9m9"),
        (lambda d: d.update(carrier="float16"), "float16"),
        (lambda d: d["rules"].pop(), "no rule for site"),
    ],
)
def test_what_is_no_recipe_is_refused(change: Any, fragment: str) -> None:
    given = V3.to_dict()
    change(given)
    with pytest.raises(Invalid) as caught:
        Recipe.from_dict(given)
    one_sentence(caught, fragment)


def test_the_meaning_is_all_but_names_and_sources() -> None:
    reworded = replace(
        V3, name="mine", rules=tuple(replace(r, source="", evidence="modelled") for r in V3.rules)
    )
    assert reworded.meaning == V3.meaning
    for i, rule in enumerate(V3.rules, 1):
        assert V3.meaning[f"row {i}"] == rule.site
        for field in ("format", "tile", "scale", "of", "keep", "accumulator"):
            assert V3.meaning[f"row {i}, {rule.site}.{field}"] == asdict(rule)[field]
    assert replace(V3, carrier="float32").meaning != V3.meaning


def test_a_change_touches_the_sites_that_fit_and_no_other() -> None:
    changed = V3.changed("*experts.*.dy", format="e5m2")
    for site in sites.every():
        same = changed.rule(site).format == V3.rule(site).format
        assert same != fnmatchcase(site, "*experts.*.dy"), site


@pytest.mark.parametrize(
    ("site", "field", "value"),
    [
        ("o_proj.in", "accumulator", "deepgemm"),
        ("*.in", "of", "source"),
        ("residual", "of", "source"),
        ("*.dy", "of", "source"),
        ("*.fprop", "format", "bf16"),
        ("lm_head.wgrad", "tile", "1x128"),
        ("*.dgrad", "keep", "codes"),
    ],
)
def test_a_change_that_nothing_reads_is_refused(site: str, field: str, value: str) -> None:
    with pytest.raises(Invalid) as caught:
        V3.changed(site, **{field: value})
    one_sentence(caught, f"{site}.{field} is changed")


@pytest.mark.parametrize(
    "site", ["q_b_proj.weight", "up_proj.dy.wgrad", "o_proj.in.wgrad", "o_proj.in.fprop"]
)
@pytest.mark.parametrize("format", ["e5m6", "e5m6fn", "e4m3fnuz"])
def test_codes_that_no_product_takes_are_refused_before_anything_is_computed(site: str, format: str) -> None:
    with pytest.raises(Invalid) as caught:
        V3.changed(site, format=format)
    one_sentence(caught, f"{site}.format is '{format}'", "reads codes of e4m3 or e5m2 alone")
    kept = site.removesuffix(".wgrad").removesuffix(".fprop")
    if kept != site:  # such codes may wait for the backward pass
        assert V3.changed(kept, format=format).rule(kept).format == format


def test_a_format_of_scales_is_no_format_of_values() -> None:
    with pytest.raises(Invalid) as caught:
        V3.changed("residual", format="ue8m0")
    one_sentence(caught, "residual.format is 'ue8m0'")


def test_a_field_named_site_is_unknown_as_any_other() -> None:
    for name in ("site", "self"):
        with pytest.raises(Invalid) as caught:
            V3.set([f"residual.{name}=x"])
        one_sentence(caught, f"residual.{name}", f"no field {name}")


@pytest.mark.parametrize("order", list(permutations(("format=e4m3", "tile=1x128", "scale=ieee"))))
def test_settings_of_one_site_are_one_change_in_any_order(order: tuple[str, ...]) -> None:
    made = V3.set([f"swiglu.gate.{setting}" for setting in order]).rule("swiglu.gate")
    assert (made.format, made.tile, made.scale) == ("e4m3", "1x128", "ieee")


def test_settings_of_other_sites_keep_their_turn() -> None:
    given = ["*.dy.tile=128x128", "o_proj.dy.tile=tensor", "carrier=float32", "*.dy.tile=1x128"]
    made = V3.set(given)
    assert (made.rule("q_a_proj.dy").tile, made.rule("o_proj.dy").tile) == ("1x128", "tensor")
    assert made.carrier == "float32"
