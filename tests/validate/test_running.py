"""A child process: its limits, its group, and what is kept of what it prints."""

import os
import sys
import threading
import time

import pytest

from refimpl.errors import Unreadable
from refimpl.validate import running
from refimpl.validate.running import CRASHED, DONE, FAILED, KILLED, NOT_FOR_ME, Limits, run_command

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs process groups")
LIMITS = Limits(60.0, 1 << 40, 1 << 20)


def _run(code, tmp_path, limits=LIMITS, stop=None):
    command = [sys.executable, "-I", "-c", code]
    return run_command(command, tmp_path / "output", limits, stop or threading.Event())


@pytest.mark.parametrize(
    ("code", "outcome", "why"),
    [
        ("", DONE, ""),
        ("raise SystemExit(77)", NOT_FOR_ME, ""),
        ("raise SystemExit(5)", FAILED, "exit status 5"),
        ("import os; os.kill(os.getpid(), 11)", CRASHED, "ended by SIGSEGV"),
    ],
)
def test_the_exit_status_says_how_it_went(tmp_path, code, outcome, why):
    found = _run(code, tmp_path)
    assert (found.outcome, found.why) == (outcome, why)


def test_a_program_that_is_not_there_cannot_be_run(tmp_path):
    with pytest.raises(Unreadable, match="cannot be run"):
        run_command([str(tmp_path / "none")], tmp_path / "output", LIMITS, threading.Event())


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="memory is read from /proc")
def test_a_port_that_uses_too_much_memory_is_ended(tmp_path):
    code = "import time; x = bytearray(400 << 20); time.sleep(60)"
    found = _run(code, tmp_path, Limits(60.0, 200 << 20, 1 << 20))
    assert (found.outcome, found.why) == (KILLED, "used more than 0.195 GiB of memory")
    assert found.seconds < 30


def test_an_interruption_ends_a_child_at_once(tmp_path):
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    start = time.monotonic()
    found = _run("import time; time.sleep(60)", tmp_path, stop=stop)
    assert (found.outcome, found.why) == (KILLED, "interrupted")
    assert time.monotonic() - start < 20


def test_a_child_that_closes_its_output_and_goes_on_is_waited_for(tmp_path):
    found = _run("import os, time; os.close(1); os.close(2); time.sleep(0.4)", tmp_path)
    assert found.outcome == DONE
    assert found.seconds >= 0.4


def test_the_end_of_each_stream_is_kept(tmp_path):
    code = "import sys; sys.stdout.write('x' * 100000 + 'end'); sys.stderr.write('one\\n\\n  two  \\n')"
    found = _run(code, tmp_path)
    assert len(found.stdout) == running.KEPT
    assert found.stdout.endswith("xend")
    assert found.last_line == "two"
