"""Block scales: quantisation, dequantisation and requantisation.  SPEC SCALE-1 to SCALE-6.

A tile of a matrix shares one float32 scale s, and its elements are x = code * s.  The scales of x (R, C) in
tiles of r by c are a grid (ceil(R / r), ceil(C / c)); tiles at the edges are smaller.  Activations have tiles
1x128 along the contracted axis (128x1 for Wgrad), weights blocks of 128x128.

SCALE-1, the scale.  With amax the largest |x| of the tile and top the format's largest value, in float32:

    a = max(amax, floor)         s = RN(a / top)     or     s = RN(a * RN(1 / top))

SCALE-2, NaN.  `ignore`: maxima are those of fmax, where a NaN does not count (without a floor a tile of
nothing but NaN has the scale NaN).  `spread`: one NaN makes s a NaN.

SCALE-3, powers of two.  `bits`: s is rounded up to a power of two.  `clamped`: likewise, and its exponent
field is then clamped to 1 to 254, which makes infinity and NaN 2^127.  `log2`: 2^ceil(log2f(s)), where log2f
rounds: a few units above 2^k its float32 result is k, and s becomes 2^k.  log2f is modelled as the float32
nearest to the logarithm; its ceiling is the library's for every normal float32, as tried on an H100.

SCALE-4, codes.  The quotient is `divide`: RN(x / s), `inverse`: RN(x RN(1 / s)), or `div.full` (RCP-2); with
`clamp`, fmin(fmax(q, -top), top), which makes a NaN -top; then the cast (CAST-1).  A NaN that was computed is
positive, as on the GPU.

SCALE-5.  dequantise is RN(value * s) in float32; requantise quantises that in other tiles.  From powers of
two to powers of two it is exact but for what falls below the format's normal values.

SCALE-6.  Recipes are rows of a table; those of E4M3 in 1x128 tiles and 128x128 blocks were recorded on an
H100.  Other formats and shapes are the same formulas with their own top, and formats that the cast has no row
for saturate.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refimpl.errors import Invalid
from refimpl.numerics import casts
from refimpl.numerics.formats import E4M3, Codes, Format
from refimpl.numerics.reciprocal import div_full_factors

Single = NDArray[np.float32]
Tile = tuple[int, int]

ACTIVATION: Tile = (1, 128)
TRANSPOSED: Tile = (128, 1)
BLOCK: Tile = (128, 128)
_PART = 1 << 18  # elements at a time


@dataclass(frozen=True)
class Quantiser:
    """A row of the table: how scales and codes are made."""

    name: str
    scale: str  # "divide" or "inverse": RN(a / top) or RN(a RN(1 / top))
    nan: str  # "ignore" or "spread"
    power: str  # "", "bits", "clamped", "log2"
    quotient: str  # "divide", "inverse", "div.full"
    cast: str  # a behaviour of `casts`
    source: str
    floor: float | None = 1e-4
    clamp: bool = False
    tile: Tile = ACTIVATION


_HAND = "hand-written CUDA kernel"
_DG = "DeepGEMM's per_token_cast_to_fp8, by torch 2.11 on CUDA"
_DGB = "DeepGEMM's per_block_cast_to_fp8, by torch 2.11 on CUDA"
_TRITON = "act_quant of DeepSeek's inference code for V3, Triton 3.6"
_V32 = "act_quant of V3.2, its formulas rebuilt in CUDA (tilelang itself was not run)"
QUANTISERS = {
    row.name: row
    for row in (
        # name, scale, nan, power, quotient, cast, source
        Quantiser("ieee", "divide", "ignore", "", "divide", "ptx", _HAND),
        Quantiser("deepgemm_sat", "divide", "ignore", "", "inverse", "ptx", _HAND),
        Quantiser("ue8m0", "divide", "ignore", "bits", "divide", "ptx", _HAND),
        Quantiser("noclamp", "divide", "ignore", "", "divide", "ptx", f"{_HAND}: no floor", floor=None),
        Quantiser("torch_dg", "inverse", "spread", "", "inverse", "torch-2.11", _DG),
        Quantiser("torch_dg_ue8m0", "inverse", "spread", "clamped", "inverse", "torch-2.11", _DG),
        Quantiser("triton_v3", "inverse", "ignore", "", "div.full", "ptx", _TRITON),
        Quantiser("triton_v3_ue8m0", "inverse", "ignore", "log2", "div.full", "ptx", _TRITON),
        Quantiser("v32", "inverse", "ignore", "", "divide", "ptx", _V32, clamp=True),
        Quantiser("v32_ue8m0", "inverse", "ignore", "bits", "divide", "ptx", _V32, clamp=True),
        Quantiser("w_block", "inverse", "spread", "", "inverse", "torch-2.11", _DGB, tile=BLOCK),
        Quantiser("w_block_ue8m0", "inverse", "spread", "clamped", "inverse", "torch-2.11", _DGB, tile=BLOCK),
    )
}


@dataclass(frozen=True)
class Quantised:
    """codes (R, C), scales float32 (ceil(R / r), ceil(C / c)) for tiles of r by c.  Checked when made."""

    codes: Codes
    scales: Single
    tile: Tile = ACTIVATION
    format: Format = field(default=E4M3)

    def __post_init__(self) -> None:
        if self.scales.dtype != np.float32:
            raise Invalid(f"scales have the type {self.scales.dtype}, but they must be float32.")
        require_grid(self.codes.shape, self.scales.shape, self.tile)

    @property
    def transposed(self) -> "Quantised":
        """The same of the transposed matrix: codes (C, R), tiles of c by r."""
        return Quantised(self.codes.T, self.scales.T, (self.tile[1], self.tile[0]), self.format)


def quantiser(name: str) -> Quantiser:
    """The recipe of a name.  Raises Invalid."""
    if name not in QUANTISERS:
        raise Invalid(f"the quantisation recipe is {name!r}, but it must be one of {', '.join(QUANTISERS)}.")
    return QUANTISERS[name]


def quantise(
    x: ArrayLike, recipe: str | Quantiser, tile: Tile | None = None, fmt: Format = E4M3
) -> Quantised:
    """x (R, C) of floats, taken as float32  ->  codes and scales.  SPEC SCALE-1 to SCALE-4.

    recipe: a name of the table, or a row of one's own; tile: by default that of the recipe.  Raises Invalid.
    """
    row = recipe if isinstance(recipe, Quantiser) else quantiser(recipe)
    tile = row.tile if tile is None else tile
    given = np.asarray(x)
    if given.ndim != 2 or given.dtype.kind != "f":
        raise Invalid(f"x is {given.dtype} {given.shape}, but what is quantised must be floats (R, C).")
    scales = np.empty(grid(given.shape, tile), np.float32)
    codes = np.empty(given.shape, fmt.code_type)
    with np.errstate(all="ignore"):
        for rows, tiles in _parts(given.shape, tile):
            some = np.asarray(given[rows], np.float32)
            scales[tiles] = tile_scales(some, row, tile, fmt)
            codes[rows] = _codes(_quotient(some, scales[tiles], row, tile), row, fmt)
    return Quantised(codes, scales, tile, fmt)


def tile_scales(x: Single, row: Quantiser, tile: Tile, fmt: Format = E4M3) -> Single:
    """x (R, C) float32  ->  the scales of its tiles.  SPEC SCALE-1 to SCALE-3."""
    if 0 in x.shape:
        return np.empty(grid(x.shape, tile), np.float32)
    size = np.abs(x)
    with np.errstate(all="ignore"):
        amax = _maxima(size, tile)
        if row.nan == "ignore" and np.isnan(amax).any():
            size[np.isnan(size)] = -1.0  # less than any; np.fmax would lose the maximum at a signalling NaN
            amax = _maxima(size, tile)
    if row.floor is not None:
        amax = np.maximum(amax, np.float32(row.floor))  # keeps a NaN
    else:
        amax[amax < 0] = np.nan
    top = np.float32(fmt.largest)
    with np.errstate(all="ignore"):
        scale = amax / top if row.scale == "divide" else amax * (np.float32(1) / top)
        return _POWERS[row.power](scale.astype(np.float32, copy=False))


def _maxima(size: Single, tile: Tile) -> Single:
    """size (R, C)  ->  the largest of each tile; NaN where there is one."""
    (high, wide), (step, width) = size.shape, tile
    if width > 1:
        size = np.maximum.reduceat(size, np.arange(0, wide, width), axis=1)
    if step == 1:
        return size
    whole = high // step * step  # along this axis reduceat is ten times slower
    parts = [size[:whole].reshape(-1, step, size.shape[1]).max(axis=1)]
    return np.concatenate([*parts, size[whole:].max(axis=0, keepdims=True)]) if whole < high else parts[0]


def dequantise(q: Quantised) -> Single:
    """codes and scales  ->  float32 (R, C), value * scale rounded once.  SPEC SCALE-5."""
    out = np.empty(q.codes.shape, np.float32)
    with np.errstate(all="ignore"):
        for rows, tiles in _parts(q.codes.shape, q.tile):
            value = casts.widen(q.codes[rows], q.format)
            np.multiply(value, _spread(q.scales[tiles], value.shape, q.tile), out=out[rows])
    return out


def requantise(q: Quantised, recipe: str, tile: Tile = TRANSPOSED) -> Quantised:
    """The same matrix in other tiles, through float32; Wgrad reads its `.transposed`.  SPEC SCALE-5."""
    return quantise(dequantise(q), recipe, tile, q.format)


def grid(shape: tuple[int, ...], tile: Tile) -> tuple[int, int]:
    """The shape of the scales of a matrix (R, C).  Raises Invalid for tiles that are no shape."""
    if len(tile) != 2 or min(tile) < 1:
        raise Invalid(f"the tile is {tile}, but it must be two positive sizes.")
    return -(-shape[0] // tile[0]), -(-shape[1] // tile[1])


def require_grid(shape: tuple[int, ...], scales: tuple[int, ...], tile: Tile, what: str = "scales") -> None:
    """Raises Invalid unless scales of this shape fit a matrix of that shape."""
    if len(shape) != 2:
        raise Invalid(f"codes have shape {shape}, but a matrix (R, C) is required.")
    if tuple(scales) != grid(shape, tile):
        raise Invalid(
            f"{what} have shape {tuple(scales)}, "
            f"but those of {shape} in tiles of {tile[0]}x{tile[1]} must have {grid(shape, tile)}."
        )


def _quotient(x: Single, scales: Single, row: Quantiser, tile: Tile) -> Single:
    if row.quotient == "divide":
        return x / _spread(scales, x.shape, tile)
    if row.quotient == "inverse":
        return x * _spread(np.float32(1) / scales, x.shape, tile)
    before, inverse = div_full_factors(scales)
    if (before != 1).any():
        x = x * _spread(before, x.shape, tile)
    return x * _spread(inverse, x.shape, tile)


def _codes(quotient: Single, row: Quantiser, fmt: Format) -> Codes:
    top = np.float32(fmt.largest)
    if row.clamp:
        quotient = np.fmin(np.fmax(quotient, -top), top)
    quotient[np.isnan(quotient)] = np.nan  # the positive one
    known = (row.cast, fmt.name) in casts.CASTS
    return casts.cast(quotient, fmt, row.cast if known else "saturate")


def _bits(scale: Single) -> Single:
    code = scale.view(np.uint32)
    up = (code + np.uint32(0x7F_FFFF)) & np.uint32(0x7F80_0000)
    return np.where(np.isfinite(scale), up.view(np.float32), scale)


def _clamped(scale: Single) -> Single:
    code = scale.view(np.uint32)
    exponent = (code >> np.uint32(23) & np.uint32(0xFF)) + ((code & np.uint32(0x7F_FFFF)) != 0)
    power: Single = (np.clip(exponent, 1, 254).astype(np.uint32) << np.uint32(23)).view(np.float32)
    return power


def _log2(scale: Single) -> Single:
    part, exponent = np.frexp(scale.astype(np.float64))  # part in [1/2, 1): s = (1 + t) 2^k
    t, k = 2.0 * part - 1.0, exponent - 1.0
    # log2(1 + t) = t (1 - t / 2 + ...) / ln 2; beyond t = 2^-16 no float32 rounds the sum down to k
    logarithm = (k + t * (1.0 - 0.5 * t) * 1.4426950408889634).astype(np.float32)
    k = k + ((logarithm > k) | (t > 2.0**-16))
    power: Single = np.ldexp(1.0, k.astype(np.int32)).astype(np.float32)
    return np.where(np.isfinite(scale) & (scale > 0), power, scale)


_POWERS: dict[str, Callable[[Single], Single]] = {
    "": lambda scale: scale,
    "bits": _bits,
    "clamped": _clamped,
    "log2": _log2,
}


def _parts(shape: tuple[int, ...], tile: Tile) -> Iterator[tuple[slice, slice]]:
    """Rows and rows of tiles, so many that what is between is small."""
    tiles = max(1, _PART // max(1, tile[0] * shape[1]))
    for at in range(0, grid(shape, tile)[0], tiles):
        yield slice(at * tile[0], min((at + tiles) * tile[0], shape[0])), slice(at, at + tiles)


def _spread(scales: Single, shape: tuple[int, ...], tile: Tile) -> Single:
    """The scale of each element, (R, C)."""
    rows = np.repeat(scales, tile[0], axis=0)[: shape[0]] if tile[0] > 1 else scales
    each: Single = np.repeat(rows, tile[1], axis=1)[:, : shape[1]] if tile[1] > 1 else rows
    return each
