"""Adapters of real implementations, as far as they need none: their errors and what they leave to others."""

import sys

import pytest

from refimpl.errors import Invalid, Missing, Unreadable
from refimpl.validate.given import NotForMe, PortCase
from refimpl.validate.ports import command, deepseek, deepseek_code, transformers
from refimpl.validate.ports.command import NOT_FOR_ME, UNTRIED
from refimpl.validate.ports.trial import library

GOLDEN = "golden"


@pytest.fixture
def case():
    return lambda id: PortCase.open(f"{GOLDEN}/{id}")


@pytest.mark.parametrize("port", [transformers, deepseek])
@pytest.mark.parametrize("id", ["reject/bias-nan", "gemm/along-k"])
def test_cases_that_no_model_answers_are_not_for_an_adapter(port, id, case):
    with pytest.raises(NotForMe):
        port.outputs(case(id))


def test_deepseeks_code_has_no_attention_of_its_own_and_no_gradients(case):
    with pytest.raises(NotForMe, match="no module of its own"):
        deepseek.outputs(case("attention/causal"))
    with pytest.raises(NotForMe, match="--backward"):
        deepseek.outputs(case("norm/hidden-vjp"))


def test_a_library_that_is_absent_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(Missing, match=r"^the library torch cannot be imported .* has it\.$"):
        library("torch")


@pytest.mark.parametrize("port", [transformers, deepseek])
def test_the_command_says_77_with_the_reason_and_2_without_the_library(port, monkeypatch, capsys, tmp_path):
    output = str(tmp_path / "out.safetensors")
    assert port.ADAPTER.main([f"{GOLDEN}/reject/bias-nan", output]) == NOT_FOR_ME
    assert "does not check" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "torch", None)
    assert port.ADAPTER.main([f"{GOLDEN}/norm/hidden", output]) == UNTRIED
    assert capsys.readouterr().err.startswith("the library torch cannot be imported")
    assert not list(tmp_path.iterdir())


def test_options_of_a_module_come_from_the_environment_and_wrong_ones_are_refused(monkeypatch, capsys, case):
    monkeypatch.setenv(command.OPTIONS, "--dtype float8")
    with pytest.raises(Invalid, match="REFIMPL_PORT_OPTIONS"):
        transformers.run(case("norm/hidden"))
    assert "invalid choice" in capsys.readouterr().err


def test_a_checkout_that_is_not_named_or_is_none_is_one_sentence(tmp_path):
    with pytest.raises(Missing, match="REFIMPL_DEEPSEEK_V3 must name one"):
        deepseek_code.source("")
    with pytest.raises(Unreadable, match=r"model\.py is not there"):
        deepseek_code.source(str(tmp_path))


def test_a_checkout_that_imports_what_is_absent_is_one_sentence(tmp_path):
    (tmp_path / "inference").mkdir()
    (tmp_path / "inference" / "model.py").write_text("import kernel\nimport no_such_library\n")
    with pytest.raises(Missing, match="no_such_library"):
        deepseek_code.source(str(tmp_path))
    assert "kernel" not in sys.modules


def test_names_of_deepseeks_code_are_those_of_its_converter():
    assert deepseek_code.ours("layers.3.attn.wkv_a.weight") == (
        "model.layers.3.self_attn.kv_a_proj_with_mqa.weight"
    )
    assert deepseek_code.ours("layers.3.ffn.gate.bias") == "model.layers.3.mlp.gate.e_score_correction_bias"
    assert deepseek_code.ours("layers.3.ffn.experts.7.w2.weight") == (
        "model.layers.3.mlp.experts.7.down_proj.weight"
    )
    assert deepseek_code.ours("norm.weight") == "model.norm.weight"
