"""`refimpl recipe`: what it prints, what it refuses."""

import json
from pathlib import Path

import pytest

from refimpl import cli
from refimpl.numerics.recipe import Recipe
from refimpl.numerics.recipe_table import ABOUT
from refimpl.numerics.recipes import RECIPES


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(["recipe", *arguments])
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def test_without_a_name_every_ready_recipe_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys)
    assert status == 0
    assert set(ABOUT) == set(RECIPES)
    lines = out.splitlines()[2:]
    assert [line.split()[0] for line in lines] == list(RECIPES)
    assert all(len(line.split()) > 3 for line in lines)


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_row_is_printed_with_its_source(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, name)
    assert status == 0
    rows = [line for line in out.splitlines()[4:] if line]
    assert len(rows) == len(RECIPES[name].rules)
    for line, rule in zip(rows, RECIPES[name].rules, strict=True):
        assert line.split()[:2] == [rule.site, rule.format]
        assert line.rstrip().endswith(rule.source.rstrip())


def test_a_changed_row_is_shown_as_changed(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "v3-fp8", "--set", "*.dy.tile=128x128", "--set", "carrier=float32")
    assert "between its sites float32" in out
    line = next(line for line in out.splitlines() if line.startswith("*.dy "))
    assert "128x128" in line
    assert line.rstrip().endswith("changed by hand")


def test_the_products_of_every_linear_follow_from_the_rows(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "v3-fp8", "--json", "-", "--sites")
    shown = {(p["linear"], p["gemm"]): p for p in json.loads(out)["linears"]}
    kept = {own: p["kept"] for (own, gemm), p in shown.items() if gemm == "Fprop"}
    assert kept["o_proj"] == "e5m6 codes"
    assert kept["experts.up_proj"] == "e4m3 codes"
    assert kept["q_b_proj"] == kept["lm_head"] == "nothing: computed again"
    assert shown["o_proj", "Fprop"]["a"] == "x: e4m3 1x128 ue8m0"
    assert shown["o_proj", "Dgrad"]["a"] == "dy: e4m3 1x128 ieee"
    wgrad = shown["experts.down_proj", "Wgrad"]
    assert wgrad["a"] == "dy: e4m3 128x1 ue8m0 of the codes"
    assert wgrad["b"] == "x: e4m3 128x1 ieee of the codes"
    assert wgrad["tokens"] == "of each expert, padded to 128"
    assert shown["up_proj", "Wgrad"]["a"] == "dy: e4m3 128x1 ieee of the source"
    assert (shown["up_proj", "Wgrad"]["accumulator"], shown["up_proj", "Wgrad"]["output"]) == (
        "deepgemm",
        "fp32",
    )
    assert (shown["lm_head", "Fprop"]["b"], shown["lm_head", "Fprop"]["accumulator"]) == ("w: bf16", "exact")


def test_json_is_read_back_as_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.json"
    status, out, _ = run(capsys, "fp8", "--set", "o_proj.in.format=e4m3", "--json", str(path))
    assert (status, out.splitlines()[0].split(",")[0]) == (0, "v3-fp8")
    read = Recipe.from_dict(json.loads(path.read_text()))
    assert read == RECIPES["v3-fp8"].set(["o_proj.in.format=e4m3"])


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("v4-fp4",), "recipe 'v4-fp4' is unknown"),
        (("v3-fp8@float16",), "v3-fp8@float16"),
        (("float32",), "recipe 'float32' is unknown"),
        (("v3-fp8", "--set", "o_proj.inn.format=e4m3"), "site o_proj.inn is unknown"),
        (("v3-fp8", "--set", "*.dy.colour=red"), "no field colour"),
        (("v3-fp8", "--set", "*.dy.source=me"), "no field source"),
        (("v3-fp8", "--set", "*.dy.format=e9m9"), "format is 'e9m9'"),
        (("v3-fp8", "--set", "*.dy.format"), "SITE.FIELD=VALUE"),
        (("v3-fp8", "--set", "carrier=float16"), "carrier is 'float16'"),
        (("v3-fp8", "--set", "*.fprop.accumulator=magic"), "accumulator is 'magic'"),
        (("v3-fp8", "--set", "norm.in.keep=recomputed"), "no layer computes that value again"),
        (("v3-fp8", "--set", "o_proj.in.tile=128x1"), "o_proj.in.tile is '128x1'"),
        (("--set", "*.dy.format=e5m2"), "none is named"),
        (("--sites",), "none is named"),
        (("bf16", "--json", "/nowhere/at/all.json"), "/nowhere/at/all.json"),
    ],
    ids=str,
)
def test_what_is_unknown_is_one_sentence(
    arguments: tuple[str, ...], fragment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert out == ""
    assert err.startswith("refimpl: ")
    assert err.endswith(".\n")
    assert err.count("\n") == 1
    assert fragment in err
