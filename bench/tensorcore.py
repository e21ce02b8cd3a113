"""How fast are the emulated tensor cores, and do they agree with recordings?

    python bench/tensorcore.py [--rounds N]             times on one core, side by side, in rounds
    python bench/tensorcore.py --recordings FOLDER      compares all recorded products of a folder

A time is the median over the rounds, each of which runs every row once, so that a slow moment of the machine
meets all of them; it is processor time, with BLAS on one thread.  The plain twin is measured on a few
elements and scaled up.

Exit status: 0, or 1 if a recorded value differs.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tabulate import tabulate

from refimpl.numerics import tensorcore_twin as twin
from refimpl.numerics.formats import BF16, E4M3, decode, encode
from refimpl.numerics.gemm import NAMES, gemm_fp8
from refimpl.numerics.tensorcore import QGMMA, mma_fp8, wgmma_bf16, wgmma_fp8
from refimpl.numerics.threads import single_blas_thread

ROOT = Path(__file__).resolve().parent.parent
SQUARE = (64, 64, 4096)
V3 = (128, 256, 7168)
TWIN = 4  # rows and columns of the twin's product


@dataclass(frozen=True)
class Row:
    name: str
    shape: tuple[int, int, int]
    run: Callable[[], object]
    scale: float = 1.0  # from the size that runs to the shape
    beside: str = ""  # the row to give the ratio to
    goal: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--recordings", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    return compare(options.recordings) if options.recordings else measure(options.rounds)


def measure(rounds: int) -> int:
    table = rows()
    times: dict[str, list[float]] = {row.name: [] for row in table}
    with single_blas_thread():
        for row in table:  # tables, caches, pages
            row.run()
        for _ in range(rounds):
            for row in table:
                start = time.process_time()
                row.run()
                times[row.name].append((time.process_time() - start) * row.scale)
    median = {name: float(np.median(values)) for name, values in times.items()}
    print(
        tabulate(
            [
                (
                    row.name,
                    "x".join(map(str, row.shape)),
                    f"{median[row.name]:.4f}",
                    f"{min(times[row.name]):.4f}",
                    f"{1e9 * median[row.name] / np.prod(row.shape):.2f}",
                    f"{median[row.name] / median[row.beside]:.3g} x {row.beside}" if row.beside else "",
                    row.goal,
                )
                for row in table
            ],
            headers=["what", "M x N x K", "median s", "least s", "ns per product", "ratio", "goal"],
            disable_numparse=True,
        )
    )
    return 0


def rows() -> list[Row]:
    rng = np.random.default_rng(0)

    def codes(*shape: int) -> np.ndarray:
        return encode(rng.standard_normal(shape) * 100, E4M3)

    m, n, k = V3
    a, b = codes(m, k), codes(n, k)
    scales = [
        rng.uniform(0.5, 2, shape).astype(np.float32) for shape in ((m, k // 128), (n // 128, k // 128))
    ]
    wide_a, wide_b = decode(a, E4M3), decode(b, E4M3)
    x, y = codes(64, 4096), codes(64, 4096)
    half_x, half_y = (encode(rng.standard_normal((64, 4096)), BF16) for _ in range(2))
    few = [codes(TWIN, 4096).tolist() for _ in range(2)]

    def plain() -> object:
        return [twin.chain(left, right, 0, E4M3, E4M3, QGMMA) for left in few[0] for right in few[1]]

    def kernel(name: str) -> Callable[[], object]:
        if name == "cublas_tensor":
            one = np.float32(1)
            return lambda: gemm_fp8(a, one, b, one, name)
        return lambda: gemm_fp8(a, scales[0], b, scales[1], name)

    goals = {"deepgemm": "0.45 s", "promote_fp32": "3 x"}
    return [
        Row("wgmma_fp8", SQUARE, lambda: wgmma_fp8(x, y), goal="0.03 s"),
        Row("its plain twin", SQUARE, plain, scale=64 * 64 / TWIN**2, beside="wgmma_fp8"),
        Row("mma_fp8", SQUARE, lambda: mma_fp8(x, y), beside="wgmma_fp8"),
        Row("wgmma_bf16", SQUARE, lambda: wgmma_bf16(half_x, half_y), beside="wgmma_fp8"),
        Row("float64 BLAS", V3, lambda: wide_a @ wide_b.T),
        *(Row(name, V3, kernel(name), beside="float64 BLAS", goal=goals.get(name, "")) for name in NAMES),
    ]


def compare(folder: Path) -> int:
    sys.path.insert(0, str(ROOT / "tests" / "numerics"))
    from recorded import comparisons

    lines, values, wrong = [], 0, 0
    for name, found, expected in comparisons(folder):
        differing = int((found != expected).sum())
        lines.append((name, expected.size, differing))
        values, wrong = values + expected.size, wrong + differing
    print(tabulate([*lines, ("all", values, wrong)], headers=["recording", "values", "mismatches"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
