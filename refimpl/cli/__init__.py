"""The command line: one file for each command; they parse and print.  SPEC VERDICT-10.

Exit status 0 it holds, 1 it does not, 2 it could not be tried, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from refimpl import __version__
from refimpl.cli import account, check, golden, mutants, pipeline, recipe, train, validate
from refimpl.cli.common import HOLDS, INTERRUPTED, UNTRIED
from refimpl.errors import Error


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
    for command in (golden, check, validate, mutants, train, recipe, account, pipeline):
        command.add(commands)
    return parser
