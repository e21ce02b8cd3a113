"""A port: a command, or a Python module, that computes cases.  SPEC VERDICT-15.

    COMMAND CASE_DIR OUTPUT.safetensors      exit status 0 done, 77 not for me, anything else failed
    run(case) -> {name: array} or None       of a module; see refimpl.validate.given

Either runs outside of this process, so that whatever it does is one line of the report.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from refimpl.errors import Invalid
from refimpl.validate import running
from refimpl.validate.running import CRASHED, KILLED, Child, Limits, Ran

IMPORT = 120.0  # seconds that the import of a module may take at least
_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_START = "import sys; sys.path.insert(0, sys.argv[1]); from refimpl.validate.given import serve; serve(sys.argv[2], int(sys.argv[3]))"  # noqa: E501  one argument of a command
_ROOT = str(Path(__file__).resolve().parent.parent.parent)


class Runner(Protocol):
    """What computes one case after another."""

    def run(self, folder: Path, output: Path, limits: Limits) -> Ran: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Command:
    """A port that is a command; every case is a process."""

    words: tuple[str, ...]

    @property
    def name(self) -> str:
        return shlex.join(self.words)

    @property
    def places(self) -> tuple[Path, ...]:
        """The folders in which a port.toml is looked for."""
        return tuple(Path(word).parent for word in self.words if Path(word).is_file())

    def runner(self, stop: threading.Event, limits: Limits) -> Runner:
        return _CommandRunner(self.words, stop)


@dataclass(frozen=True)
class Module:
    """A port that is a Python module, by name or by path; a worker process runs case after case."""

    target: str

    @property
    def name(self) -> str:
        return self.target

    @property
    def places(self) -> tuple[Path, ...]:
        return (Path(self.target).parent,) if self.target.endswith(".py") else (Path(),)

    def runner(self, stop: threading.Event, limits: Limits) -> Runner:
        """Raises Invalid if the module cannot be imported, or is no port."""
        return _ModuleRunner(self.target, stop, limits)


Port = Command | Module


def parse(text: str) -> Port:
    """What --port names: a Python file with a function `run`, a command, or a module that can be imported.

    Raises Invalid.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise Invalid(f"the port {text[:80]!r} cannot be split into words ({error}).") from None
    if not words:
        raise Invalid("the port is empty, but it must be a command or a Python module.")
    if len(words) == 1 and words[0].endswith(".py") and Path(words[0]).is_file():
        if _defines_run(Path(words[0])):
            return Module(words[0])
        if shutil.which(words[0]) is None:
            raise Invalid(
                f"{words[0]} has no function run(case), but a module must have it; as a command it is "
                f"--port 'python {words[0]}'."
            )
    if shutil.which(words[0]) is not None:
        return Command(tuple(words))
    if len(words) == 1 and _NAME.fullmatch(words[0]):
        return Module(words[0])
    raise Invalid(
        f"the port {words[0][:80]!r} is no program that can be run, but it must be one, or a module."
    )


def _defines_run(path: Path) -> bool:
    try:
        body = ast.parse(path.read_bytes()).body
    except (SyntaxError, ValueError, OSError):
        return True  # the import says what is wrong
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name == "run":
            return True
        if isinstance(node, ast.ImportFrom) and any((a.asname or a.name) == "run" for a in node.names):
            return True
        if isinstance(node, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == "run" for t in node.targets
        ):
            return True
    return False


class _CommandRunner:
    def __init__(self, words: tuple[str, ...], stop: threading.Event) -> None:
        self._words, self._stop = words, stop

    def run(self, folder: Path, output: Path, limits: Limits) -> Ran:
        return running.run_command([*self._words, str(folder), str(output)], output, limits, self._stop)

    def close(self) -> None:
        """Nothing runs between cases."""


class _ModuleRunner:
    """A worker, and another one after it had to be ended."""

    def __init__(self, target: str, stop: threading.Event, limits: Limits) -> None:
        self._target, self._stop = target, stop
        self._child: Child | None = None
        fault = self._start(limits)
        if fault is not None:
            self.close()
            raise Invalid(f"module {target} {fault}.")

    def run(self, folder: Path, output: Path, limits: Limits) -> Ran:
        start = time.monotonic()
        fault = self._start(limits) if self._child is None else None
        if fault is not None:
            return Ran(CRASHED, f"the module {fault}", time.monotonic() - start)
        assert self._child is not None
        start = time.monotonic()
        self._child.send(json.dumps([str(folder), str(output)]).encode() + b"\n")
        found = self._child.wait(limits, lambda: running.size(output))
        seconds = time.monotonic() - start
        if isinstance(found, bytes):
            answer: dict[str, Any] = json.loads(found)
            return Ran(answer["outcome"], answer["why"], seconds, *self._child.printed())
        child, self._child = self._child, None
        status = child.kill()
        stdout, stderr = child.printed()
        child.close()
        if found is not None:
            return Ran(KILLED, found, seconds, stdout, stderr)
        ended = running.ended(status, seconds, stdout, stderr)
        why = ended.why if status < 0 else f"ended its process with status {status}"
        return Ran(CRASHED, why, seconds, stdout, stderr, ended.signal)

    def close(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None

    def _start(self, limits: Limits) -> str | None:
        """Why it did not start."""
        child = Child([sys.executable, "-c", _START, _ROOT, self._target], answers=True, stop=self._stop)
        try:
            found = child.wait(replace(limits, seconds=max(limits.seconds, IMPORT)), lambda: 0)
        except BaseException:
            child.close()
            raise
        if isinstance(found, bytes):
            why = str(json.loads(found)["why"])
            if not why:
                child.printed()
                self._child = child
                return None
        else:
            why = found or "ended its process while it was imported"
        child.close()
        return why
