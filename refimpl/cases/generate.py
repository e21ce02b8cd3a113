"""Writing suites of cases.  SPEC CASE-9."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from refimpl.cases import folder
from refimpl.cases.build import AnyDefinition, Built, build
from refimpl.cases.format import WEIGHT
from refimpl.cases.suites import SUITES, definition, suite
from refimpl.numerics import threads

Out = TypeVar("Out")


def definitions(suites: Iterable[str] = ()) -> list[AnyDefinition]:
    """The cases of the named suites, of all by default.  Raises Invalid."""
    return [case for name in tuple(suites) or SUITES for case in suite(name)]


def generate(
    suites: Iterable[str], out: Path, *, whole: bool, jobs: int, done: Callable[[str], None] = lambda id: None
) -> int:
    """Write the cases of suites below `out`; returns how many.  whole: large tensors too, not only samples
    of them.

    done(id) is called after each.  Raises Invalid for unknown suites, Unreadable for what cannot be written.
    """
    ids = [case.id for case in definitions(suites)]
    for _, id in over(_write, [(id, out, whole) for id in ids], jobs):
        done(id)
    return len(ids)


def over(call: Callable[..., Out], work: list[tuple[object, ...]], jobs: int) -> Iterator[tuple[Out, str]]:
    """(result, first argument) for each row of work, as they are done, on `jobs` processes."""
    if jobs <= 1 or len(work) <= 1:
        for row in work:
            yield call(*row), str(row[0])
        return
    with _pool(min(jobs, len(work))) as pool:
        futures: dict[Future[Out], str] = {pool.submit(call, *row): str(row[0]) for row in work}
        for future in as_completed(futures):
            yield future.result(), futures[future]


@contextmanager
def _pool(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that finish the case they are at, and no other, when this one is interrupted."""
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_quiet)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    pool.shutdown()


def _quiet() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    library = threads.blas()
    if library is not None:
        library.set(1)  # the processes are the threads


def _write(id: str, out: Path, whole: bool) -> None:
    built = build(definition(id))
    if whole:
        _assets(built, out)
    folder.write(out, built.case, built.given, built.expected, built.extras, whole)


def _assets(built: Built, out: Path) -> None:
    weights = [t for t in built.case.tensors if t.role == WEIGHT and t.asset]
    if weights and weights[0].asset:
        stored = {t.name: folder.stored(built.given[t.name], t.dtype) for t in weights}
        folder.write_asset(out, weights[0].asset, stored)
