"""How wrong is a sum that stays on the tensor cores?

    python bench/experiments/accumulation.py [--rows N] [--picture FILE]

Report, section 3.5.2 of DeepSeek-V3: with K = 4096 the accumulation of Hopper's FP8 instructions leads, in a
preliminary test, to "a maximum relative error of nearly 2%"; therefore sums are promoted to float32 after
every 128.  What was summed, and relative to what, it does not say.

First table: E4M3 codes of three kinds of data, one scale each, summed by one chain of wgmma, and with
promotion, against the exact sum of the same codes; so only accumulation errs.  The picture (SVG) has its
relative Frobenius error against K.  Second table: the whole way from the data to the product, with one scale
for a matrix or one for each tile of 128 (a) and block (b).  Third table: readings of the report's number.

What it shows.  All cuts are toward zero.  Sums of one sign therefore lose in proportion to K: 7.5% at 4096
for uniform data.  Signed sums lose like the square root of K and little: 0.13% at 4096 for normal data as a
relative Frobenius error, but 1.3 to 2.0% as the largest error over the mean size of the exact values, or over
their root mean square.  That is the reading of "nearly 2%" that fits; the largest error over the largest
value is 0.3%, and the largest relative error of an element has no bound, for elements near zero.  With
promotion after every 128 neither kind grows with K.  Of the whole error of a product of signed data,
quantisation makes 3.7% and accumulation little; scales per tile and block matter where rows differ in size
(the median relative error is 3.3% instead of 7.4%).
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tabulate import tabulate

from refimpl.numerics.formats import E4M3, encode
from refimpl.numerics.gemm import gemm_fp8
from refimpl.numerics.tensorcore import wgmma_fp8

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
REPORT_LENGTH = 4096
LARGEST = 448.0


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape)


def uniform(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.random(shape)


def outlier(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Normal; but one row of 32 is 1000 times and one element of 1000 is 30 times as large."""
    row = np.where(np.arange(shape[0]) % 32 == 0, 1000.0, 1.0)[:, None]
    return rng.standard_normal(shape) * row * np.where(rng.random(shape) < 1e-3, 30.0, 1.0)


KINDS: dict[str, Callable[..., np.ndarray]] = {"normal": normal, "uniform": uniform, "outlier": outlier}


