"""`refimpl check`: judge one output of an implementation."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from refimpl.cases.claims import BITS
from refimpl.checkpoint.atomic import write_bytes
from refimpl.cli.common import FAILS, HOLDS, Commands
from refimpl.validate import diagnosing, diagnosis_report, report
from refimpl.validate.verdict import check


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """The command `check`."""
    parser = commands.add_parser("check", help="judge one output of an implementation")
    parser.add_argument("case", metavar="CASE", type=Path, help="folder of a golden case")
    parser.add_argument(
        "output", metavar="OUTPUT", type=Path, help="safetensors file that the implementation wrote"
    )
    parser.add_argument(
        "--as",
        dest="claim",
        metavar="PRECISION",
        help="fp32, tf32, fp16, bf16 or u=2^-11; default: the strictest offered; fp8 for cases of a recipe",
    )
    parser.add_argument("--json", metavar="FILE", help="write the verdict as JSON; - is standard output")
    parser.add_argument(
        "--diagnose", action="store_true", help="name the known mistake that makes these numbers, if one does"
    )
    parser.set_defaults(run=_check)


def _check(given: argparse.Namespace) -> int:
    verdict = check(given.case, given.output, given.claim)
    stages, found = None, None
    extra: dict[str, Any] = {}
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
    elif given.diagnose and verdict.claim == BITS and not verdict.holds:
        print("\nNo diagnosis: known mistakes are compared where numbers are, and this case compares bits.")
    return HOLDS if verdict.holds else FAILS
