"""The page of hopper_recipe.py: its results as tables."""

from __future__ import annotations

import argparse
import datetime
from typing import Any

KINDS = {"codes": "codes", "scales": "scales", "product": "products", "value": "other values"}
WAYS = {"wgmma": "wgmma, hand-written", "library": "cuBLAS", "emulation": "emulation"}


def page(results: list[Any], about: dict[str, Any], options: argparse.Namespace, day: datetime.date) -> str:
    cuda = f", torch {about['torch']} with CUDA {about['cuda']}" if about["cuda"] else ""
    quick = (f" --tokens {options.tokens}" if options.tokens else "") + (" --quick" if options.quick else "")
    lines = [
        "# The recipe v3-fp8 on a Hopper GPU",
        "",
        f"`python bench/hopper_recipe.py --seed {options.seed}{quick}` on {day}: "
        f"{about['device']}{cuda}. Inputs are random numbers in BF16 whose tokens and channels differ in "
        "size, with a token of zeros and a channel far outside; backward starts from a random gradient. "
        "Differences are counted bit for bit.",
        "",
        "## Stage by stage",
        "",
        "Each tensor against what the recipe makes of the GPU's own tensors before it: differing values.",
        "",
        "| component | products by | SwiGLU in | " + " | ".join(KINDS.values()) + " |",
        "|---|---|---|" + "---|" * len(KINDS),
    ]
    for r in results:
        cells = [_share(r, kind, "stage") for kind in KINDS]
        lines.append(f"| {_first(r)} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "## The GEMMs",
        "",
        "The order is the row of SPEC GEMM-1 that gives cuBLAS's values, or two rows where scales are powers "
        "of two and both give the same; parts are equal ones of K, whose results are added in turn. The "
        "hand-written kernel adds as `deepgemm`.",
        "",
        "| component | GEMM | M x N x K | order | values | differ: cuBLAS | wgmma | cuBLAS's kernel |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [line for r in results for line in _gemms(r, results, about)]
    lines += [
        "",
        "## Chained",
        "",
        "The whole component on the GPU against the recipe by itself: differing values.",
        "",
        "| component | products by | SwiGLU in | "
        + " | ".join(KINDS.values())
        + " | output | gradient of the input |",
        "|---|---|---|" + "---|" * (len(KINDS) + 2),
    ]
    for r in results:
        cells = [_share(r, kind, "chained") for kind in KINDS]
        rows = {row.name: row for row in r.rows}
        cells += [_one(rows[name]) for name in (r.case.path, "grad.x")]
        lines.append(f"| {_first(r)} | " + " | ".join(cells) + " |")
    lines += ["", "### Where the differences begin", "", *_begins(results), *_swiglu(results), ""]
    return "\n".join(lines)


def _first(r: Any) -> str:
    wide = r.wide if r.case.component == "mlp" else ""
    return f"{r.case.name} | {WAYS[r.way]} | {wide}"


def _share(r: Any, kind: str, how: str) -> str:
    rows = [row for row in r.rows if row.kind == kind]
    return f"{sum(getattr(row, how) for row in rows):,} of {sum(row.values for row in rows):,}"


def _one(row: Any) -> str:
    return f"{row.chained:,} of {row.values:,}"


def _gemms(r: Any, results: list[Any], about: dict[str, Any]) -> list[str]:
    """One line per GEMM, of the runs whose inner values are the recipe's."""
    wide = "float64" if r.case.component == "mlp" else "float32"
    if r.wide != wide or r.way == "wgmma":
        return []
    own = {row.name: row for row in r.rows}
    hand = next((o for o in results if o.case == r.case and o.way == "wgmma" and o.wide == wide), None)
    other = {row.name: row for row in hand.rows} if hand else {}
    lines = []
    for name, (orders, shape) in r.orders.items():
        row = own[f"{name}.d"]
        kernel = about["kernels"].get(r.case.name, {}).get(name, "")
        theirs = f"{other[f'{name}.d'].stage:,}" if other else ""
        short = ".".join(name.removeprefix(r.case.path).strip(".").split("."))
        lines.append(
            f"| {r.case.name} | {short} | {' x '.join(map(str, shape))} | {_order(orders)} | {row.values:,} "
            f"| {row.stage:,} | {theirs} | {kernel} |"
        )
    return lines


def _order(orders: list[tuple[str, int]]) -> str:
    parts = f", {orders[0][1]} parts" if orders and orders[0][1] > 1 else ""
    return " or ".join(f"`{kernel}`" for kernel, _ in orders) + parts if orders else "none fits"


def _begins(results: list[Any]) -> list[str]:
    """The first tensors that differ from the recipe's own, of each run."""
    lines = []
    for r in results:
        wrong = [row for row in r.rows if row.chained][:4]
        names = ", ".join(
            f"`{row.name.removeprefix(r.case.path).strip('.') or 'y'}` {_one(row)}" for row in wrong
        )
        lines.append(
            f"- {', '.join(part for part in _first(r).split(' | ') if part.strip())}: {names or 'none'}"
        )
    return lines


def _swiglu(results: list[Any]) -> list[str]:
    """What a SwiGLU in float32 differs by, from the GPU's own inputs."""
    lines = []
    for r in results:
        for row in r.rows:
            if r.single and row.stage and not row.name.endswith(".act"):  # which is the input of down_proj
                name = row.name.removeprefix(r.case.path).strip(".")
                far = f"{row.distance * 2**24:.1f} units" if name.endswith("dy") else f"{row.distance:.1e}"
                lines.append(f"| {WAYS[r.way]} | `{name}` | {row.stage:,} of {row.values:,} | {far} |")
    return lines and [
        "",
        "### SwiGLU in float32, from the GPU's own inputs",
        "",
        "The recipe computes it exactly and rounds where it is stored: the input of down_proj to BF16, the "
        "gradients of its inputs to float32 on the way to their codes. In float32 there are roundings in "
        "between. The largest difference of a value in BF16 is relative to itself, of a gradient to the "
        "terms of its sum, in units of 2^-24. A gradient that is the largest of its tile hands its last bit "
        "to the tile's scale, and with it to the products; a code that differs reaches all outputs of its "
        "token.",
        "",
        "| products by | tensor | differ | largest difference |",
        "|---|---|---|---|",
        *lines,
    ]
