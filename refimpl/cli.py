"""The command line: parses and prints.  SPEC VERDICT-10.

Exit status 0 it holds, 1 it does not, 2 it could not be tried, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tabulate import tabulate
from tqdm import tqdm

from refimpl import __version__, cli_train
from refimpl.cases import format
from refimpl.cases.claims import claim
from refimpl.cases.generate import definitions, generate
from refimpl.cases.suites import SUITES
from refimpl.cases.verify import verify
from refimpl.checkpoint.atomic import write_bytes
from refimpl.errors import Error, Invalid
from refimpl.validate import (
    details,
    diagnosing,
    diagnosis_report,
    junit,
    matrix,
    matrix_report,
    page,
    portfile,
    report,
    summary,
)
from refimpl.validate.port import parse
from refimpl.validate.validation import TIMEOUT, Wanted, terminating, usual_jobs, validate
from refimpl.validate.verdict import check

HOLDS, FAILS, UNTRIED, INTERRUPTED = 0, 1, 2, 130
COMMITTED = "golden"  # where a clone has its vectors
GENERATED = "build/golden"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    try:
        given = _parser().parse_args(arguments)
        status: int = given.run(given)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of our output has gone, which is no error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return HOLDS
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Error as error:
        print(f"refimpl: {error}", file=sys.stderr)
        return UNTRIED
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        print(f"refimpl: {what}{error.strerror or error}", file=sys.stderr)
        return UNTRIED
    except MemoryError:
        print("refimpl: there is not enough memory for this", file=sys.stderr)
        return UNTRIED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="refimpl",
        description="The executable specification of DeepSeek-V3: golden vectors and verdicts.",
    )
    parser.add_argument("--version", action="version", version=f"refimpl {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    golden = commands.add_parser("golden", help="generate, verify and list golden cases")
    _golden(golden.add_subparsers(required=True, metavar="COMMAND"))
    cli_train.add(commands)
    checking = commands.add_parser("check", help="judge one output of an implementation")
    checking.add_argument("case", metavar="CASE", type=Path, help="folder of a golden case")
    checking.add_argument(
        "output", metavar="OUTPUT", type=Path, help="safetensors file that the implementation wrote"
    )
    checking.add_argument(
        "--as",
        dest="claim",
        metavar="PRECISION",
        help="fp32, tf32, fp16, bf16 or u=2^-11; default: the strictest offered; not for cases of bits",
    )
    checking.add_argument("--json", metavar="FILE", help="write the verdict as JSON; - is standard output")
    checking.add_argument(
        "--diagnose", action="store_true", help="name the known mistake that makes these numbers, if one does"
    )
    checking.set_defaults(run=_check)
    _validating(commands.add_parser("validate", help="run and judge a whole implementation"))
    _mutating(commands.add_parser("mutants", help="which known mistake is caught by which case"))
    return parser


def _validating(parser: argparse.ArgumentParser) -> None:
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
        help="fp32, tf32, fp16, bf16 or u=2^-11, for all cases of numbers; default: what port.toml says, "
        "else the strictest that each case offers",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="default: port.toml beside the port")
    parser.add_argument("--jobs", type=_jobs, metavar="N", help="cases at once; default: cores, at most 4")
    parser.add_argument("--timeout", type=_seconds, default=TIMEOUT, metavar="S", help="seconds for a case")
    parser.add_argument(
        "--diagnose", action="store_true", help="name the known mistakes that make what does not hold"
    )
    parser.add_argument("--json", metavar="FILE", help="everything, as JSON; - is standard output")
    parser.add_argument("--junit", metavar="FILE", help="for CI systems, as JUnit XML; - is standard output")
    parser.add_argument("--html", metavar="FILE", help="a page; - is standard output")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where outputs and what was printed stay")
    parser.set_defaults(run=_validate)


def _mutating(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; default: all")
    parser.add_argument("--id", action="append", default=[], metavar="ID", help="only this one; repeatable")
    parser.add_argument("--cases", type=Path, metavar="DIR", help=f"default: {COMMITTED}")
    parser.add_argument("--jobs", type=_jobs, default=1, metavar="N", help="processes; default: 1")
    parser.add_argument("--json", metavar="FILE", help="everything, as JSON; - is standard output")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a matrix.json to be written, or renewed")
    parser.set_defaults(run=_mutants)


def _golden(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    making = commands.add_parser("generate", help="compute and write the cases of suites")
    making.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; default: all")
    making.add_argument(
        "--out", type=Path, default=Path(GENERATED), metavar="DIR", help=f"default: {GENERATED}"
    )
    making.add_argument("--jobs", type=_jobs, default=1, metavar="N", help="processes; default: 1")
    making.add_argument(
        "--compact",
        action="store_true",
        help="as they are committed: samples of large outputs, no generated inputs",
    )
    making.set_defaults(run=_generate)
    verifying = commands.add_parser(
        "verify", help="compute all cases of a folder anew and compare bit for bit"
    )
    verifying.add_argument("folder", nargs="?", type=Path, metavar="DIR", help=f"default: {COMMITTED}")
    verifying.add_argument("--jobs", type=_jobs, default=1, metavar="N", help="processes; default: 1")
    verifying.set_defaults(run=_verify)
    listing = commands.add_parser("list", help="show the cases of a folder")
    listing.add_argument("folder", nargs="?", type=Path, metavar="DIR", help=f"default: {COMMITTED}")
    listing.set_defaults(run=_list)


def _generate(given: argparse.Namespace) -> int:
    total = len(definitions(given.suites))
    with _progress(total, "generating") as done:
        count = generate(given.suites, given.out, whole=not given.compact, jobs=given.jobs, done=done)
    print(f"{count} cases written to {given.out}")
    return HOLDS


def _verify(given: argparse.Namespace) -> int:
    folder = _folder(given.folder)
    with _progress(len(format.cases(folder)), "verifying") as done:
        count, differences = verify(folder, jobs=given.jobs, done=done)
    for difference in differences:
        print(f"{difference.case}: {difference.what}")
    broken = len({difference.case for difference in differences})
    print(
        f"{count} cases computed anew, {broken} different"
        if broken
        else f"{count} cases computed anew, all the same"
    )
    return FAILS if differences else HOLDS


def _list(given: argparse.Namespace) -> int:
    folder = _folder(given.folder)
    rows = []
    for path in format.cases(folder):
        case = format.read(path)
        claims = ", ".join(case.claims) or "must be refused"
        rows.append((case.id, case.kind, claims, len(case.outputs), case.title))
    print(
        tabulate(
            rows, ("case", "kind", "claims", "outputs", "title"), maxcolwidths=[None, None, None, None, 70]
        )
    )
    print(f"{len(rows)} cases")
    return HOLDS


def _check(given: argparse.Namespace) -> int:
    verdict = check(given.case, given.output, given.claim)
    stages, found, extra = None, None, {}
    if not verdict.holds:
        stages = diagnosing.stages_of(given.case, given.output, verdict)
        found = diagnosing.of_check(given.case, given.output, verdict) if given.diagnose else None
    if stages is not None:
        extra["stages"] = {"off": list(stages.off), "right": list(stages.right)}
    if found is not None:
        extra["diagnosis"] = diagnosis_report.to_dict(found)
    if given.json == "-":
        print(report.to_json(verdict, extra), end="")
        return HOLDS if verdict.holds else FAILS
    if given.json:
        write_bytes(given.json, report.to_json(verdict, extra).encode())
    print(report.text(verdict))
    if stages is not None:
        print(stages.text)
    if found is not None:
        print(f"\n{diagnosis_report.text(found)}")
    return HOLDS if verdict.holds else FAILS


def _validate(given: argparse.Namespace) -> int:
    port = parse(given.port)
    if given.claim is not None:
        claim(given.claim)
    declared = portfile.read(given.config) if given.config else portfile.find(port.places)
    folder = _folder(given.cases)
    jobs = given.jobs or usual_jobs()
    wanted = Wanted(folder, tuple(given.suite), given.claim, jobs, given.timeout, given.keep, given.diagnose)
    forms = {given.json: details.text, given.junit: junit.text, given.html: page.text}
    if (given.json, given.junit, given.html).count("-") > 1:
        raise Invalid("only one of --json, --junit and --html can be standard output.")
    for name in forms:
        if name and name != "-" and not Path(name).parent.is_dir():
            raise Invalid(f"{name} is to be written, but there is no folder {Path(name).parent}.")
    with terminating(), _progress(len(format.cases(folder, given.suite)), "validating") as done:
        found = validate(port, wanted, declared, done)
    for name, form in forms.items():
        if name and name != "-":
            write_bytes(name, form(found).encode())
    if "-" in forms:
        print(forms["-"](found), end="")
    else:
        print(summary.text(found))
    return UNTRIED if found.vacuous and not found.failing else HOLDS if found.holds else FAILS


def _mutants(given: argparse.Namespace) -> int:
    if given.out and given.suites:
        raise Invalid(f"--out is {given.out} and suites are named, but a matrix.json must have all of them.")
    paths = matrix.chosen(_folder(given.cases), given.suites)
    with _progress(len(paths), "running mutants") as done:
        factors = matrix.matrix(paths, matrix.known(given.id), given.jobs, done)
    found, partial = matrix_report.outcomes(factors), bool(given.suites)
    if given.out:
        write_bytes(given.out, matrix_report.merged(given.out, factors).encode())
    told = matrix_report.to_json(found, factors, partial)
    if given.json and given.json != "-":
        write_bytes(given.json, told.encode())
    print(told.rstrip() if given.json == "-" else matrix_report.text(found, partial))
    return FAILS if matrix_report.faults(found, partial) else HOLDS


def _folder(given: Path | None) -> Path:
    if given is not None:
        return given
    if Path(COMMITTED).is_dir():
        return Path(COMMITTED)
    raise Invalid(f"there is no folder {COMMITTED} here; the folder of cases has to be named.")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def _jobs(text: str) -> int:
    count = int(text) if text.isdecimal() else 0
    if not 1 <= count <= 1024:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of processes from 1 on")
    return count


@contextmanager
def _progress(total: int, what: str) -> Iterator[Callable[[str], None]]:
    """A bar on standard error, after two seconds and only where it is a terminal."""
    with tqdm(total=total, desc=what, delay=2, disable=None, file=sys.stderr, leave=False) as bar:
        start = time.monotonic()

        def done(id: str) -> None:
            if time.monotonic() - start > 2:
                bar.set_postfix_str(id, refresh=False)
            bar.update()

        yield done


if __name__ == "__main__":
    sys.exit(main())
