"""A whole port: whatever it does is one line of the report, and the other cases go on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from refimpl.validate import details, portfile, summary
from refimpl.validate.port import Command, Module
from refimpl.validate.portfile import PortFile
from refimpl.validate.results import FAILED, HELD, LEFT_OUT, NOT_FOR_ME, NOT_HELD, NOT_OFFERED
from refimpl.validate.validation import OUTPUT, Wanted, validate

ROOT = Path(__file__).parent.parent.parent
GOLDEN = ROOT / "golden"
MISBEHAVING = Path(__file__).parent / "misbehaving.py"
SAMPLE = GOLDEN / "sample_port.py"

pytestmark = pytest.mark.skipif(os.name != "posix", reason="ports run in process groups")


@pytest.fixture(autouse=True)
def _environment(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("CHILD", str(tmp_path / "child"))


def _copies(root, names, of="norm/epsilon"):
    """A folder of cases: the same case under several names."""
    for name in names:
        shutil.copytree(GOLDEN / of, root / of.partition("/")[0] / name)
    return root


def _command(script, *words):
    return Command((sys.executable, str(script), *words))


def _validate(port, cases, declared=None, **wanted):
    """id -> result, and all."""
    found = validate(port, Wanted(cases, **{"jobs": 2, "timeout": 60.0} | wanted), declared or PortFile())
    return {r.id.partition("/")[2]: r for r in found.cases}, found


def _gone(pid):
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":  # ended, and nobody has asked yet
            return True
        time.sleep(0.05)
    return False


AS_COMMAND = {
    "right": (HELD, ""),
    "surplus": (HELD, "surplus, not judged: debug"),
    "not-for-me": (NOT_FOR_ME, ""),
    "nan": (NOT_HELD, "elements are NaN or infinity"),
    "shape": (NOT_HELD, "instead of SHAPE"),
    "dtype": (NOT_HELD, "dtype I64"),
    "wrong": (NOT_HELD, "elements outside of their bound"),
    "missing": (NOT_HELD, "missing, it is required"),
    "crash": (FAILED, "ended by SIGABRT"),
    "leaves": (FAILED, "exit status 3"),
    "raises": (FAILED, "exit status 1: second line"),
    "truncated": (FAILED, "the output has"),
    "junk": (FAILED, "the output declares a header"),
    "sparse": (FAILED, " bytes"),
    "folder": (FAILED, "the output is not a regular file"),
    "pipe": (FAILED, "the output is not a regular file"),
    "floods": (FAILED, "wrote more than"),
    "silent": (FAILED, "no output was written"),
    "prints": (HELD, ""),
    "forks": (HELD, ""),
}
AS_MODULE = {
    "right": (HELD, ""),
    "surplus": (HELD, "surplus, not judged: debug"),
    "not-for-me": (NOT_FOR_ME, ""),
    "nan": (NOT_HELD, "elements are NaN or infinity"),
    "empty": (NOT_HELD, "missing, it is required"),
    "crash": (FAILED, "ended by SIGABRT"),
    "leaves": (FAILED, "ended its process with status 3"),
    "raises": (FAILED, "RuntimeError: this kernel is not there"),
    "unstorable": (FAILED, "has the type complex128"),
    "prints": (HELD, ""),
    "forks": (HELD, ""),
}


@pytest.fixture(scope="module")
def shape():
    case = json.loads((GOLDEN / "norm/epsilon/case.json").read_text())
    return next(tuple(t["shape"]) for t in case["tensors"] if t["role"] == "required")


@pytest.mark.parametrize(("expected", "port"), [(AS_COMMAND, "command"), (AS_MODULE, "module")])
def test_every_misbehaviour_is_one_line_and_the_other_cases_go_on(tmp_path, shape, expected, port):
    cases = _copies(tmp_path / "cases", expected)
    port = _command(MISBEHAVING) if port == "command" else Module(str(MISBEHAVING))
    found, whole = _validate(port, cases)
    for name, (status, why) in expected.items():
        why = why.replace("SHAPE", str(shape))
        assert (found[name].status, why in found[name].why) == (status, True), found[name]
        assert "\n" not in found[name].why
        assert str(tmp_path) not in found[name].why
    assert not whole.holds
    assert _gone(int((tmp_path / "child").read_text()))
    lines = summary.text(whole).splitlines()
    assert sum(line.startswith("norm/") for line in lines) == len(whole.tried)


def test_a_hang_is_ended_at_the_limit_with_all_that_it_started(tmp_path):
    cases = _copies(tmp_path / "cases", ["hangs", "right"])
    for port in (_command(MISBEHAVING), Module(str(MISBEHAVING))):
        start = time.monotonic()
        found, _ = _validate(port, cases, timeout=3.0)
        assert time.monotonic() - start < 30
        assert (found["hangs"].status, found["hangs"].why) == (FAILED, "took longer than 3 s")
        assert found["right"].status == HELD


def test_what_is_printed_is_kept_at_its_end_only(tmp_path):
    cases = _copies(tmp_path / "cases", ["prints"])
    found, whole = _validate(_command(MISBEHAVING), cases)
    ran = found["prints"].ran
    assert len(ran.stdout) <= 16 << 10
    assert ran.last_line == "the end of it"
    assert json.loads(details.text(whole))["cases"][0]["ran"]["stderr"] == "the end of it\n"


def test_an_input_that_must_be_refused(tmp_path):
    """Refusing is failing on purpose, or writing nothing; crashing and hanging are not."""
    cases = _copies(tmp_path / "cases", ["refuses", "silent", "leaves", "crash", "right"], "reject/bias-nan")
    script = tmp_path / "port.py"
    script.write_text(
        "import os, sys, pathlib\n"
        "what = pathlib.Path(sys.argv[1]).name\n"
        "os.kill(os.getpid(), 11) if what == 'leaves' else os.abort() if what == 'crash' else None\n"
        "pathlib.Path(sys.argv[2]).write_bytes(b'something') if what == 'right' else None\n"
        "sys.exit(what == 'refuses')\n"
    )
    found, _ = _validate(_command(script), cases)
    assert [found[n].status for n in ("refuses", "silent", "crash")] == [HELD] * 3
    assert found["leaves"].status == FAILED
    assert "SIGSEGV" in found["leaves"].why
    assert found["right"].status == NOT_HELD
    assert "an output was written" in found["right"].why


def test_the_sample_port_holds_on_compact_cases_and_its_broken_form_does_not(tmp_path):
    for name in ("gate/v3", "gate/v3-vjp", "norm/epsilon"):
        shutil.copytree(GOLDEN / name, tmp_path / "cases" / name)
    found, whole = _validate(_command(SAMPLE), tmp_path / "cases")
    assert whole.holds
    assert [found[n].status for n in ("v3", "v3-vjp", "epsilon")] == [HELD, NOT_FOR_ME, HELD]
    assert whole.by_claim()["fp32"] == (2, 2)
    script = tmp_path / "broken.sh"
    script.write_text(f'exec {sys.executable} {SAMPLE} --broken "$1" "$2"\n')
    found, whole = _validate(Command(("sh", str(script))), tmp_path / "cases")
    assert not whole.holds
    assert found["v3"].why.startswith("model.layers.3.mlp.gate.topk_weight: ")


def test_the_committed_folder_is_not_written_to(tmp_path):
    before = sorted(p.name for p in (GOLDEN / "norm/epsilon").iterdir())
    _validate(_command(SAMPLE), _copies(tmp_path / "cases", ["epsilon"]))
    assert sorted(p.name for p in (tmp_path / "cases/norm/epsilon").iterdir()) == before


def test_keep_leaves_what_is_needed_to_run_a_case_by_hand(tmp_path):
    cases = _copies(tmp_path / "cases", ["wide"], "gate/v3")
    keep = tmp_path / "kept"
    (keep / "gate/wide" / OUTPUT).mkdir(parents=True)  # of an earlier run, and in the way
    _validate(_command(SAMPLE), cases, keep=keep)
    names = {p.name for p in (keep / "gate/wide").iterdir()}
    assert names == {"case.json", "inputs.safetensors", OUTPUT, "stdout.txt", "stderr.txt"}
    out = tmp_path / "again.safetensors"
    subprocess.run([sys.executable, SAMPLE, keep / "gate/wide", out], check=True)
    assert out.read_bytes() == (keep / "gate/wide" / OUTPUT).read_bytes()


def test_a_port_that_gives_only_some_outputs_says_so(tmp_path):
    cases = _copies(tmp_path / "cases", ["v3"], "gate/v3")
    port = tmp_path / "ids.py"
    port.write_text(
        f"import sys; sys.path.insert(0, {str(GOLDEN)!r}); import sample_port as s, json\n"
        "def run(case):\n"
        "    whole = s.gate(json.loads((case.folder / 'case.json').read_text()),\n"
        "                   s.read(case.folder / 'inputs.safetensors'), False)\n"
        "    return {n: x for n, x in whole.items() if n.endswith('topk_idx')}\n"
    )
    found, whole = _validate(Module(str(port)), cases)
    assert found["v3"].why == "model.layers.3.mlp.gate.topk_weight: missing, it is required"
    declared = PortFile(outputs=("*.topk_idx",))
    found, whole = _validate(Module(str(port)), cases, declared)
    assert whole.holds
    assert (whole.judged, whole.not_given()) == (1, (3, 0))
    assert "3 tensors not given, of which 0 required: " in summary.text(whole)


def test_what_a_port_declares_decides_what_is_tried(tmp_path):
    for name in ("gate/v3", "norm/epsilon", "norm/epsilon-vjp"):
        shutil.copytree(GOLDEN / name, tmp_path / "cases" / name)
    (tmp_path / "port.toml").write_text('components = ["norm"]\nkinds = ["forward"]\nprecision = "bf16"\n')
    declared = portfile.find([tmp_path / "nowhere", tmp_path])
    found, whole = _validate(_command(SAMPLE), tmp_path / "cases", declared)
    assert (found["v3"].status, found["epsilon-vjp"].status) == (LEFT_OUT, LEFT_OUT)
    assert found["epsilon"].claim == "bf16"
    found, _ = _validate(_command(SAMPLE), tmp_path / "cases", declared, claim="fp32")
    assert found["epsilon"].claim == "fp32"
    assert whole.holds


def test_a_claim_that_a_case_refuses_is_not_offered_and_the_port_is_not_asked(tmp_path):
    cases = _copies(tmp_path / "cases", ["v3"], "gate/bias-12")
    case = json.loads((cases / "gate/v3/case.json").read_text())
    refused = next(iter(case["refused"].items()))
    found, whole = _validate(_command(SAMPLE), cases, claim=refused[0])
    assert found["v3"].status == NOT_OFFERED
    assert refused[1] in found["v3"].why
    assert not whole.tried


def test_an_interruption_ends_the_port_and_leaves_nothing(tmp_path):
    cases = _copies(tmp_path / "cases", ["one", "two"])
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    command = [sys.executable, "-m", "refimpl", "validate", "--cases", cases, "--jobs", "2", "--json"]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    script = tmp_path / "sleeps.sh"
    script.write_text(
        f"sleep 600 & echo $! > {tmp_path}/child.$$; mv {tmp_path}/child.$$ {tmp_path}/child; wait\n"
    )
    command += [tmp_path / "out.json", "--port", f"sh {script}"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT) as child:
        deadline = time.monotonic() + 30
        while not (tmp_path / "child").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        child.send_signal(signal.SIGTERM)
        _, err = child.communicate(timeout=30)
    assert (child.returncode, err) == (130, "interrupted\n")
    assert _gone(int((tmp_path / "child").read_text()))
    assert not list(temporary.iterdir())
    assert not (tmp_path / "out.json").exists()


def test_a_port_that_only_refuses_has_shown_nothing(tmp_path):
    for name in ("reject/bias-nan", "norm/epsilon"):
        shutil.copytree(GOLDEN / name, tmp_path / "cases" / name)
    script = tmp_path / "port.sh"
    script.write_text('case "$1" in */reject/*) exit 1;; *) exit 77;; esac\n')
    found, whole = _validate(Command(("sh", str(script))), tmp_path / "cases")
    assert found["bias-nan"].status == HELD
    assert not whole.holds
    assert whole.vacuous
    assert "no case with an output was tried" in summary.text(whole)
    shutil.rmtree(tmp_path / "cases/norm")
    assert _validate(Command(("sh", str(script))), tmp_path / "cases")[1].holds


def test_what_does_not_hold_is_diagnosed_when_asked(tmp_path):
    for name in ("norm/epsilon", "norm/hidden"):
        shutil.copytree(GOLDEN / name, tmp_path / "cases" / name)
    script = tmp_path / "broken.sh"
    script.write_text(f'exec {sys.executable} {SAMPLE} --broken "$1" "$2"\n')
    _, whole = _validate(Command(("sh", str(script))), tmp_path / "cases", diagnose=True)
    assert not whole.holds
    assert "the mean" in summary.text(whole)
    assert json.loads(details.text(whole))["diagnoses"]
