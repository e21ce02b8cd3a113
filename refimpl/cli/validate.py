"""`refimpl validate`: run and judge a whole implementation."""

from __future__ import annotations

import argparse
from pathlib import Path

from refimpl.cases import format
from refimpl.cases.claims import claim
from refimpl.checkpoint.atomic import write_bytes
from refimpl.cli.common import COMMITTED, FAILS, HOLDS, UNTRIED, Commands, folder, jobs, progress, seconds
from refimpl.errors import Invalid
from refimpl.validate import details, junit, page, portfile, summary
from refimpl.validate.port import parse
from refimpl.validate.validation import TIMEOUT, Wanted, terminating, usual_jobs, validate


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """The command `validate`."""
    parser = commands.add_parser("validate", help="run and judge a whole implementation")
    parser.description = "Run a port on every case, in processes of its own, and judge what it wrote."
    parser.add_argument(
        "--port",
        required=True,
        metavar="COMMAND|MODULE",
        help="run as COMMAND CASE_DIR OUTPUT.safetensors (exit 77: not for me), or a Python module or file "
        "with run(case)",
    )
    parser.add_argument(
        "--cases", type=Path, metavar="DIR", help=f"default: {COMMITTED}; what is not whole is completed"
    )
    parser.add_argument("--suite", action="append", default=[], metavar="S", help="only this one; repeatable")
    parser.add_argument(
        "--as",
        dest="claim",
        metavar="PRECISION",
        help="fp32, tf32, fp16, bf16 or u=2^-11, for cases of numbers, or fp8, for those of recipes; "
        "default: what port.toml says, else the strictest that each case offers",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="default: port.toml beside the port")
    parser.add_argument("--jobs", type=jobs, metavar="N", help="cases at once; default: cores, at most 4")
    parser.add_argument("--timeout", type=seconds, default=TIMEOUT, metavar="S", help="seconds for a case")
    parser.add_argument(
        "--diagnose", action="store_true", help="name the known mistakes that make what does not hold"
    )
    parser.add_argument("--json", metavar="FILE", help="everything, as JSON; - is standard output")
    parser.add_argument("--junit", metavar="FILE", help="for CI systems, as JUnit XML; - is standard output")
    parser.add_argument("--html", metavar="FILE", help="a page; - is standard output")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where outputs and what was printed stay")
    parser.set_defaults(run=_validate)


def _validate(given: argparse.Namespace) -> int:
    port = parse(given.port)
    if given.claim is not None:
        claim(given.claim)
    declared = portfile.read(given.config) if given.config else portfile.find(port.places)
    cases = folder(given.cases)
    wanted = Wanted(
        cases,
        tuple(given.suite),
        given.claim,
        given.jobs or usual_jobs(),
        given.timeout,
        given.keep,
        given.diagnose,
    )
    forms = {given.json: details.text, given.junit: junit.text, given.html: page.text}
    if (given.json, given.junit, given.html).count("-") > 1:
        raise Invalid("only one of --json, --junit and --html can be standard output.")
    for name in forms:
        if name and name != "-" and not Path(name).parent.is_dir():
            raise Invalid(f"{name} is to be written, but there is no folder {Path(name).parent}.")
    with terminating(), progress(len(format.cases(cases, given.suite)), "validating") as done:
        found = validate(port, wanted, declared, done)
    for name, form in forms.items():
        if name and name != "-":
            write_bytes(name, form(found).encode())
    if "-" in forms:
        print(forms["-"](found), end="")
    else:
        print(summary.text(found))
    return UNTRIED if found.vacuous and not found.failing else HOLDS if found.holds else FAILS
