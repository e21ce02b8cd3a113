"""What --port names, what a port.toml may say, and what a module is given."""

import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from refimpl.cases import format
from refimpl.cases.folder import Folder
from refimpl.errors import Invalid, Missing, Unreadable
from refimpl.validate import portfile, preparing
from refimpl.validate.given import PortCase
from refimpl.validate.port import Command, Module, parse
from refimpl.validate.running import Limits

GOLDEN = Path(__file__).parent.parent.parent / "golden"


def test_a_command_is_split_as_a_shell_splits_it():
    assert parse(f"{sys.executable} 'my port.py' --fast") == Command((sys.executable, "my port.py", "--fast"))


def test_a_python_file_with_run_is_a_module_and_one_without_is_not(tmp_path):
    path = tmp_path / "port.py"
    path.write_text("def run(case):\n    return None\n")
    assert parse(str(path)) == Module(str(path))
    path.write_text("from somewhere import compute as run\n")
    assert parse(str(path)) == Module(str(path))
    path.write_text("def main():\n    return None\n")
    with pytest.raises(Invalid, match=r"has no function run\(case\).*--port 'python "):
        parse(str(path))


def test_a_name_that_is_no_program_is_a_module():
    assert parse("my_package.port") == Module("my_package.port")


@pytest.mark.parametrize("text", ["", "  ", "./nowhere/port", "no-such-program-here --fast", "'unbalanced"])
def test_what_is_no_port_is_one_sentence(text):
    with pytest.raises(Invalid) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("raise RuntimeError('no GPU')", "cannot be imported"),
        ("x = 1", "has no function run"),
        ("import os; os._exit(4)", "ended its process while it was imported"),
    ],
)
def test_a_module_that_cannot_be_imported_cannot_be_tried(tmp_path, text, why):
    path = tmp_path / "port.py"
    path.write_text(text)
    with pytest.raises(Invalid, match=why):
        Module(str(path)).runner(threading.Event(), Limits(60.0, 1 << 40, 1 << 20))


def test_a_module_sees_a_case_as_case_json_says_it(tmp_path):
    folder = preparing.prepared(Folder.open(GOLDEN / "gate/v3"), tmp_path / "gate/v3")
    case = PortCase.open(folder)
    assert (case.id, case.component, case.kind, case.backward) == ("gate/v3", "gate", "forward", False)
    assert case.config["n_routed_experts"] == 256
    assert case.inputs["x"].dtype == np.float32
    assert list(case.weights) == [f"{case.path}.weight", f"{case.path}.e_score_correction_bias"]
    assert case.outputs[f"{case.path}.topk_idx"] == (48, 8)
    assert case.required == (f"{case.path}.topk_idx", f"{case.path}.topk_weight")
    with pytest.raises(Missing, match="has no y"):
        case.inputs["y"]


@pytest.mark.parametrize("name", ["gate/v3", "model/tiny-v3", "casts/e4m3-ptx", "rope/tables-yarn"])
def test_a_prepared_case_has_every_input_and_no_expected_value(tmp_path, name):
    compact = Folder.open(GOLDEN / name)
    made = Folder.open(preparing.prepared(compact, tmp_path / name))
    assert preparing.whole(made)
    assert made.case == compact.case
    assert not (made.path / format.EXPECTED).exists() or made.path == compact.path
    for t in made.case.tensors:
        if t.given and made.case.kind == "bits":
            assert format.digest(made.given_codes(t), t.dtype) == t.sha256
        elif t.given:
            made.given(t)  # which compares the digest


@pytest.mark.parametrize(
    ("text", "error", "why"),
    [
        ("precision = 'fp128'", Invalid, "fp128"),
        ("precision = 3", Invalid, "must be a claim, or a table"),
        ("components = 'gate'", Invalid, "must be a list"),
        ("component = ['gate']", Invalid, "'component'"),
        ("choices = 3", Invalid, "must be a table"),
        ("[choices]\nprofile = 'mine'", Invalid, "must be one of hf"),
        ("not toml", Unreadable, "is no TOML file"),
    ],
)
def test_a_port_toml_that_says_something_else_is_refused(tmp_path, text, error, why):
    (tmp_path / "port.toml").write_text(text)
    with pytest.raises(error, match=why):
        portfile.find([tmp_path])


def test_a_profile_is_the_beginning_of_the_declared_choices(tmp_path):
    text = "[precision]\ndefault = 'bf16'\ngate = 'fp32'\n'gate/w*' = 'tf32'\n"
    (tmp_path / "port.toml").write_text(
        text + "[choices]\nprofile = 'official'\nloss_divisor = 'positions'\n"
    )
    found = portfile.find([tmp_path / "none", tmp_path])
    assert found.choices["topk_norm_epsilon"] == 0.0
    assert found.choices["loss_divisor"] == "positions"
    claims = {
        name: found.claim_for(format.read(GOLDEN / name)) for name in ("gate/v3", "gate/wide", "norm/epsilon")
    }
    assert claims == {"gate/v3": "fp32", "gate/wide": "tf32", "norm/epsilon": "bf16"}
