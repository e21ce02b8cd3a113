"""Are the exact results the same everywhere?  One table of digests over many environments.

    python bench/determinism.py [--quick] [--aarch64] [--golden] [--suites S ...] [--json FILE]

Runs determinism_load.py in a process per environment: OpenBLAS kernels (OPENBLAS_CORETYPE), one and two
threads (OPENBLAS_NUM_THREADS), SIMD levels switched off (NPY_DISABLE_CPU_FEATURES and, for the C library,
GLIBC_TUNABLES), an older NumPy (a virtual environment, made once), and with --aarch64 an emulated ARM machine
(qemu-user, made once).  Each row names the kernel and the SIMD levels that really ran, and which results of
*plain* NumPy changed there against the first row: the positive control, without which equal digests would
show nothing.

Exit status: 0 all exact digests are equal, 1 some differ, 2 it could not be tried.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import determinism_setup as setup
from tabulate import tabulate

HERE = Path(__file__).resolve().parent
LOAD = HERE / "determinism_load.py"

# Names that make some build of OpenBLAS take another kernel.  A wheel has only some of the kernels and takes
# the nearest for the rest; the oldest NumPy 2 has nine for x86, the newest five.  Names of kernels with FMA4
# (Bulldozer to Excavator) are left out: a build that has them crashes on today's processors.
KERNELS = {
    "x86_64": ("Prescott", "Core2", "Nehalem", "Barcelona", "Sandybridge", "Haswell", "Zen", "SkylakeX"),
    "aarch64": ("ARMV8", "CORTEXA57", "NEOVERSEN1", "THUNDERX2T99", "NEOVERSEV1"),
}
LIBC = {"GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-FMA4,-AVX512F"}
SIZED = ("generator", "functions", "contractions")  # suites whose work is a number of points
GOLDEN = (", default", ", two threads", ", Haswell", ", an old machine")  # where --golden adds the cases
CONTROLLED = ("OPENBLAS_", "GOTO_", "OMP_", "MKL_", "BLIS_", "NPY_", "GLIBC_TUNABLES", "PYTHON")


@dataclass(frozen=True)
class Environment:
    name: str
    python: list[str]
    variables: dict[str, str] = field(default_factory=dict)
    suites: tuple[str, ...] = ()
    large: bool = True  # run the long form as well

    @property
    def golden(self) -> bool:
        """Whether --golden computes the cases here; emulated they would take an hour."""
        return self.name.endswith(GOLDEN) and not self.name.startswith("aarch64")


@dataclass(frozen=True)
class Outcome:
    environment: Environment
    report: dict[str, Any] | None
    failure: str = ""


def run(environment: Environment, points: list[int], number: int) -> Outcome:
    """One environment; its digests of every number of points."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(CONTROLLED)}
    variables |= {"OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": str(number), "PYTHONDONTWRITEBYTECODE": "1"}
    variables |= environment.variables
    paths = [str(HERE.parent), environment.variables.get("PYTHONPATH", "")]
    variables["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    merged: dict[str, Any] | None = None
    for n, size in enumerate(points if environment.large else points[:1]):
        # The long form repeats only what depends on the number of points.
        suites = [s for s in environment.suites if n == 0 or s in SIZED]
        command = [*environment.python, str(LOAD), "--points", str(size), "--suites", *suites]
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
        if done.returncode < 0:
            return Outcome(environment, None, f"ended by {signal.Signals(-done.returncode).name}")
        if done.returncode:
            return Outcome(environment, None, (done.stderr.strip().splitlines() or ["no message"])[-1][:90])
        report = json.loads(done.stdout)
        report["digests"] = {
            f"{key} ({size})" if key.startswith(SIZED) else key: value
            for key, value in report["digests"].items()
        }
        if merged is None:
            merged = report
        else:
            merged["digests"] |= report["digests"]
            merged["seconds"] += report["seconds"]
    return Outcome(environment, merged)


def probe(python: list[str]) -> list[str]:
    """The SIMD levels beyond the baseline that this NumPy uses here, under the names that it obeys."""
    code = (
        "from importlib import import_module; m = import_module('numpy._core._multiarray_umath');"
        "print(*[f for f in m.__cpu_dispatch__ if m.__cpu_features__[f]])"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(CONTROLLED)}
    return subprocess.run(
        [*python, "-c", code], env=clean, check=True, capture_output=True, text=True
    ).stdout.split()


def of_one_numpy(
    label: str, python: list[str], suites: tuple[str, ...], large: bool
) -> Iterator[Environment]:
    """Everything that can be varied for one NumPy."""
    yield Environment(f"{label}, default", python, {}, suites, large)
    yield Environment(f"{label}, two threads", python, {"OPENBLAS_NUM_THREADS": "2"}, suites, large)
    for kernel in KERNELS.get(platform.machine(), ()):
        yield Environment(f"{label}, {kernel}", python, {"OPENBLAS_CORETYPE": kernel}, suites, large)
    found = probe(python)
    wide = [f for f in found if f.startswith("AVX512") or f == "X86_V4"]
    if wide:
        off = {"NPY_DISABLE_CPU_FEATURES": " ".join(wide)}
        yield Environment(f"{label}, no AVX-512", python, off, suites, large)
    if found:
        off = {"NPY_DISABLE_CPU_FEATURES": " ".join(found)}
        yield Environment(f"{label}, SIMD baseline", python, off, suites, large)
        if platform.machine() == "x86_64":
            old = {"OPENBLAS_CORETYPE": "Nehalem", "OPENBLAS_NUM_THREADS": "2"}
            yield Environment(f"{label}, an old machine", python, off | LIBC | old, suites, large)
    if platform.machine() == "x86_64":
        yield Environment(f"{label}, C library without FMA", python, LIBC, suites, large)


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def environments(options: argparse.Namespace) -> Iterator[Environment]:
    suites = tuple(options.suites)
    yield from of_one_numpy("this NumPy", [sys.executable], suites, not options.quick)
    if options.other_numpy != "none":
        tell(f"NumPy {options.other_numpy} in {options.cache} ...")
        other = setup.other_numpy(options.cache, options.other_numpy)
        yield from of_one_numpy(f"NumPy {options.other_numpy}", other, suites, not options.quick)
    if options.aarch64:
        tell(f"aarch64 in {options.cache} ...")
        python, variables = setup.aarch64(options.cache)
        yield Environment("aarch64, default", python, variables, suites, large=False)
        generic = variables | {"OPENBLAS_CORETYPE": "ARMV8", "OPENBLAS_NUM_THREADS": "2"}
        yield Environment("aarch64, ARMV8, two threads", python, generic, suites, large=False)


def rows(outcomes: list[Outcome], first: dict[str, Any]) -> Iterator[list[Any]]:
    for outcome in outcomes:
        r = outcome.report
        if r is None:
            yield [outcome.environment.name, *[""] * 4, f"not run: {outcome.failure}", "", ""]
            continue
        moved = [c for c, value in r["controls"].items() if value != first["controls"].get(c)]
        equal = sum(first["digests"].get(d) == value for d, value in r["digests"].items())
        yield [
            outcome.environment.name,
            f"{r['numpy']} {r['machine']}",
            r["kernel"],
            r["threads"],
            r["simd"][-1] if r["simd"] else "baseline",
            "(the reference)" if r is first else ", ".join(moved) or "nothing: the reference's own kernel",
            f"{equal} of {len(r['digests'])}",
            r["seconds"],
        ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="leave out the long form of the suites")
    parser.add_argument("--aarch64", action="store_true", help="also an emulated ARM machine")
    parser.add_argument("--suites", nargs="+", default=[*SIZED, "model"], choices=[*SIZED, "model"])
    parser.add_argument("--golden", action="store_true", help="all golden cases in some of the environments")
    parser.add_argument("--points", type=int, nargs="+", default=[20_000, 100_000])
    parser.add_argument("--other-numpy", default=setup.oldest_numpy(), help="a second version, or none")
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "refimpl" / "determinism"
    parser.add_argument("--cache", type=Path, default=cache, help="where environments are kept")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", metavar="FILE", help="write everything, - for standard output")
    options = parser.parse_args()

    try:
        todo = list(environments(options))
        if options.golden:
            todo = [replace(e, suites=(*e.suites, "golden")) if e.golden else e for e in todo]
    except (OSError, subprocess.CalledProcessError) as failure:
        detail = (getattr(failure, "stderr", "") or "").strip().splitlines()[-1:] or [str(failure)]
        tell(f"An environment could not be made: {detail[0]}")
        return 2
    outcomes: list[Outcome] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = [pool.submit(run, e, options.points, n) for n, e in enumerate(todo)]
        for n, future in enumerate(futures):
            outcomes.append(future.result())
            tell(f"[{n + 1}/{len(todo)}] {todo[n].name}")

    first = outcomes[0].report
    if first is None:
        tell(f"The reference environment did not run: {outcomes[0].failure}")
        return 2
    reports = [o.report for o in outcomes if o.report is not None]
    headers = [
        "environment",
        "NumPy",
        "BLAS kernel",
        "threads",
        "SIMD up to",
        "control: plain NumPy changed in",
    ]
    print(tabulate(rows(outcomes, first), [*headers, "exact, equal", "s"]))
    print()
    names = {name: None for r in reports for name in r["digests"]}
    table = []
    for name in names:
        values = [r["digests"][name] for r in reports if name in r["digests"]]
        table.append([name, values[0][:16], len(values), "yes" if len(set(values)) == 1 else "NO"])
    print(tabulate(table, ["exact result", "SHA-256 (begin)", "environments", "all equal"]))
    print()
    moved = sum(r["controls"] != first["controls"] for r in reports)
    kinds = len({json.dumps(r["controls"]) for r in reports})
    differ = [row[0] for row in table if row[3] == "NO"]
    print(
        f"{len(reports)} environments ran; in {moved} of them plain NumPy gave other bits than in the first, "
        f"{kinds} different sets of bits in all."
    )
    print(
        f"DIFFERENT: {', '.join(differ)}"
        if differ
        else f"All {len(table)} exact digests are equal everywhere."
    )
    if options.json:
        data = [{"name": o.environment.name, "report": o.report, "failure": o.failure} for o in outcomes]
        text = json.dumps(data, indent=1)
        print(text) if options.json == "-" else Path(options.json).write_text(text + "\n")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
