"""A whole port against a folder of cases.  SPEC VERDICT-15 to VERDICT-17.

Every case is prepared, computed by the port in a process of its own, judged, and cleared away, several at
once.  Whatever a port does is the result of that case, and the others go on.
"""

from __future__ import annotations

import os
import queue
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeVar

from refimpl.cases import format
from refimpl.cases.folder import Folder
from refimpl.errors import Error, Invalid, Unreadable
from refimpl.validate import diagnosing, preparing, running, trying
from refimpl.validate.diagnosis import Diagnosis
from refimpl.validate.port import Port, Runner
from refimpl.validate.portfile import PortFile
from refimpl.validate.results import FAILED, LEFT_OUT, NOT_FOR_ME, NOT_OFFERED, CaseResult, Validation
from refimpl.validate.running import Limits, Ran
from refimpl.validate.settling import Alternatives, settle
from refimpl.validate.trying import Judging

TIMEOUT: Final = 120.0  # seconds for a case
SHARE: Final = 0.75  # of the memory that a port may use
OUTPUT: Final = "output.safetensors"
Item = TypeVar("Item")


@dataclass(frozen=True)
class Wanted:
    """What to validate, and how."""

    cases: Path
    suites: tuple[str, ...] = ()
    claim: str | None = None  # for all cases, before what the port declares
    jobs: int = 1
    timeout: float = TIMEOUT
    keep: Path | None = None  # where outputs and what was printed stay
    diagnose: bool = False  # name the mistakes of what does not hold


def validate(
    port: Port, wanted: Wanted, declared: PortFile, done: Callable[[str], None] = lambda id: None
) -> Validation:
    """Raises Unreadable or Invalid where nothing can be tried: no cases, no such port."""
    paths = _cases(wanted)
    stop = threading.Event()
    with _folder(wanted.keep) as root:
        session = _Session(port, wanted, declared, root, stop)
        try:
            results = session.all(paths, done)
            settled = settle([r.evidence for r in results if r.evidence is not None])
            if settled.known:
                results = session.again(results, settled.known)
                settled = settle([r.evidence for r in results if r.evidence is not None])
            results = [trying.settled(r, settled.assigned) for r in results]
            diagnoses = session.diagnosed(results) if wanted.diagnose else ()
        except BaseException:
            stop.set()
            raise
        finally:
            session.close()
    return Validation(
        port.name, declared, wanted.claim, tuple(results), settled.seen, settled.inconsistent, diagnoses
    )


def _cases(wanted: Wanted) -> list[Path]:
    found = format.cases(wanted.cases)
    if not found:
        raise Unreadable(f"{wanted.cases} has no golden cases, but at least one is required.")
    suites = {path.parent.name for path in found}
    there = ", ".join(sorted(suites))
    for name in wanted.suites:
        if name not in suites:
            raise Invalid(f"suite {name[:40]!r} is not in {wanted.cases}, but it must be one of {there}.")
    return [path for path in found if not wanted.suites or path.parent.name in wanted.suites]


