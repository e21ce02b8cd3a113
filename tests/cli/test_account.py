"""`refimpl account`: the tables of memory."""

import json
import re
from pathlib import Path

import pytest

from refimpl import cli
from refimpl.accounting.kept import peak, predicted, total
from refimpl.accounting.load import Load
from refimpl.accounting.memory import recomputing
from refimpl.config.presets import preset
from refimpl.numerics import sites
from refimpl.numerics.recipes import RECIPES

V3, BF16 = RECIPES["v3-fp8"], RECIPES["bf16"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        status = cli.main(["account", *arguments])
    except SystemExit as leave:  # argparse
        status = int(str(leave.code))
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def cells(out: str, row: str) -> list[str]:
    line = next(line for line in out.splitlines() if line.startswith(f"{row} "))
    return re.split(r"\s{2,}", line.strip())[1:]


def test_the_published_model_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "deepseek-v3")
    assert status == 0
    assert cells(out, "in all") == ["14", "13.0033"]
    assert cells(out, "routed experts")[1:] == ["2", "14", "1.0002", "13.0002"]
    dense, moe = out.index("dense layer, 3 of them"), out.index("MoE layer, 58 of them")
    assert cells(out[moe:], "experts.in") == ["114,688", "114,688", "59,136"]
    assert cells(out[moe:], "o_proj.in") == ["32,768", "32,768", "25,088"]
    assert cells(out[dense:moe], "attention.key") == ["49,152", "0", "0"]
    load = Load.full(preset("deepseek-v3"), 1, 4096)
    units = predicted(preset("deepseek-v3"), V3, load)
    assert cells(out, "kept for backward, GB")[2] == f"{total(units) / 1e9:.3f}"
    assert cells(out, "most held during backward, GB")[2] == f"{peak(units) / 1e9:.3f}"


def test_tokens_recipes_and_changed_rows(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("tiny-v3-mtp", "--tokens", "2", "8", "--recipe", "hf-bf16", "--recipe", "v3-fp8")
    status, out, _ = run(capsys, *arguments, "--set", "o_proj.in.format=e4m3", "--json", "-")
    assert status == 0
    shown = json.loads(out)
    assert shown["memory"]["tokens"] == [2, 8]
    both = shown["memory"]["recipes"]
    assert list(both) == ["hf-bf16", "v3-fp8, changed"]
    cfg = preset("tiny-v3-mtp")
    width = cfg.num_attention_heads * cfg.v_head_dim
    for name, at in (("hf-bf16", 2 * width), ("v3-fp8, changed", width + 4 * -(-width // 128))):
        unit = both[name]["activations"][1]
        assert (unit["kind"], unit["kept"]["o_proj.in"]) == ("dense layer", 16 * at)
        assert both[name]["kept"] == sum(unit["total"] for unit in both[name]["activations"])
        assert both[name]["peak"] >= both[name]["kept"]


def test_a_recipe_stands_beside_itself_with_a_row_changed(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("tiny-v3", "--recipe", "v3-fp8", "--recipe", "v3-fp8", "--set", "o_proj.in.format=e4m3")
    status, out, _ = run(capsys, *arguments, "--json", "-")
    assert status == 0
    one, other = (entry["kept"] for entry in json.loads(out)["memory"]["recipes"].values())
    assert other < one


def test_a_config_file_and_a_file_of_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "config.json", tmp_path / "account.json"
    path.write_text(json.dumps(preset("tiny-v3").to_dict()))
    status, shown, _ = run(capsys, str(path), "--tokens", "1", "4", "--json", str(out))
    assert status == 0
    assert "Bytes per parameter" in shown
    assert json.loads(out.read_text())["memory"]["tokens"] == [1, 4]


def test_the_recipe_between_differs_from_the_first_in_what_is_computed_again() -> None:
    between = recomputing(BF16, V3)
    for site in sites.every():
        rule, own, like = between.rule(site), BF16.rule(site), V3.rule(site)
        assert (rule.format, rule.accumulator) == (own.format, own.accumulator)
        assert (rule.keep == "recomputed") == (like.keep == "recomputed")


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("deepseek-v5",), "'deepseek-v5' is neither a file nor one of"),
        (("deepseek-v3.2",), "deepseek_v32"),
        (("tiny-v3", "--recipe", "v4"), "recipe 'v4' is unknown"),
        (("tiny-v3", "--recipe", "bf16", "--recipe", "bf16"), "a recipe twice"),
        (("tiny-v3", "--set", "*.dy.colour=red"), "no field colour"),
        (("tiny-v3", "--json", "/nowhere/at/all.json"), "/nowhere/at/all.json"),
    ],
    ids=str,
)
def test_what_cannot_be_counted_is_one_sentence(
    arguments: tuple[str, ...], fragment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("refimpl: ")
    assert err.endswith(".\n")
    assert err.count("\n") == 1
    assert fragment in err


@pytest.mark.parametrize("tokens", [("0", "4"), ("1",), ("1", "-4"), ("1", "many")])
def test_tokens_have_to_be_two_numbers(tokens: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "tiny-v3", "--tokens", *tokens)
    assert status == 2
    assert "--tokens" in err


def test_a_file_that_is_no_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text("{}")
    status, _, err = run(capsys, str(path))
    assert status == 2
    assert "model_type is missing" in err
