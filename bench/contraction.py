"""How much a correctly rounded contraction costs, in plain float64 products.

    python bench/contraction.py [--shape M K N] [--repeat R] [--small]

Every repetition runs all variants one after the other, so that a busy machine slows them alike; the table
shows medians, and ratios to a plain `a @ b.T` of float64 that runs in the same repetition.  `cold` starts
from arrays, `warm` has the second operand prepared and used before.  The number of threads is that of the
BLAS: set OPENBLAS_NUM_THREADS (or MKL_NUM_THREADS, VECLIB_MAXIMUM_THREADS) to change it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import ml_dtypes
import numpy as np
from tabulate import tabulate
from tqdm import tqdm

from refimpl.numerics import contraction
from refimpl.numerics.contraction import contract, dot, mean, prepare, sum_

Job = Callable[[], object]

FORMATS = {
    "float64": np.float64,
    "float32": np.float32,
    "bf16": ml_dtypes.bfloat16,
    "E4M3": ml_dtypes.float8_e4m3fn,
}


def seconds(job: Job) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def measure(jobs: dict[str, Job], repeat: int, inner: int = 1) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for job in jobs.values():
        job()
    for _ in tqdm(range(repeat), leave=False, disable=None):
        for name, job in jobs.items():
            taken[name].append(sum(seconds(job) for _ in range(inner)) / inner)
    return taken


def undecided(job: Job, elements: int) -> float:
    """The share of elements that were computed exactly."""
    counted = 0
    decide = contraction._decide_exactly

    def count(a, b, at, *rest):  # type: ignore[no-untyped-def]
        nonlocal counted
        counted += len(at[0])
        decide(a, b, at, *rest)

    contraction._decide_exactly = count
    try:
        job()
    finally:
        contraction._decide_exactly = decide
    return counted / elements


def large(m: int, k: int, n: int, repeat: int) -> str:
    random = np.random.Generator(np.random.PCG64(1))
    a, b = random.standard_normal((m, k)), random.standard_normal((n, k))
    jobs: dict[str, Job] = {"plain": lambda: a @ b.T}
    for name, dtype in FORMATS.items():
        x, y = a.astype(dtype).astype(np.float64), b.astype(dtype).astype(np.float64)
        p = prepare(y)
        jobs[f"{name} cold"] = lambda x=x, y=y: contract(x, y)
        jobs[f"{name} warm"] = lambda x=x, p=p: contract(x, p)
    taken = measure(jobs, repeat)
    rows = []
    for name, times in taken.items():
        ratio = statistics.median(t / plain for t, plain in zip(times, taken["plain"], strict=True))
        share = "" if name == "plain" else f"{undecided(jobs[name], m * n):.1e}"
        rows.append([name, statistics.median(times) * 1e3, min(times) * 1e3, ratio, share])
    return tabulate(
        rows,
        headers=["values", "median ms", "best ms", "ratio", "undecided"],
        floatfmt=(".1f", ".1f", ".1f", ".2f", ""),
    )


def small(repeat: int) -> str:
    random = np.random.Generator(np.random.PCG64(1))
    a, b = random.standard_normal((42, 48)), random.standard_normal((20, 48))
    heads, keys = random.standard_normal((2, 4, 21, 12)), random.standard_normal((2, 4, 21, 12))
    whole = np.round(a * 8), np.round(b * 8)
    jobs: dict[str, Job] = {
        "a @ b.T                (42,48) (20,48)": lambda: a @ b.T,
        "contract, float64      (42,48) (20,48)": lambda: contract(a, b),
        "contract, few bits     (42,48) (20,48)": lambda: contract(*whole),
        "contract, a stack  (2,4,21,12) (2,4,21,12)": lambda: contract(heads, keys),
        "dot                    (42,48) (42,48)": lambda: dot(a, a),
        "sum_                   (42,48)": lambda: sum_(a),
        "mean                   (42,48)": lambda: mean(a),
    }
    taken = measure(jobs, repeat * 10, inner=20)
    rows = [[name, statistics.median(t) * 1e6, min(t) * 1e6] for name, t in taken.items()]
    return tabulate(rows, headers=["call", "median us", "best us"], floatfmt=".1f")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=int, nargs=3, default=(256, 7168, 2048), metavar=("M", "K", "N"))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="only the small calls")
    options = parser.parse_args()
    threads = os.environ.get("OPENBLAS_NUM_THREADS", f"not set, {os.cpu_count()} cores")
    print(f"NumPy {np.__version__}, OPENBLAS_NUM_THREADS {threads}\n")
    if not options.small:
        print("({}, {}) x ({}, {})".format(*options.shape[:2], *options.shape[:0:-1]))
        print(large(*options.shape, options.repeat), end="\n\n")
    print(small(options.repeat))


if __name__ == "__main__":
    main()