def scaled(x: np.ndarray, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """x (R, K)  ->  codes (R, K) and float32 scales (R/rows, K/columns), the largest of a tile being 448."""
    tiles = x.reshape(x.shape[0] // rows, rows, x.shape[1] // columns, columns)
    scale = (np.abs(tiles).max(axis=(1, 3)) / LARGEST).astype(np.float32)
    return encode((tiles / scale[:, None, :, None]).reshape(x.shape), E4M3), scale


def measures(found: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Readings of "the error", in percent."""
    error, size = np.abs(found.astype(float) - exact), np.abs(exact)
    some = exact != 0  # codes of small rows may all be zero
    return {
        "Frobenius": 100 * math.sqrt((error**2).sum() / (exact**2).sum()),
        "max / max": 100 * error.max() / size.max(),
        "max / rms": 100 * error.max() / math.sqrt((exact**2).mean()),
        "max / mean": 100 * error.max() / size.mean(),
        "median relative": 100 * float(np.median(error[some] / size[some])),
    }


def accumulation(kind: str, rows: int, k: int) -> dict[str, dict[str, float]]:
    """Path -> measures, against the exact sum of the same codes."""
    rng = np.random.default_rng([k, *kind.encode()])
    (a, _), (b, _) = (scaled(KINDS[kind](rng, rows, k), rows, k) for _ in range(2))
    one = np.ones((rows, k // 128), np.float32)
    exact = gemm_fp8(a, one, b, one, "exact").astype(float)
    return {
        "one chain": measures(wgmma_fp8(a, b), exact),
        "promoted": measures(gemm_fp8(a, one, b, one, "deepgemm"), exact),
    }


def scaling(kind: str, rows: int, k: int) -> dict[str, dict[str, float]]:
    """Path -> measures, against the product of the data."""
    rng = np.random.default_rng([k, *kind.encode()])
    x, w = KINDS[kind](rng, rows, k), normal(rng, rows, k)
    exact = x @ w.T
    (a, sa), (b, sb) = scaled(x, rows, k), scaled(w, rows, k)
    chain = gemm_fp8(a, sa[0, 0], b, sb[0, 0], "cublas_tensor")
    promoted = gemm_fp8(a, sa[0, 0], b, sb[0, 0], "cublas_tensor", accumulation="blocks")
    (ta, tsa), (tb, tsb) = scaled(x, 1, 128), scaled(w, 128, 128)
    return {
        "one scale, one chain": measures(chain, exact),
        "one scale, promoted": measures(promoted, exact),
        "tiles and blocks, promoted": measures(gemm_fp8(ta, tsa, tb, tsb, "deepgemm"), exact),
        "tiles and blocks, exact sums": measures(gemm_fp8(ta, tsa, tb, tsb, "exact"), exact),
    }


def readings(rows: int) -> dict[tuple[object, ...], dict[str, float]]:
    """One chain at the report's K, normal data as they are and scaled, for some seeds."""
    table: dict[tuple[object, ...], dict[str, float]] = {}
    for seed in range(3):
        rng = np.random.default_rng([REPORT_LENGTH, seed])
        x, y = (normal(rng, rows, REPORT_LENGTH) for _ in range(2))
        one = np.ones((rows, REPORT_LENGTH // 128), np.float32)
        for name, a, b in (
            ("as it is", encode(x, E4M3), encode(y, E4M3)),
            ("largest to 448", scaled(x, *x.shape)[0], scaled(y, *y.shape)[0]),
        ):
            exact = gemm_fp8(a, one, b, one, "exact").astype(float)
            table[seed, name, "one chain"] = measures(wgmma_fp8(a, b), exact)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=128, help="of both matrices, a multiple of 128")
    parser.add_argument("--picture", type=Path, default=Path(__file__).with_suffix(".svg"))
    options = parser.parse_args()
    found = {kind: {k: accumulation(kind, options.rows, k) for k in LENGTHS} for kind in KINDS}
    show(
        "Accumulation alone, in percent",
        ("data", "K", "sum"),
        {
            (kind, k, path): values
            for kind, by_k in found.items()
            for k, paths in by_k.items()
            for path, values in paths.items()
        },
    )
    show(
        f"Quantisation and accumulation, K = {REPORT_LENGTH}, in percent",
        ("data", "K", "way"),
        {
            (kind, REPORT_LENGTH, path): values
            for kind in KINDS
            for path, values in scaling(kind, options.rows, REPORT_LENGTH).items()
        },
    )
    show(f"Normal data, K = {REPORT_LENGTH}, in percent", ("seed", "data", "sum"), readings(192))
    try:
        picture(found, options.picture)
        print(f"The picture is {options.picture}.")
    except ImportError:
        print("No picture: matplotlib is not installed (pip install 'refimpl[plot]').")


def show(title: str, names: tuple[str, ...], table: dict[tuple[object, ...], dict[str, float]]) -> None:
    headers = [*names, *next(iter(table.values()))]
    lines = [(*key, *(f"{value:.2g}" for value in values.values())) for key, values in table.items()]
    print(f"{title}\n\n{tabulate(lines, headers=headers, disable_numparse=True)}\n")


def picture(found: dict[str, dict[int, dict[str, dict[str, float]]]], path: Path) -> None:
    """Lines of the relative Frobenius error over K, both logarithmic.  Needs matplotlib (extra `plot`)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for colour, (kind, by_k) in zip(("tab:blue", "tab:red", "tab:green"), found.items(), strict=True):
        for how, style in (("one chain", "o-"), ("promoted", "o:")):
            errors = [paths[how]["Frobenius"] for paths in by_k.values()]
            axes.plot(list(by_k), errors, style, color=colour, markersize=3, label=f"{kind}, {how}")
    axes.axhline(2.0, color="gray", linestyle="--", linewidth=1, label="the report's 2%")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(LENGTHS, [str(k) for k in LENGTHS])
    axes.set_xlabel("K, of codes in E4M3")
    axes.set_ylabel("relative Frobenius error of the sum, %")
    axes.grid(color="#ddd")
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