class _Session:
    """Runners that go from case to case, and the folder that they write to."""

    def __init__(
        self, port: Port, wanted: Wanted, declared: PortFile, root: Path, stop: threading.Event
    ) -> None:
        self._port, self._wanted, self._declared, self._root, self._stop = port, wanted, declared, root, stop
        self._limits = Limits(wanted.timeout, int(SHARE * running.memory()), 0)
        self._free: queue.SimpleQueue[Runner] = queue.SimpleQueue()
        self._runners: list[Runner] = [port.runner(stop, self._limits)]  # the first shows if it can be run
        self._free.put(self._runners[0])
        self._lock = threading.Lock()
        self._judgings: dict[str, Judging] = {}
        self._folders: dict[str, Folder] = {}  # whose outputs are evidence

    def all(self, paths: Sequence[Path], done: Callable[[str], None]) -> list[CaseResult]:
        return self._over(self._one, paths, done)

    def again(self, results: list[CaseResult], known: Alternatives) -> list[CaseResult]:
        """What is still unexplained, under what was found elsewhere."""
        judgings = self._judgings
        unexplained = [r for r in results if r.id in judgings and not r.explanations]

        def call(r: CaseResult) -> CaseResult:
            return trying.again(r, judgings[r.id], self._root / r.id / OUTPUT, known)

        tried = self._over(call, unexplained, lambda id: None)
        by_id = {r.id: r for r in tried}
        return [by_id.get(r.id, r) for r in results]

    def diagnosed(self, results: Sequence[CaseResult]) -> tuple[Diagnosis, ...]:
        """Of all outputs that were judged, under the choices that the port takes."""
        judged = []
        for r in results:
            if r.id in self._folders and r.verdict is not None:
                folder = Folder(self._folders[r.id].path, self._folders[r.id].case)
                choices = {**self._declared.choices, **r.under}
                judged.append((folder, self._root / r.id / OUTPUT, r.verdict, choices))
        return tuple(diagnosing.of_outputs(judged))

    def close(self) -> None:
        for runner in self._runners:
            runner.close()

    def _over(
        self, call: Callable[[Item], CaseResult], items: Sequence[Item], done: Callable[[str], None]
    ) -> list[CaseResult]:
        with ThreadPoolExecutor(self._wanted.jobs) as pool:
            try:
                futures = [pool.submit(call, item) for item in items]
                waiting: set[Future[CaseResult]] = set(futures)
                while waiting:
                    ready, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                    for future in ready:
                        done(future.result().id)
            except BaseException:
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return [future.result() for future in futures]

    def _one(self, path: Path) -> CaseResult:
        id = f"{path.parent.name}/{path.name}"
        try:
            place = self._root / id
            try:
                return self._tried(Folder.open(path), id, place)
            finally:
                if self._wanted.keep is None:
                    self._clear(id, place)
        except Error as error:  # of our own folder, or of the temporary one
            return CaseResult(id, status=FAILED, why=f"the case cannot be tried: {error}")

    def _clear(self, id: str, place: Path) -> None:
        """The output stays while it is evidence, of a choice or of a mistake."""
        if id in self._judgings or id in self._folders:
            (place / format.INPUTS).unlink(missing_ok=True)
        else:
            shutil.rmtree(place, ignore_errors=True)

    def _tried(self, folder: Folder, id: str, place: Path) -> CaseResult:
        case = folder.case
        plain = CaseResult(id, case.title, case.kind, case.component)
        why = self._declared.excludes(case)
        if why is not None:
            return replace(plain, status=LEFT_OUT, why=why)
        judging = Judging.of(folder, self._declared, self._wanted.claim)
        if isinstance(judging, str):
            return replace(plain, status=NOT_OFFERED, why=judging)
        output = place / OUTPUT
        ran = self._run(preparing.prepared(folder, place), output, judging.limit)
        if self._wanted.keep is not None:
            _keep(place, ran)
        if ran.outcome == running.NOT_FOR_ME:
            return replace(plain, status=NOT_FOR_ME, why=ran.why, ran=ran)
        result = trying.judged(replace(plain, ran=ran), judging, output)
        if judging.explainable(result):
            self._judgings[id] = judging
        if self._wanted.diagnose and judging.claim is not None and result.verdict is not None:
            self._folders[id] = judging.folder
        return result

    def _run(self, folder: Path, output: Path, limit: int) -> Ran:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Unreadable(f"{output.parent} cannot be made ({error.strerror}).") from None
        if output.is_dir() and not output.is_symlink():
            shutil.rmtree(output)
        output.unlink(missing_ok=True)
        try:
            runner = self._free.get_nowait()
        except queue.Empty:
            runner = self._port.runner(self._stop, self._limits)
            with self._lock:
                self._runners.append(runner)
        try:
            return runner.run(folder, output, replace(self._limits, output=limit))
        finally:
            self._free.put(runner)


def _keep(place: Path, ran: Ran) -> None:
    for name, text in (("stdout.txt", ran.stdout), ("stderr.txt", ran.stderr)):
        (place / name).write_text(text, "utf-8", "replace")


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    """Where ports write: a temporary folder that goes away, or one that stays."""
    if keep is not None:
        try:
            keep.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Unreadable(f"{keep} cannot be made ({error.strerror}), but it must be a folder.") from None
        yield keep.resolve()
        return
    root = Path(tempfile.mkdtemp(prefix="refimpl-"))
    try:
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)


def usual_jobs() -> int:
    """Cores that we may use, at most 4: a port may be parallel itself."""
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@contextmanager
def terminating() -> Iterator[None]:
    """A request to end (a cancelled job, a closed terminal) is an interruption, so that ports are ended."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in (signal.SIGTERM, signal.SIGHUP):
            before[name] = signal.signal(name, interrupt)
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
