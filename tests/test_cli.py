"""The command line: statuses, sentences, and nothing half-written."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import refimpl
from refimpl import cli
from refimpl.cases.generate import generate
from refimpl.checkpoint import safetensors

NAME = "model.layers.3.input_layernorm"


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    root = tmp_path_factory.mktemp("golden")
    generate(["norm"], root, whole=True, jobs=1)
    return root


@pytest.fixture
def output(golden, tmp_path):
    exact = safetensors.open_file(golden / "norm/hidden/expected.safetensors")[NAME]
    safetensors.write(tmp_path / "out.safetensors", {NAME: exact})
    return tmp_path / "out.safetensors"


def _run(capsys, *arguments):
    try:
        status = cli.main([str(a) for a in arguments])
    except SystemExit as leave:  # argparse
        status = leave.code
    return status, capsys.readouterr()


def test_check_says_that_it_holds(golden, output, capsys):
    status, shown = _run(capsys, "check", golden / "norm/hidden", output)
    assert status == 0
    assert "It holds." in shown.out


def test_check_says_that_it_does_not(golden, output, capsys):
    safetensors.write(output, {NAME: np.zeros((8, 7168))})
    status, shown = _run(capsys, "check", golden / "norm/hidden", output, "--as", "bf16")
    assert status == 1
    assert f"The first tensor that is off, in the order of computation: {NAME}" in shown.out


def test_a_readable_output_of_the_wrong_shape_does_not_hold(golden, output, capsys):
    safetensors.write(output, {NAME: np.zeros(3)})
    assert _run(capsys, "check", golden / "norm/hidden", output)[0] == 1


def test_json_goes_to_a_file_or_to_standard_output(golden, output, tmp_path, capsys):
    status, shown = _run(capsys, "check", golden / "norm/hidden", output, "--json", "-")
    assert status == 0
    assert json.loads(shown.out)["holds"] is True
    _run(capsys, "check", golden / "norm/hidden", output, "--json", tmp_path / "v.json")
    assert json.loads((tmp_path / "v.json").read_text())["case"] == "norm/hidden"


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "nowhere", "out.safetensors"),
        ("check", "{golden}/norm/hidden", "nowhere.safetensors"),
        ("check", "{golden}/norm/hidden", "{output}", "--as", "fp8"),
        ("check", "{golden}/norm/hidden", "{output}", "--as", "fp128"),
        ("check", "{golden}/norm/hidden", "{output}", "--json", "/nowhere/at/all.json"),
        ("golden", "generate", "nothing"),
        ("golden", "generate", "norm", "--out", "/proc/nowhere"),
        ("golden", "verify", "nowhere"),
        ("golden", "list", "nowhere"),
    ],
)
def test_what_cannot_be_tried_is_one_sentence_and_status_2(golden, output, arguments, capsys):
    arguments = [a.format(golden=golden, output=output) for a in arguments]
    status, shown = _run(capsys, *arguments)
    assert status == 2
    assert shown.out == ""
    assert shown.err.startswith("refimpl: ")
    assert shown.err.count("\n") == 1


ENDLESS = "0" * 20 + "9" * 5000  # Python makes no number of so many digits


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("golden",),
        ("check",),
        ("golden", "generate", "--jobs", "0"),
        ("golden", "generate", "--jobs", ENDLESS),
        ("train", "text", "--steps", ENDLESS),
        ("train", "text", "--seed", ENDLESS),
        ("account", "--tokens", "1", ENDLESS),
        ("nonsense",),
    ],
    ids=lambda arguments: " ".join(arguments)[:40],
)
def test_bad_arguments_are_status_2(arguments, capsys):
    status, shown = _run(capsys, *arguments)
    assert status == 2
    assert "usage: refimpl" in shown.err


def test_the_version_is_shown(capsys):
    status, shown = _run(capsys, "--version")
    assert (status, shown.out.strip()) == (0, f"refimpl {refimpl.__version__}")


def test_generate_verify_and_list_agree(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, shown = _run(capsys, "golden", "generate", "embedding", "--compact", "--out", "golden")
    assert (status, shown.out) == (0, "3 cases written to golden\n")
    status, shown = _run(capsys, "golden", "verify")
    assert (status, shown.out) == (0, "3 cases computed anew, all the same\n")
    status, shown = _run(capsys, "golden", "list")
    assert status == 0
    assert "embedding/exact-vjp" in shown.out
    path = tmp_path / "golden/embedding/vjp/case.json"
    path.write_text(path.read_text().replace("Gradient of", "A gradient of"))
    status, shown = _run(capsys, "golden", "verify")
    assert status == 1
    assert shown.out == "embedding/vjp: case.json differs\n3 cases computed anew, 1 different\n"


def test_without_a_golden_folder_one_has_to_be_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, shown = _run(capsys, "golden", "verify")
    assert status == 2
    assert "there is no folder golden here" in shown.err


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (OSError(28, "No space left on device"), 2, "refimpl: No space left on device\n"),
        (MemoryError(), 2, "refimpl: there is not enough memory for this\n"),
    ],
)
def test_interruptions_and_full_disks_leave_nothing_half_written(
    tmp_path, capsys, monkeypatch, error, status, message
):
    def fail(*_):
        raise error

    monkeypatch.setattr("refimpl.cases.folder.write_bytes", fail)
    found, shown = _run(capsys, "golden", "generate", "embedding", "--out", tmp_path)
    assert (found, shown.err) == (status, message)
    assert not list((tmp_path / "embedding").iterdir())


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_ctrl_c_stops_all_processes_and_leaves_whole_cases(tmp_path):
    import signal
    import time

    command = [
        sys.executable,
        "-m",
        "refimpl",
        "golden",
        "generate",
        "norm",
        "gate",
        "--jobs",
        "2",
        "--compact",
    ]
    with subprocess.Popen(
        [*command, "--out", tmp_path], stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as child:
        deadline = time.monotonic() + 30
        while not list(tmp_path.glob("*/*/case.json")) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(child.pid, signal.SIGINT)
        _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert err == "interrupted\n"
    for folder in tmp_path.glob("*/*"):
        assert (folder / "case.json").is_file()
        assert not folder.name.startswith(".")


def test_the_package_runs_as_a_module():
    shown = subprocess.run(
        [sys.executable, "-m", "refimpl", "--version"], capture_output=True, text=True, check=True
    )
    assert shown.stdout == f"refimpl {refimpl.__version__}\n"


def test_a_closed_pipe_is_no_error(golden):
    command = f"{sys.executable} -m refimpl golden list {golden} | true; exit ${{PIPESTATUS[0]}}"
    shown = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert shown.returncode == 0
    assert "Traceback" not in shown.stderr
