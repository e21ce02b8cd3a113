"""`refimpl mutants`: which known mistake is caught by which case."""

from __future__ import annotations

import argparse
from pathlib import Path

from refimpl.cases.suites import SUITES
from refimpl.checkpoint.atomic import write_bytes
from refimpl.cli.common import COMMITTED, FAILS, HOLDS, Commands, folder, jobs, progress
from refimpl.errors import Invalid
from refimpl.validate import matrix, matrix_report


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """The command `mutants`."""
    parser = commands.add_parser("mutants", help="which known mistake is caught by which case")
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; default: all")
    parser.add_argument("--id", action="append", default=[], metavar="ID", help="only this one; repeatable")
    parser.add_argument("--cases", type=Path, metavar="DIR", help=f"default: {COMMITTED}")
    parser.add_argument("--jobs", type=jobs, default=1, metavar="N", help="processes; default: 1")
    parser.add_argument("--json", metavar="FILE", help="everything, as JSON; - is standard output")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a matrix.json to be written, or renewed")
    parser.set_defaults(run=_mutants)


def _mutants(given: argparse.Namespace) -> int:
    if given.out and given.suites:
        raise Invalid(f"--out is {given.out} and suites are named, but a matrix.json must have all of them.")
    paths = matrix.chosen(folder(given.cases), given.suites)
    with progress(len(paths), "running mutants") as done:
        factors = matrix.matrix(paths, matrix.known(given.id), given.jobs, done)
    found, partial = matrix_report.outcomes(factors), bool(given.suites)
    if given.out:
        write_bytes(given.out, matrix_report.merged(given.out, factors).encode())
    told = matrix_report.to_json(found, factors, partial)
    if given.json and given.json != "-":
        write_bytes(given.json, told.encode())
    print(told.rstrip() if given.json == "-" else matrix_report.text(found, partial))
    return FAILS if matrix_report.faults(found, partial) else HOLDS
