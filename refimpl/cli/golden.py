"""`refimpl golden`: generate, verify and list golden cases."""

from __future__ import annotations

import argparse
from pathlib import Path

from tabulate import tabulate

from refimpl.cases import format
from refimpl.cases.generate import definitions, generate
from refimpl.cases.suites import SUITES
from refimpl.cases.verify import verify
from refimpl.cli.common import COMMITTED, FAILS, GENERATED, HOLDS, Commands, folder, jobs, progress


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """The command `golden`."""
    parser = commands.add_parser("golden", help="generate, verify and list golden cases")
    _adding(parser.add_subparsers(required=True, metavar="COMMAND"))


def _adding(commands: Commands[argparse.ArgumentParser]) -> None:
    making = commands.add_parser("generate", help="compute and write the cases of suites")
    making.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; default: all")
    making.add_argument(
        "--out", type=Path, default=Path(GENERATED), metavar="DIR", help=f"default: {GENERATED}"
    )
    making.add_argument("--jobs", type=jobs, default=1, metavar="N", help="processes; default: 1")
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
    verifying.add_argument("--jobs", type=jobs, default=1, metavar="N", help="processes; default: 1")
    verifying.set_defaults(run=_verify)
    listing = commands.add_parser("list", help="show the cases of a folder")
    listing.add_argument("folder", nargs="?", type=Path, metavar="DIR", help=f"default: {COMMITTED}")
    listing.set_defaults(run=_list)


def _generate(given: argparse.Namespace) -> int:
    total = len(definitions(given.suites))
    with progress(total, "generating") as done:
        count = generate(given.suites, given.out, whole=not given.compact, jobs=given.jobs, done=done)
    print(f"{count} cases written to {given.out}")
    return HOLDS


def _verify(given: argparse.Namespace) -> int:
    cases = folder(given.folder)
    with progress(len(format.cases(cases)), "verifying") as done:
        count, differences = verify(cases, jobs=given.jobs, done=done)
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
    cases = folder(given.folder)
    rows = []
    for path in format.cases(cases):
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
