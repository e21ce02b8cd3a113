"""The one place that owns threads: independent pieces of work on several outer threads, BLAS on one.

BLAS threads and Python threads at once are worse than either.  `each` therefore takes the threads away from
BLAS while it runs: as many outer threads as BLAS had, each calling a BLAS of one thread.  The user's setting
(for OpenBLAS the variable OPENBLAS_NUM_THREADS) bounds both, and one thread means plain sequential work.

How BLAS is reached: NumPy's extension module is opened a second time through ctypes, which finds the library
that this NumPy was really linked to, whatever its file is called.  Where no known entry point is found
(Accelerate, BLIS, Windows) BLAS keeps its threads and the work is done in order on the calling thread.
"""

import contextvars
import ctypes
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, TypeVar

A = TypeVar("A")
B = TypeVar("B")

# Pairs (read, set): the wheels' own OpenBLAS, OpenBLAS with and without 64-bit integers, MKL.
_ENTRY_POINTS = (
    ("scipy_openblas_get_num_threads64_", "scipy_openblas_set_num_threads64_"),
    ("scipy_openblas_get_num_threads", "scipy_openblas_set_num_threads"),
    ("openblas_get_num_threads64_", "openblas_set_num_threads64_"),
    ("openblas_get_num_threads", "openblas_set_num_threads"),
    ("MKL_Get_Max_Threads", "MKL_Set_Num_Threads"),
)


@dataclass(frozen=True)
class Blas:
    """The thread count of NumPy's BLAS, read and set at run time."""

    get: Callable[[], int]
    set: Callable[[int], Any]


@cache
def blas() -> Blas | None:
    """NumPy's BLAS, or None where its threads cannot be reached."""
    try:
        module = import_module("numpy._core._multiarray_umath")
        library = ctypes.CDLL(module.__file__)
    except (ImportError, OSError, TypeError):
        return None
    for read, write in _ENTRY_POINTS:
        if hasattr(library, read) and hasattr(library, write):
            getter, setter = getattr(library, read), getattr(library, write)
            getter.argtypes, getter.restype = [], ctypes.c_int
            setter.argtypes, setter.restype = [ctypes.c_int], None
            return Blas(getter, setter)
    return None


class _State:
    """What the calls that run at the same time share: who is inside, and the pool of helpers."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0  # callers that now need BLAS on one thread
        self.before = 1  # the count to go back to when the last of them leaves
        self.pool: ThreadPoolExecutor | None = None
        self.pool_width = 0

    def helpers(self, count: int) -> ThreadPoolExecutor:
        """One pool for the process; callers work as well, so that `count` is one less than the threads."""
        with self.lock:
            if self.pool is None or self.pool_width < count:
                # An older pool is not shut down, someone may be about to use it: it goes with its last user.
                self.pool, self.pool_width = ThreadPoolExecutor(count, thread_name_prefix="refimpl"), count
            return self.pool


_state = _State()


def _after_fork() -> None:
    """A forked child has none of the helpers and may have copied a held lock: it starts afresh."""
    global _state
    old, _state = _state, _State()
    library = blas()
    if old.inside and library is not None:
        library.set(old.before)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def width() -> int:
    """How many threads the process may use: what BLAS had before any `each` that is now running."""
    library = blas()
    if library is None:
        return 1
    with _state.lock:
        return max(1, _state.before if _state.inside else library.get())


@contextmanager
def single_blas_thread() -> Iterator[None]:
    """BLAS of one thread for the whole process, until the last of the callers inside has left."""
    library = blas()
    if library is None:
        yield
        return
    state = _state
    with state.lock:
        if state.inside == 0:
            state.before = library.get()
            library.set(1)
        state.inside += 1
    try:
        yield
    finally:
        with state.lock:
            state.inside -= 1
            if state.inside == 0:
                library.set(state.before)


def each(fn: Callable[[A], B], items: Iterable[A]) -> list[B]:
    """[fn(item) for item in items], on several threads; the results keep the order of the items.

    A single item runs on the calling thread and BLAS keeps its threads.  Items are handed out in order, one
    by one: uneven work balances best with the largest first.  NumPy's error state (`np.errstate`) of the
    caller holds in every thread.  May be called from several threads and from inside `fn`.

    Raises: what `fn` raised, of several exceptions that of the first item; no item starts after a failure.
    """
    todo = list(items)
    threads = min(len(todo), width())
    if threads <= 1:
        return [fn(item) for item in todo]

    results: list[Any] = [None] * len(todo)
    failures: list[tuple[int, BaseException]] = []
    numbers, taking = iter(range(len(todo))), threading.Lock()

    def work() -> None:
        while not failures:
            with taking:
                n = next(numbers, None)
            if n is None:
                return
            try:
                results[n] = fn(todo[n])
            except BaseException as failure:  # Ctrl-C as well: the others must stop before it goes on
                failures.append((n, failure))

    with single_blas_thread():
        pool = _state.helpers(threads - 1)
        # A helper that never started (busy pool, nested call) is called off: the caller did its work.
        started = [pool.submit(contextvars.copy_context().run, work) for _ in range(threads - 1)]
        work()
        for helper in started:
            if not helper.cancel():
                helper.result()
    if failures:
        raise min(failures, key=lambda f: f[0])[1]
    return results
