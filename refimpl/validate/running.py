"""Running somebody's program: with a time limit, bounded output, and nothing left behind.  SPEC VERDICT-15.

A child leads a process group of its own, which is killed as a whole when the child ends or has to: what it
forked does not outlive it.  Of what it prints, the last part is kept.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from refimpl.errors import Unreadable, Unsupported

KEPT: Final = 16 << 10  # bytes that are kept of what a child prints, of each stream
TICK: Final = 0.05  # seconds between looks at a child that is silent
SLOW_TICK: Final = 0.25  # between looks at its files and its memory
DONE, NOT_FOR_ME, FAILED, CRASHED, KILLED = "done", "not for me", "failed", "crashed", "killed"
STATUS_NOT_FOR_ME: Final = 77


@dataclass(frozen=True)
class Limits:
    """What a case may take: seconds, bytes of resident memory of the whole group, bytes of its output."""

    seconds: float
    memory: int
    output: int


@dataclass(frozen=True)
class Ran:
    """How one case went: outcome, in words why it is not `done`, and the end of what was printed."""

    outcome: str
    why: str
    seconds: float
    stdout: str = ""
    stderr: str = ""
    signal: int | None = None  # that ended it by itself

    @property
    def last_line(self) -> str:
        """The last line on standard error that says something."""
        lines = [line.strip() for line in self.stderr.splitlines() if line.strip()]
        return lines[-1][:200] if lines else ""


class Child:
    """A running program and the pipes to it.  `replies`: it answers on this extra file descriptor."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        *,
        answers: bool = False,
        stop: threading.Event,
    ) -> None:
        if os.name != "posix":
            raise Unsupported("a port is run in a process group of its own, which needs POSIX.")
        theirs = -1
        if answers:
            self._answers, theirs = os.pipe()
            command = [*command, str(theirs)]
        try:
            self.process: subprocess.Popen[bytes] = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if answers else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                env=None if environment is None else {**os.environ, **environment},
                pass_fds=(theirs,) if answers else (),
            )
        except (OSError, ValueError) as error:
            if answers:
                os.close(self._answers)
            reason = getattr(error, "strerror", None) or str(error)
            raise Unreadable(f"{command[0]} cannot be run ({reason}), but it must be a program.") from None
        finally:
            if answers:
                os.close(theirs)
        self._stop = stop
        self._tails: dict[int, bytearray] = {}
        self._selector = selectors.DefaultSelector()
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._streams = (self.process.stdout.fileno(), self.process.stderr.fileno())
        for stream in (*self._streams, *([self._answers] if answers else [])):
            os.set_blocking(stream, False)
            self._tails[stream] = bytearray()
            self._selector.register(stream, selectors.EVENT_READ)
        with suppress(OSError):  # of two processes that use up the memory, the port's is to be ended
            Path(f"/proc/{self.process.pid}/oom_score_adj").write_text("1000")

    def send(self, line: bytes) -> None:
        assert self.process.stdin is not None
        with suppress(OSError):  # the child has gone, as the next look shows
            self.process.stdin.write(line)
            self.process.stdin.flush()

    def wait(self, limits: Limits, written: Callable[[], int]) -> str | bytes | None:
        """Until the child ends (None), answers with a line (bytes), or breaks a limit (why, and killed)."""
        start = last = time.monotonic()
        while True:
            self._read(TICK)
            answer = self._line()
            if answer is not None:
                return answer
            if self.process.poll() is not None:
                self._read(0.0)
                return self._line()
            now = time.monotonic()
            why = "interrupted" if self._stop.is_set() else ""
            if now - start > limits.seconds:
                why = f"took longer than {limits.seconds:g} s"
            if now - last > SLOW_TICK:
                last = now
                why = why or _too_much(limits, written(), resident(self.process.pid))
            if why:
                self.kill()
                return why

    def printed(self) -> tuple[str, str]:
        """The ends of standard output and error since the last call."""
        texts = []
        for stream in self._streams:
            texts.append(bytes(self._tails[stream]).decode("utf-8", "replace"))
            self._tails[stream].clear()
        return texts[0], texts[1]

    def kill(self) -> int:
        """End the whole group; the child's exit status, negative if a signal ended it."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        status = self.process.wait()
        self._read(0.0)
        return status

    def close(self) -> None:
        """End it, and give back what it holds."""
        self.kill()
        self._selector.close()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        if hasattr(self, "_answers"):
            os.close(self._answers)

    def _read(self, seconds: float) -> None:
        if not self._selector.get_map():
            time.sleep(min(seconds, TICK))
            return
        for key, _ in self._selector.select(seconds):
            stream = key.fd
            for _ in range(64):  # so that a child that never stops printing cannot keep us here
                try:
                    data = os.read(stream, 1 << 16)
                except BlockingIOError:
                    break
                if not data:
                    self._selector.unregister(stream)
                    break
                tail = self._tails[stream]
                tail += data
                del tail[:-KEPT]

    def _line(self) -> bytes | None:
        if not hasattr(self, "_answers"):
            return None
        line, newline, rest = bytes(self._tails[self._answers]).partition(b"\n")
        if not newline:
            return None
        self._tails[self._answers][:] = rest
        return line


def run_command(command: Sequence[str], output: Path, limits: Limits, stop: threading.Event) -> Ran:
    """Run to the end, and say how it went.  Raises Unreadable if there is no such program."""
    start = time.monotonic()
    child = Child(command, stop=stop)
    try:
        broken = child.wait(limits, lambda: size(output))
        seconds = time.monotonic() - start
        status = child.kill() if broken is None else 0
        stdout, stderr = child.printed()
    finally:
        child.close()
    if broken is not None:
        assert isinstance(broken, str)
        return Ran(KILLED, broken, seconds, stdout, stderr)
    return ended(status, seconds, stdout, stderr)


def ended(status: int, seconds: float, stdout: str, stderr: str) -> Ran:
    """What an exit status says."""
    if status == 0:
        return Ran(DONE, "", seconds, stdout, stderr)
    if status == STATUS_NOT_FOR_ME:
        return Ran(NOT_FOR_ME, "", seconds, stdout, stderr)
    if status > 0:
        return Ran(FAILED, f"exit status {status}", seconds, stdout, stderr)
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return Ran(CRASHED, f"ended by {name}", seconds, stdout, stderr, -status)


def size(path: Path) -> int:
    """Bytes of a file; 0 if there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _too_much(limits: Limits, written: int, used: int) -> str:
    if written > limits.output:
        return f"wrote more than {limits.output} bytes"
    if used > limits.memory:
        return f"used more than {limits.memory / 2**30:.3g} GiB of memory"
    return ""


def resident(group: int) -> int:
    """Bytes of memory of a process group, where the system tells; else 0."""
    total = 0
    try:
        entries = [entry for entry in os.listdir("/proc") if entry.isdecimal()]
    except OSError:
        return 0
    for entry in entries:
        with suppress(OSError, ValueError, IndexError):
            fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) == group:
                total += int(fields[21]) * _page()
    return total


def memory() -> int:
    """Bytes of memory of this machine, or of the container that we are in."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * _page()
    except (ValueError, OSError):
        return 1 << 62
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            total = min(total, int(Path(name).read_text()))
    return total


def _page() -> int:
    value: Any = os.sysconf("SC_PAGE_SIZE")
    return int(value)
