"""Threads: order, exceptions, nesting, and that BLAS gets its threads back."""

import multiprocessing
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from refimpl.numerics import threads
from refimpl.numerics.threads import Blas, blas, each, single_blas_thread, width


class Counter:
    """Stands in for BLAS: a thread count that can be read and set, and every value that it ever had."""

    def __init__(self, count: int) -> None:
        self.count, self.seen = count, [count]

    def get(self) -> int:
        return self.count

    def set(self, count: int) -> None:
        self.count = count
        self.seen.append(count)


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """A BLAS of four threads, whatever this machine has."""
    counter = Counter(4)
    monkeypatch.setattr(threads, "blas", lambda: Blas(counter.get, counter.set))
    monkeypatch.setattr(threads, "_state", threads._State())
    return counter


def test_results_keep_the_order_of_the_items(four: Counter) -> None:
    def slow_first(n: int) -> int:
        time.sleep(0.02 if n == 0 else 0)
        return n * n

    assert each(slow_first, range(50)) == [n * n for n in range(50)]


def test_four_threads_work_at_the_same_time(four: Counter) -> None:
    together = threading.Barrier(4, timeout=10)
    each(lambda _: together.wait(), range(4))  # a smaller number of threads would break the barrier


def test_blas_has_one_thread_inside_and_its_own_count_afterwards(four: Counter) -> None:
    assert each(lambda _: four.count, range(8)) == [1] * 8
    assert four.count == 4
    assert four.seen == [4, 1, 4]


def test_blas_gets_its_threads_back_after_an_exception(four: Counter) -> None:
    with pytest.raises(ZeroDivisionError):
        each(lambda n: 1 // n, [1, 0, 2])
    assert four.count == 4


def test_the_exception_of_the_first_failing_item_is_raised(four: Counter) -> None:
    ready = threading.Barrier(4, timeout=10)

    def fail(n: int) -> None:
        ready.wait()
        raise ValueError(f"item {n}")

    with pytest.raises(ValueError, match="item 0"):
        each(fail, range(4))


def test_no_item_starts_after_a_failure(four: Counter) -> None:
    ran = []

    def fail_at_once(n: int) -> None:
        ran.append(n)
        time.sleep(0.005)
        raise ValueError(str(n))

    with pytest.raises(ValueError, match="0"):
        each(fail_at_once, range(1000))
    assert len(ran) <= 4


def test_an_interrupt_stops_the_others_and_goes_on(four: Counter) -> None:
    def interrupted(n: int) -> None:
        if n == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        each(interrupted, range(100))
    assert four.count == 4


def test_a_nested_call_ends_and_is_right(four: Counter) -> None:
    table = each(lambda a: each(lambda b: 10 * a + b, range(10)), range(10))
    assert table == [[10 * a + b for b in range(10)] for a in range(10)]
    assert four.seen == [4, 1, 4]


def test_calls_from_several_threads_share_one_blas_setting(four: Counter) -> None:
    def caller(n: int) -> list[int]:
        return each(lambda m: (time.sleep(0.001), four.count, n * m)[1:], range(20))

    with ThreadPoolExecutor(5) as pool:
        for n, got in enumerate(pool.map(caller, range(5))):
            assert got == [(1, n * m) for m in range(20)]
    assert four.count == 4


def test_the_width_is_what_blas_had_also_from_inside(four: Counter) -> None:
    assert width() == 4
    assert each(lambda _: width(), range(4)) == [4] * 4


def test_one_thread_means_in_order_on_the_calling_thread(four: Counter) -> None:
    four.set(1)
    here = threading.get_ident()
    assert each(lambda _: threading.get_ident(), range(8)) == [here] * 8
    assert each(lambda n: n, []) == []


def test_a_single_item_leaves_blas_its_threads(four: Counter) -> None:
    assert each(lambda _: four.count, [0]) == [4]


def test_without_a_known_blas_the_work_is_sequential(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "blas", lambda: None)
    here = threading.get_ident()
    assert width() == 1
    assert each(lambda _: threading.get_ident(), range(8)) == [here] * 8
    with single_blas_thread():
        pass


def test_numpy_error_state_of_the_caller_holds_in_every_thread(four: Counter) -> None:
    together = threading.Barrier(4, timeout=10)

    def divide(_: int) -> float:
        together.wait()
        return float(np.float64(1.0) / np.float64(0.0))

    with np.errstate(divide="ignore"):  # elsewhere this warns, and a warning is an error in these tests
        assert each(divide, range(4)) == [np.inf] * 4
    with np.errstate(divide="raise"), pytest.raises(FloatingPointError):
        each(lambda _: np.float64(1.0) / np.float64(0.0), range(4))


def test_products_in_threads_equal_products_of_a_single_blas_thread() -> None:
    x = np.arange(16 * 40 * 30, dtype=np.float64).reshape(16, 40, 30) / 7.0
    with single_blas_thread():
        expected = [a @ a.T for a in x]
    for got, wanted in zip(each(lambda a: a @ a.T, list(x)), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_the_real_blas_is_set_and_restored() -> None:
    library = blas()
    if library is None:
        pytest.skip("the threads of this NumPy's BLAS cannot be reached")
    before = library.get()
    with single_blas_thread():
        assert library.get() == 1
    assert library.get() == before


def in_child(queue: "multiprocessing.Queue[list[int]]") -> None:
    queue.put(each(lambda n: n + 1, range(10)))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_starts_afresh() -> None:
    each(lambda n: n, range(10))  # the parent has a pool
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[list[int]] = context.Queue()
    child = context.Process(target=in_child, args=(queue,))
    child.start()
    assert queue.get(timeout=30) == list(range(1, 11))
    child.join()
    assert child.exitcode == 0
