"""Cases of a recipe: what is stored of every GEMM, and how a port is judged by it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from refimpl import cli, recipe_programs
from refimpl.cases import folder as folders
from refimpl.cases import staged
from refimpl.cases.build import Built, build
from refimpl.cases.folder import Folder
from refimpl.cases.format import PROBE, REQUIRED
from refimpl.cases.setting import setting_of
from refimpl.cases.suites import definition, suite
from refimpl.checkpoint import safetensors
from refimpl.errors import Invalid
from refimpl.numerics import tensorcore_twin as twin
from refimpl.numerics.arithmetic import Exact
from refimpl.numerics.float32 import to_bf16
from refimpl.numerics.formats import BF16, round_to
from refimpl.numerics.gemm import gemm_fp8
from refimpl.numerics.recipe import Recipe
from refimpl.numerics.scaled import quantised
from refimpl.recipe_programs import Noting
from refimpl.validate import stagewise
from refimpl.validate.tensor import HOLDS, MISSING, OFF
from refimpl.validate.verdict import Verdict, check
from refimpl.variants.mutants import BITS_MUTANTS
from refimpl.variants.zoo.recipes import RECIPE_ZOO

CASES = [case.id for case in suite("recipe")]
SMALL = ["recipe/linear-v3-fp8", "recipe/expert-v3-fp8", "recipe/mla-v3-fp8"]
ELEMENTS = 3  # of a product that the plain loop computes


@cache
def built(id: str) -> Built:
    return build(definition(id))


def gemms(id: str) -> list[str]:
    names = [t.name for t in built(id).case.outputs]
    return [name.removesuffix(".d") for name in names if name.endswith(".d")]


@pytest.fixture(scope="module")
def golden(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("golden")
    for id in SMALL:
        b = built(id)
        folders.write(root, b.case, b.given, b.expected, b.extras, False)
    return root


def answered(golden: Path, id: str, ar: type[Noting] | None, recipe: Recipe, probes: bool) -> Verdict:
    """The verdict on a port that computes the case in another arithmetic."""
    at = Folder.open(golden / id)
    setting = setting_of(at, Exact())
    made = recipe_programs.run(at.case.component, setting, recipe, arithmetic=ar)
    listed = {t.name: t for t in at.case.outputs}
    given = {}
    for m in made:
        t = listed.get(m.name)
        if t is None or (t.role == PROBE and not probes):
            continue
        codes = m.ours if m.kind == recipe_programs.CODES else staged.stored_as(m.ours, t.dtype)
        given[m.name] = folders.stored(codes, t.dtype)
    safetensors.write(golden / "answer.safetensors", given)
    return check(golden / id, golden / "answer.safetensors", "fp8")


def recipe_of(id: str) -> Recipe:
    return staged.recipe_of(built(id).case.arguments)


@pytest.mark.parametrize("id", CASES)
def test_every_stored_product_is_that_of_the_plain_loop_from_the_stored_codes(id) -> None:
    expected, names = built(id).expected, gemms(id)
    assert names
    rng = np.random.default_rng(1)
    for name in names:
        a, b, d = (expected[f"{name}.{part}"] for part in ("a", "b", "d"))
        sa, sb = (expected[f"{name}.{part}_scale"] for part in ("a", "b"))
        whole = gemm_fp8(a, sa.view(np.float32), b, sb.view(np.float32), "deepgemm")
        assert np.array_equal(whole.view(np.uint32), d)
        for _ in range(ELEMENTS):
            i, j = int(rng.integers(len(a))), int(rng.integers(len(b)))
            operands = (a[i].tolist(), sa[i].tolist(), b[j].tolist(), sb[j].tolist())
            assert twin.gemm(*operands, "deepgemm") == d[i, j], (name, i, j)


@pytest.mark.parametrize("id", CASES)
def test_a_linear_has_three_products_with_their_operands(id) -> None:
    names = gemms(id)
    linears = {name.rpartition(".")[0] for name in names}
    assert {f"{own}.{kind}" for own in linears for kind in ("fprop", "dgrad", "wgrad")} == set(names)
    listed = {t.name for t in built(id).case.outputs}
    assert {f"{name}.{part}" for name in names for part in ("a", "a_scale", "b", "b_scale", "d")} <= listed


def test_a_gradient_is_bf16_where_it_is_quantised_unless_swiglu_gave_it() -> None:
    for id in CASES:
        for t in built(id).case.outputs:
            if t.name.endswith(".dy"):
                fused = t.name.endswith((".gate_proj.dy", ".up_proj.dy"))
                assert t.dtype == ("F32" if fused else "BF16"), t.name


def test_wgrad_reads_tiles_along_the_tokens_of_each_expert() -> None:
    expected = built("recipe/moe-v3-fp8").expected
    idx = next(v for n, v in built("recipe/moe-v3-fp8").given.items() if n.endswith("topk_idx"))
    for expert in np.unique(idx):
        own = int(np.count_nonzero(idx == expert))
        name = f"model.layers.3.mlp.experts.{expert}.up_proj.wgrad"
        codes, scales = expected[f"{name}.b"], expected[f"{name}.b_scale"]
        assert codes.shape == (384, 128 * -(-own // 128))
        assert scales.shape == (384, -(-own // 128))
        assert not codes[:, own:].any()


@pytest.mark.parametrize("probes", [True, False], ids=["all tensors", "results"])
@pytest.mark.parametrize("member", RECIPE_ZOO[1:], ids=lambda m: m.name)
@pytest.mark.parametrize("id", SMALL)
def test_what_is_as_right_holds(golden, id, member, probes) -> None:
    verdict = answered(golden, id, None, member.arithmetic(recipe_of(id)).recipe, probes)
    assert verdict.holds
    assert all(t.verdict in (HOLDS, MISSING) for t in verdict.tensors)


@pytest.mark.parametrize("id", SMALL[:2])
@pytest.mark.parametrize("setting", ["*.in.wgrad.of=source", "*.dy.wgrad.of=codes"])
def test_what_the_report_leaves_open_about_wgrad_is_named(golden, id, setting) -> None:
    verdict = answered(golden, id, None, recipe_of(id).set([setting]), True)
    assert [t.name for t in verdict.tensors if t.verdict == OFF and ".wgrad." in t.name] == []
    site, _, other = setting.removeprefix("*.").partition(".wgrad.")
    notes = {t.note for t in verdict.tensors if t.name.endswith((".wgrad.a", ".wgrad.b")) and t.note}
    assert notes
    assert all(f"{site}.wgrad.{other}" in note for note in notes)


def test_a_product_says_whose_it_is(golden) -> None:
    other = recipe_of(SMALL[0]).set(
        [f"*.{gemm}.accumulator=promote_fp32" for gemm in ("fprop", "dgrad", "wgrad")]
    )
    verdict = answered(golden, SMALL[0], None, other, True)
    notes = {t.note for t in verdict.tensors if t.name.endswith(".d")}
    assert notes == {"accumulated as promote_fp32"}


@pytest.mark.parametrize("id", SMALL)
def test_wrong_scales_in_dgrad_are_found_there_and_nowhere_else(golden, id) -> None:
    verdict = answered(golden, id, BITS_MUTANTS["L17b"].recipe, recipe_of(id), True)
    off = [t.name for t in verdict.tensors if t.verdict == OFF]
    assert off
    assert all(name.endswith(".dgrad.b_scale") for name in off)


@pytest.mark.parametrize("id", SMALL)
def test_results_alone_show_wrong_scales_too(golden, id) -> None:
    verdict = answered(golden, id, BITS_MUTANTS["L17b"].recipe, recipe_of(id), False)
    assert not verdict.holds
    assert all(t.name.startswith("grad.") for t in verdict.tensors if t.verdict == OFF)


def test_one_scale_for_a_row_is_found_where_codes_are_made(golden) -> None:
    verdict = answered(golden, SMALL[0], BITS_MUTANTS["F11"].recipe, recipe_of(SMALL[0]), True)
    assert verdict.first_off is not None
    assert verdict.first_off.name == "self_attn.in.codes"


@pytest.mark.parametrize("dtype", ["F64", "F32", "BF16", "F16"])
def test_values_may_be_of_any_floating_point_type(golden, dtype) -> None:
    b, given = built(SMALL[0]), {}
    for t in b.case.outputs:
        if t.within is not None and (dtype != "BF16" or not t.name.endswith("weight")):  # gradients are FP32
            number = staged.value_of(b.expected[t.name], t.dtype)
            single = number.astype({"F64": np.float64, "F16": np.float16}.get(dtype, np.float32))
            given[t.name] = folders.stored(to_bf16(single), dtype) if dtype == "BF16" else single
    safetensors.write(golden / "answer.safetensors", given)
    verdict = check(golden / SMALL[0], golden / "answer.safetensors")
    assert {t.name: t.verdict for t in verdict.tensors if t.name in given} == dict.fromkeys(given, HOLDS)


def test_codes_are_made_of_values_as_the_port_gave_them_and_not_as_the_case_stores_them(golden) -> None:
    given, case = {}, built(SMALL[0]).case
    value, codes = (
        next(t for t in case.outputs if t.name == f"self_attn.in{part}") for part in ("", ".codes")
    )
    x = staged.value_of(built(SMALL[0]).expected[value.name], value.dtype).astype(np.float32)
    x *= np.float32(1 + 2.0**-10)  # no BF16
    made = quantised(x, recipe_of(SMALL[0]).rule(value.name))
    given = {value.name: x, codes.name: folders.stored(made.codes, codes.dtype)}
    given[f"{codes.name}_scale"] = made.scales
    safetensors.write(golden / "answer.safetensors", given)
    verdict = check(golden / SMALL[0], golden / "answer.safetensors")
    assert {t.name: t.verdict for t in verdict.tensors if t.name in given} == dict.fromkeys(given, HOLDS)


def test_what_is_off_is_said_in_words(golden) -> None:
    wide = recipe_of(SMALL[0]).set(["*.dy.wgrad.tile=128x128"])
    verdict = answered(golden, SMALL[0], None, wide, True)
    assert verdict.first_off is not None
    assert verdict.first_off.name.endswith(".wgrad.a")
    assert verdict.first_off.note.startswith("codes of dy^T as Wgrad reads it: ")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("m.o_proj.fprop.a_scale", "scales of x as Fprop reads it"),
        ("m.o_proj.dgrad.b", "codes of w^T as Dgrad reads it"),
        ("m.o_proj.wgrad.d", "what Wgrad adds up"),
        ("m.down_proj.in.codes_scale.again", "scales of the value"),
        ("m.mlp.gate.topk_idx", "value"),
    ],
)
def test_every_tensor_of_a_recipe_has_words(name, said) -> None:
    assert stagewise.words(name) == said


def test_one_wrong_element_of_a_product_is_one(golden) -> None:
    id = SMALL[0]
    other = recipe_of(id).set([f"*.{gemm}.accumulator=promote_fp32" for gemm in ("fprop", "dgrad", "wgrad")])
    made = recipe_programs.run(built(id).case.component, setting_of(Folder.open(golden / id), Exact()), other)
    product = next(m for m in made if m.name.endswith(".fprop.d"))
    wrong = np.array(product.ours, np.float32)
    wrong[5, 7] = np.nan
    safetensors.write(golden / "answer.safetensors", {product.name: wrong})
    verdict = check(golden / id, golden / "answer.safetensors")
    found = next(t for t in verdict.tensors if t.name == product.name)
    assert (found.verdict, found.at) == (OFF, (5, 7))
    assert f"1 of {wrong.size} elements" in found.note


def test_a_product_of_no_known_unit_holds_if_it_is_as_accurate_and_not_otherwise(golden) -> None:
    class Off(Noting):
        factor = 2.0**-22

        def gemm(self, site, a, b):
            return super().gemm(site, a, replace(b, scales=b.scales * np.float32(1.0 + self.factor)))

    class FarOff(Off):
        factor = 2.0**-6

    id = SMALL[0]
    at = Folder.open(golden / id)
    for ar, holds in ((Off, True), (FarOff, False)):
        made = recipe_programs.run(at.case.component, setting_of(at, Exact()), recipe_of(id), arithmetic=ar)
        product = next(m for m in made if m.name.endswith(".fprop.d"))
        given = {product.name: folders.stored(staged.stored_as(product.ours, "F32"), "F32")}
        safetensors.write(golden / "answer.safetensors", given)
        verdict = check(golden / id, golden / "answer.safetensors")
        found = next(t for t in verdict.tensors if t.name == product.name)
        assert (found.verdict == HOLDS) == holds, found


def test_fp8_is_offered_by_cases_of_a_recipe_alone(golden, capsys, tmp_path) -> None:
    with pytest.raises(Invalid, match="bf16 was claimed"):
        check(golden / SMALL[0], golden / "answer.safetensors", "bf16")
    assert (
        cli.main(["check", str(golden / SMALL[0]), str(golden / "answer.safetensors"), "--as", "fp32"]) == 2
    )
    assert capsys.readouterr().err.count("\n") == 1


def test_a_diagnosis_that_cannot_be_had_is_said_so(golden, capsys) -> None:
    answered(golden, SMALL[0], BITS_MUTANTS["L17b"].recipe, recipe_of(SMALL[0]), True)
    arguments = ["check", str(golden / SMALL[0]), str(golden / "answer.safetensors"), "--diagnose"]
    assert cli.main(arguments) == 1
    assert "No diagnosis: " in capsys.readouterr().out


def test_the_zoo_bounds_values_and_a_tenth_too_little_is_rejected() -> None:
    for id in SMALL:
        case = built(id).case
        required = [t for t in case.outputs if t.role == REQUIRED]
        assert all(t.within is not None for t in required)
        assert not {t.name for t in required} & {
            name for name, why in case.certificate["not_applicable"].items() if "scaled" in why
        }


def test_an_accumulator_in_bf16_shows_in_a_weight_gradient_alone(golden) -> None:
    class Short(Noting):
        def gemm(self, site, a, b):
            total = np.zeros((len(a.codes), len(b.codes)))
            for at in range(0, a.codes.shape[1], 128):
                part, block = slice(at, at + 128), slice(at // 128, at // 128 + 1)
                one, other = (replace(r, codes=r.codes[:, part], scales=r.scales[:, block]) for r in (a, b))
                exact = gemm_fp8(one.codes, one.scales, other.codes, other.scales, "exact")
                total = round_to(total + exact, BF16)
            return total

    verdict = answered(golden, SMALL[0], Short, recipe_of(SMALL[0]), False)
    assert [t.name.rpartition(".")[2] for t in verdict.tensors if t.verdict == OFF] == ["weight"]
