"""Which alternative of a choice a port takes, seen in its numbers; contradictions are not let pass."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from refimpl.cases.claims import CLAIMS
from refimpl.cases.folder import Folder
from refimpl.cases.setting import setting_of
from refimpl.checkpoint import safetensors
from refimpl.errors import Invalid
from refimpl.validate import recomputed, summary
from refimpl.validate.inference import Trial
from refimpl.validate.output import Output
from refimpl.validate.port import Module
from refimpl.validate.portfile import PortFile, read
from refimpl.validate.results import HELD, NOT_HELD
from refimpl.validate.validation import Wanted, validate
from refimpl.validate.verdict import of_numbers

ROOT = Path(__file__).parent.parent.parent
GOLDEN = ROOT / "golden"
CASES = ("rope/tables-yarn", "rope/tables-yarn-short", "rope/yarn", "gate/single", "model/packed")

# What the programs compute in float32, under choices that the test names; the rest is that of any port.
PORT = """
from dataclasses import replace
import numpy as np
from refimpl import programs
from refimpl.cases.folder import Folder
from refimpl.cases.setting import setting_of
from refimpl.numerics.floating import Floating

def run(case):
    setting = setting_of(Folder.open(case.folder), Floating(np.float32))
    changes = CHANGES.get(case.id, CHANGES.get("", {}))
    setting = replace(setting, choices=setting.choices.replace(**changes))
    out = programs.run(case.component, setting)
    return {name: np.asarray(out[name]) * FACTOR for name in case.outputs}
"""

pytestmark = pytest.mark.skipif(os.name != "posix", reason="ports run in process groups")


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    root = tmp_path_factory.mktemp("cases")
    for name in CASES:
        shutil.copytree(GOLDEN / name, root / name)
    return root


@pytest.fixture
def validated(cases, tmp_path):
    def run(changes, declared=None, factor=1, suites=()):
        port = tmp_path / "port.py"
        port.write_text(f"CHANGES = {changes!r}\nFACTOR = {factor}\n{PORT}")
        wanted = Wanted(cases, tuple(suites), jobs=2)
        return validate(Module(str(port)), wanted, declared or PortFile())

    return run


def _under(found):
    return {r.id: dict(r.under) for r in found.cases if r.under}


def test_a_port_that_does_what_each_case_says_is_consistent(validated):
    found = validated({})
    assert found.holds
    assert not _under(found)
    own = {(s.choice, s.alternative): s.cases for s in found.seen if s.own}
    assert own["yarn_applies", "beyond_original"] == ("rope/tables-yarn-short",)
    assert "rope/yarn" in own["yarn_applies", "config"]
    assert own["topk_norm_single", "normalise"] == ("gate/single",)


def test_alternatives_of_two_choices_are_inferred_from_the_numbers_and_reported(validated):
    found = validated({"": {"yarn_applies": "never", "loss_divisor": "positions"}})
    assert found.holds, summary.text(found)
    never = {"yarn_applies": "never"}
    assert _under(found) == {
        "rope/tables-yarn": never,
        "rope/yarn": never,
        "model/packed": {
            **never,
            "loss_divisor": "positions",
        },  # with what is known from others
    }
    assert "The port does yarn_applies = never (not at all" in summary.text(found)
    assert all(r.claims[r.claim] for r in found.cases)


def test_a_port_that_takes_one_alternative_here_and_another_there_does_not_hold(validated):
    found = validated({"rope/yarn": {"yarn_applies": "never"}})
    assert not found.holds
    assert [r.status for r in found.cases] == [HELD] * len(CASES)
    (inconsistent,) = found.inconsistent
    assert inconsistent.choice == "yarn_applies"
    assert inconsistent.first == "rope/yarn"
    assert inconsistent.second in CASES
    text = summary.text(found)
    line = next(line for line in text.splitlines() if line.startswith("Inconsistent"))
    assert "yarn_applies is never in rope/yarn, but config in" in line
    assert text.endswith("It does not hold.")


def test_no_choice_excuses_what_is_not_a_choice(validated):
    found = validated({"": {"yarn_applies": "never"}}, factor=1.001, suites=["rope"])
    assert not found.holds
    assert {r.status for r in found.cases} == {NOT_HELD}
    assert not _under(found)


def test_declared_choices_are_held_to(validated, tmp_path):
    (tmp_path / "port.toml").write_text('[choices]\nyarn_applies = "never"\n')
    declared = read(tmp_path / "port.toml")
    assert validated({"": {"yarn_applies": "never"}}, declared, suites=["rope"]).holds
    found = validated({}, declared, suites=["rope"])
    by_id = {r.id: r.status for r in found.cases}
    assert by_id == {  # the short table has no YaRN either way
        "rope/tables-yarn": NOT_HELD,
        "rope/yarn": NOT_HELD,
        "rope/tables-yarn-short": HELD,
    }


def test_a_trial_knows_what_a_case_reads():
    reads = {name: Trial(Folder.open(GOLDEN / name), {}).reads for name in ("rope/yarn", "norm/epsilon")}
    assert reads["norm/epsilon"] == ()
    assert "yarn_applies" in reads["rope/yarn"]
    assert "loss_divisor" not in reads["rope/yarn"]


def test_an_alternative_that_changes_nothing_is_no_alternative():
    trial = Trial(Folder.open(GOLDEN / "gate/v3"), {})
    assert trial.under({"topk_norm_epsilon": 0.0}) is None
    assert trial.under({"group_score_size": "topk_over_groups"}) is None  # 8 // 4 is 2 as well


def test_rederived_tolerances_are_those_of_the_case(tmp_path):
    """Of an unchanged setting: computed by another way than the suite's, on the folder that was committed."""
    folder = Folder.open(GOLDEN / "gate/bias-12")
    setting = setting_of(folder, recomputed.FLOAT64)
    again = recomputed.rederived(folder, setting, recomputed.values(folder.case, setting))
    for t in folder.case.outputs:
        ours, own = again.case.tensor(t.name), folder.case.tensor(t.name)
        assert ours.extras.keys() == own.extras.keys(), t.name
        for kind in own.extras:
            np.testing.assert_allclose(
                again.extra(ours, kind), folder.extra(own, kind), rtol=0.02, atol=1e-12
            )
        if not t.set:
            assert ours.spread == pytest.approx(own.spread, rel=0.02, abs=1e-8)
    exact = {t.name: np.asarray(setting_values) for t, setting_values in _exact(folder, setting)}
    safetensors.write(tmp_path / "out.safetensors", exact)
    output = Output(folder.case, safetensors.open_file(tmp_path / "out.safetensors"))
    assert of_numbers(again, output, CLAIMS["fp32"]).holds


def _exact(folder, setting):
    outputs = recomputed.values(folder.case, setting)
    return [(t, outputs[t.name]) for t in folder.case.outputs]


def test_unknown_choices_in_a_port_toml_are_refused(tmp_path):
    (tmp_path / "port.toml").write_text("[choices]\nyarn = true\n")
    with pytest.raises(Invalid, match='choice "yarn" is unknown'):
        read(tmp_path / "port.toml")
