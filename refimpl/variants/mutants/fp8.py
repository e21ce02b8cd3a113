"""Mistakes with codes and their scales.  SPEC SCALE-1 to SCALE-5, CKPT-9, FORMAT-2, GEMM-1."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np

from refimpl.numerics import casts
from refimpl.numerics.arithmetic import Array
from refimpl.numerics.blockscale import (
    QUANTISERS,
    Quantised,
    Quantiser,
    Single,
    dequantise,
    quantise,
    tile_scales,
)
from refimpl.numerics.float32 import to_bf16
from refimpl.numerics.formats import BF16, E4M3, E4M3FNUZ, FORMATS, round_to
from refimpl.numerics.gemm import gemm_fp8
from refimpl.numerics.recipe import Rule
from refimpl.numerics.scaled import Rows, quantised, rows
from refimpl.recipe_programs import Noting
from refimpl.variants.mutants.bits import BitsMutant, Data, Run

TWINS: Final = {"e4m3": "e4m3fnuz", "e4m3fnuz": "e4m3", "e5m2": "e5m2fnuz", "e5m2fnuz": "e5m2"}
SHARD: Final = 192  # rows of a rank


def _bf16(x: Single) -> Single:
    return np.asarray(round_to(x, BF16), np.float32)


def _spread(scales: Single, shape: tuple[int, ...], tile: tuple[int, int]) -> Single:
    """The scale of each element (R, C)."""
    return np.repeat(np.repeat(scales, tile[0], 0), tile[1], 1)[: shape[0], : shape[1]]


# Weights from codes and scales.


def _dequantised(value: Callable[[Single, Single], Single], read: Callable[[Single, Data], Single]) -> Run:
    """value(codes' values, scale of each element); read: the scale of each element, from the grid."""

    def run(d: Data) -> Mapping[str, Array]:
        codes = d.codes["codes"]
        found = np.asarray(value(casts.widen(codes, E4M3), read(d.single("scales"), d)), np.float32)
        return {"value": found, "value_bf16": to_bf16(found)}

    return run


def _right_grid(scales: Single, d: Data) -> Single:
    return _spread(scales, d.codes["codes"].shape, d.tile("tile"))


def _lost(scales: Single, rows: int) -> Single:
    """Without the scales of the last, partial row of blocks: those before are read for it."""
    whole = rows // 128
    return scales if whole * 128 == rows else np.concatenate([scales[:whole], scales[whole - 1 : whole]])


def _lost_grid(scales: Single, d: Data) -> Single:
    return _right_grid(_lost(scales, len(d.codes["codes"])), d)


def _transposed(scales: Single) -> Single:
    """The numbers of the grid, in their order, as if columns came first."""
    return np.ascontiguousarray(scales.reshape(scales.shape[::-1]).T)


def _transposed_grid(scales: Single, d: Data) -> Single:
    return _right_grid(_transposed(scales), d)


def _sharded_grid(scales: Single, d: Data) -> Single:
    """Blocks counted from the first row of each shard, whose first block is the one that it begins in."""
    shape, tile = d.codes["codes"].shape, d.tile("tile")
    row = np.arange(shape[0])
    start = row // SHARD * SHARD
    block = np.minimum(start // tile[0] + (row - start) // tile[0], len(scales) - 1)
    return np.repeat(scales[block], tile[1], 1)[:, : shape[1]]


def _byte(d: Data) -> Mapping[str, Array]:
    value = d.codes["codes"].astype(np.float32)
    return {"value": value, "value_bf16": to_bf16(value)}


def _as_fnuz(d: Data) -> Mapping[str, Array]:
    scale = _right_grid(d.single("scales"), d)
    value = casts.widen(d.codes["codes"], E4M3FNUZ) * scale
    return {"value": value, "value_bf16": to_bf16(value)}


def _requantised(d: Data) -> Mapping[str, Array]:
    value = dequantise(Quantised(d.codes["codes"], d.single("scales"), d.tile("tile")))
    again = dequantise(quantise(value, "ue8m0", d.tile("tile")))
    return {"value": again, "value_bf16": to_bf16(again)}


def _other_form(d: Data) -> Mapping[str, Array]:
    fmt = TWINS.get(d.arguments["format"])
    return {} if fmt is None else {"value": casts.widen(d.codes["codes"], FORMATS[fmt])}


# Activations and weights to codes and scales.


def _quantised(change: Callable[[Single, Quantiser, tuple[int, int]], tuple[Array, Single] | None]) -> Run:
    """x, recipe, tile  ->  codes and scales, or None where the mistake cannot be made."""

    def run(d: Data) -> Mapping[str, Array]:
        found: dict[str, Array] = {}
        for name in d.codes:
            with np.errstate(all="ignore"):
                made = change(d.single(name), QUANTISERS[d.arguments["recipe"]], d.tile("tile"))
            if made is not None:
                found |= {f"codes{name[1:]}": made[0], f"scales{name[1:]}": made[1]}
        return found

    return run


def _by(**fields: Any) -> Callable[[Single, Quantiser, tuple[int, int]], tuple[Array, Single]]:
    """The recipe with other fields."""

    def change(x: Single, row: Quantiser, tile: tuple[int, int]) -> tuple[Array, Single]:
        q = quantise(x, replace(row, **fields), tile)
        return q.codes, q.scales

    return change


def _with_scales(x: Single, scales: Single, row: Quantiser, tile: tuple[int, int]) -> tuple[Array, Single]:
    """Codes of x / scales."""
    quotient = x / _spread(scales, x.shape, tile)
    if row.clamp:
        quotient = np.fmin(np.fmax(quotient, np.float32(-448)), np.float32(448))
    quotient[np.isnan(quotient)] = np.nan
    return casts.cast(quotient, E4M3, row.cast), scales


def _power_after(x: Single, row: Quantiser, tile: tuple[int, int]) -> tuple[Array, Single] | None:
    if not row.power:
        return None
    plain = quantise(x, replace(row, power=""), tile)
    return plain.codes, tile_scales(x, row, tile)


def _truncated(x: Single, row: Quantiser, tile: tuple[int, int]) -> tuple[Array, Single] | None:
    if not row.power:
        return None
    scales = tile_scales(x, replace(row, power=""), tile)
    exponent = scales.view(np.uint32) & np.uint32(0x7F80_0000)
    return _with_scales(x, exponent.view(np.float32), row, tile)


def _logarithm(x: Single, row: Quantiser, tile: tuple[int, int]) -> tuple[Array, Single] | None:
    return _by(power="log2")(x, row, tile) if row.power else None


def _one_a_row(x: Single, row: Quantiser, tile: tuple[int, int]) -> tuple[Array, Single] | None:
    if tile[0] != 1:
        return None
    q = quantise(x, row, (1, x.shape[1]))
    return q.codes, np.repeat(q.scales, -(-x.shape[1] // tile[1]), 1)


def _scale_in_bf16(x: Single, row: Quantiser, tile: tuple[int, int]) -> tuple[Array, Single] | None:
    return None if row.power else _with_scales(x, _bf16(tile_scales(x, row, tile)), row, tile)


# Products.


def _product(read: Callable[[Data], dict[str, Array]], **arguments: Any) -> Run:
    """The product with other operands or arguments."""

    def run(d: Data) -> Mapping[str, Array]:
        own: dict[str, Any] = {name: d.single(name) for name in ("a_scale", "b_scale")} | read(d)
        how = {**d.arguments, **{k: v for k, v in arguments.items() if k in d.arguments}}
        result = gemm_fp8(d.codes["a"], own["a_scale"], d.codes["b"], own["b_scale"], **how).view(np.float32)
        return {"d": result, "d_bf16": to_bf16(result)}

    return run


def _grids(name: str, change: Callable[[Single, Data], Single]) -> Callable[[Data], dict[str, Array]]:
    """Scales of one operand read otherwise, where there is a grid of them."""
    return lambda d: {name: change(d.single(name), d)} if d.single(name).ndim == 2 else {}


# The same mistakes inside of a recipe.


def _quantising(change: Callable[[Single, Quantiser, tuple[int, int]], tuple[Array, Single] | None]) -> Any:
    """The recipe with another way to codes and scales, where the mistake can be made."""

    class Wrong(Noting):
        def made(self, x: Array, rule: Rule, transposed: bool) -> Rows:
            right = quantised(x, rule)
            single = np.asarray(x, np.float32)
            found = None
            if right.format is E4M3:
                with np.errstate(all="ignore"):
                    found = change(single, QUANTISERS[rule.scale], right.tile)
            wrong = right if found is None else Quantised(found[0], found[1], right.tile)
            return rows(wrong.transposed if transposed else wrong)

    return Wrong


def _in_dgrad(change: Callable[[Single], Single]) -> Any:
    """The recipe with other scales of the weight in Dgrad; change: of the grid of its blocks."""

    class Wrong(Noting):
        def gemm(self, site: str, a: Rows, b: Rows) -> Array:
            if site.endswith(".dgrad"):
                scales = np.repeat(change(b.scales[::128]), 128, axis=0)[: len(b.scales)]
                b = Rows(b.codes, np.ascontiguousarray(scales), b.format)
            return super().gemm(site, a, b)

    return Wrong


MUTANTS: Final = (
    BitsMutant("F01a", {"dequantise": _dequantised(lambda v, s: v, _right_grid)}),
    BitsMutant("F01b", {"dequantise": _byte}),
    BitsMutant("F02", {"dequantise": _dequantised(lambda v, s: v / s, _right_grid)}),
    BitsMutant(
        "F03",
        {
            "dequantise": _dequantised(lambda v, s: v * s, _lost_grid),
            "gemm_fp8": _product(_grids("b_scale", lambda s, d: _lost(s, len(d.codes["b"])))),
        },
    ),
    BitsMutant(
        "F04",
        {
            "dequantise": _dequantised(lambda v, s: v * s, _transposed_grid),
            "gemm_fp8": _product(_grids("a_scale", lambda s, d: _transposed(s))),
        },
    ),
    BitsMutant("F05", {"quantise": _quantised(_power_after)}, _quantising(_power_after)),
    BitsMutant("F06", {"quantise": _quantised(_truncated)}, _quantising(_truncated)),
    BitsMutant("F07", {"quantise": _quantised(_logarithm)}),
    BitsMutant("F08", {"dequantise": _requantised}),
    BitsMutant("F09a", {"quantise": _quantised(_by(floor=None))}),
    BitsMutant("F09b", {"quantise": _quantised(_by(floor=1e-10))}),
    BitsMutant("F10", {"decode": _other_form, "dequantise": _as_fnuz}),
    BitsMutant("F11", {"quantise": _quantised(_one_a_row)}, _quantising(_one_a_row)),
    BitsMutant("F12", {"gemm_fp8": _product(lambda d: {}, accumulation="fast")}),
    BitsMutant("F14", {"quantise": _quantised(_scale_in_bf16)}),
    BitsMutant("F15", {"dequantise": _dequantised(lambda v, s: v * s, _sharded_grid)}),
    BitsMutant("L17a", {}, _in_dgrad(np.ones_like)),
    BitsMutant("L17b", {}, _in_dgrad(_transposed)),
    BitsMutant("X04", {"dequantise": _dequantised(lambda v, s: _bf16(v * _bf16(s)), _right_grid)}),
)
