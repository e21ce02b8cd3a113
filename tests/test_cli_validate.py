"""`refimpl validate`: statuses, sentences, and where reports go."""

import json
import os
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from refimpl import cli

GOLDEN = Path(__file__).parent.parent / "golden"
PORT = f"{sys.executable} {GOLDEN / 'sample_port.py'}"

pytestmark = pytest.mark.skipif(os.name != "posix", reason="ports run in process groups")


@pytest.fixture
def cases(tmp_path):
    shutil.copytree(GOLDEN / "norm/epsilon", tmp_path / "golden/norm/epsilon")
    return tmp_path / "golden"


def _run(capsys, *arguments):
    try:
        status = cli.main(["validate", *(str(a) for a in arguments)])
    except SystemExit as leave:  # argparse
        status = leave.code
    return status, capsys.readouterr()


def test_a_right_port_holds_and_the_folder_golden_is_the_default(cases, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, shown = _run(capsys, "--port", PORT)
    assert (status, shown.err) == (0, "")
    assert shown.out.endswith("1 of 1 cases hold. It holds.\n")


def test_a_broken_port_does_not_hold_and_every_report_says_so(cases, tmp_path, capsys):
    forms = {name: tmp_path / f"report.{name}" for name in ("json", "junit", "html")}
    options = [part for name, path in forms.items() for part in (f"--{name}", path)]
    status, shown = _run(capsys, "--port", f"{PORT} --broken", "--cases", cases, *options)
    assert status == 1
    assert "OFF" in shown.out
    assert json.loads(forms["json"].read_text())["holds"] is False
    assert ElementTree.parse(forms["junit"]).getroot().get("failures") == "1"
    assert "does not hold" in forms["html"].read_text()


def test_a_report_on_standard_output_is_all_there_is(cases, capsys):
    status, shown = _run(capsys, "--port", PORT, "--cases", cases, "--json", "-")
    assert status == 0
    assert json.loads(shown.out)["holds"] is True


def test_when_every_case_is_not_for_the_port_nothing_was_tried(cases, capsys):
    status, shown = _run(capsys, "--port", "sh -c 'exit 77'", "--cases", cases)
    assert status == 2
    assert "Nothing was tried" in shown.out


@pytest.mark.parametrize(
    "arguments",
    [
        ("--port", "no-such-command"),
        ("--port", "no_such_module"),
        ("--port", PORT, "--suite", "gate"),
        ("--port", PORT, "--as", "fp128"),
        ("--port", PORT, "--config", "nowhere.toml"),
        ("--port", PORT, "--json", "nowhere/at/all.json"),
        ("--port", PORT, "--json", "-", "--html", "-"),
        ("--port", PORT, "--cases", "nowhere"),
    ],
)
def test_what_cannot_be_tried_is_one_sentence_and_status_2(cases, arguments, capsys):
    status, shown = _run(capsys, "--cases", cases, *arguments)
    assert status == 2
    assert shown.out == ""
    assert shown.err.startswith("refimpl: ")
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize("options", [(), ("--port", PORT, "--timeout", "0"), ("--port", PORT, "--jobs", "x")])
def test_bad_arguments_are_status_2(options, capsys):
    status, shown = _run(capsys, *options)
    assert status == 2
    assert "usage: refimpl validate" in shown.err
