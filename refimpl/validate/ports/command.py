"""An adapter as a command and as a module.  SPEC VERDICT-10, VERDICT-15.

    python -m refimpl.validate.ports.NAME CASE_DIR OUTPUT.safetensors [options]

    REFIMPL_PORT_OPTIONS="options" refimpl validate --port refimpl.validate.ports.NAME

Exit status 0 done, 77 not for this port (the reason is on standard error), 2 it could not be tried.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from refimpl.checkpoint import safetensors
from refimpl.errors import Error, Invalid
from refimpl.numerics.arithmetic import Array
from refimpl.validate.given import NotForMe, PortCase

DONE, UNTRIED, NOT_FOR_ME = 0, 2, 77
OPTIONS: Final = "REFIMPL_PORT_OPTIONS"  # of a port that runs as a module

Run = Callable[[PortCase, argparse.Namespace], dict[str, Array]]


@dataclass(frozen=True)
class Adapter:
    """What an adapter runs, and the options that it has."""

    description: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Run

    def parser(self) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(
            description=self.description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self.add_options(parser)
        return parser

    def module(self, case: PortCase) -> dict[str, Array]:
        """The case as a module runs it, with the options of the environment.  Raises NotForMe, Error."""
        text = os.environ.get(OPTIONS, "")
        try:
            given = self.parser().parse_args(shlex.split(text))
        except SystemExit:
            raise Invalid(f"{OPTIONS} is {text!r}, but it must hold options of this port.") from None
        return self.run(case, given)

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Run one case from the command line, and return the exit status."""
        parser = self.parser()
        parser.add_argument("case", type=Path, metavar="CASE_DIR")
        parser.add_argument("output", type=Path, metavar="OUTPUT.safetensors")
        given = parser.parse_args(arguments)
        try:
            safetensors.write(given.output, self.run(PortCase.open(given.case), given))
        except NotForMe as reason:
            print(f"not for this port: {reason}", file=sys.stderr)
            return NOT_FOR_ME
        except Error as error:
            print(error, file=sys.stderr)
            return UNTRIED
        return DONE
